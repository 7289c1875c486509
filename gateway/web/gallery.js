// Owns the pictures of one message on the page, each with a place for marks over it.

import { make } from "./elements.js";
import { Marks } from "./marks.js";

const SVG = "http://www.w3.org/2000/svg";

export class Gallery {
  /** @param {HTMLElement} root @param {string[]} images data URLs */
  constructor(root, images) {
    this.root = root;
    root.hidden = !images.length;
    root.classList.toggle("many", images.length > 1);
    this.marks = images.map((url, i) => this.hang(url, i, images.length));
  }

  hang(url, i, count) {
    const image = make("img", "asked-image");
    image.alt = count > 1 ? `Your picture ${i + 1} of ${count}` : "Your picture";
    const overlay = document.createElementNS(SVG, "svg");
    overlay.setAttribute("class", "marks");
    overlay.setAttribute("aria-hidden", "true");
    overlay.setAttribute("preserveAspectRatio", "none");
    const size = { width: 1, height: 1 };
    image.addEventListener("load", () => {
      // In units of the picture as shown: marks are drawn in them, and keep their thickness at any size.
      const scale = 260 / Math.max(image.naturalWidth, image.naturalHeight);
      Object.assign(size, { width: image.naturalWidth * scale, height: image.naturalHeight * scale });
      overlay.setAttribute("viewBox", `0 0 ${size.width} ${size.height}`);
      this.onReady?.();
    });
    image.src = url;
    this.root.append(make("figure", "seen", image, overlay, count > 1 ? make("figcaption", "", String(i + 1)) : null));
    return new Marks(overlay, () => size);
  }

  /** Says which pictures go along with the next message: the last `count` of these. */
  sends(count) {
    [...this.root.children].forEach((figure, i, all) => {
      const isSent = i >= all.length - count;
      figure.classList.toggle("unsent", !isSent);
      figure.title = isSent ? "" : "No longer sent: the model takes no more pictures than those after it";
    });
  }
}
