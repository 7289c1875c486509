// Owns marks over a picture: boxes, points, an outline. Draws what it is told in fractions of the picture; decides nothing.

const SVG = "http://www.w3.org/2000/svg";
const PATH = /^[\sMmLlHhVvCcSsQqTtAaZz0-9.,eE+-]*$/; // an outline is a model's text: nothing but a path's letters and numbers

function shape(kind, className, attributes) {
  const made = document.createElementNS(SVG, kind);
  made.setAttribute("class", className);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** A path as far as it may be drawn: of one that is still being written, up to its last whole command. */
export function drawable(path) {
  if (!PATH.test(path)) return "";
  const from = path.search(/[Mm]/);
  if (from < 0) return "";
  const last = path.search(/[A-Za-z][^A-Za-z]*$/);
  return /[Zz]\s*$/.test(path) ? path.slice(from) : path.slice(from, last);
}

export class Marks {
  /** @param {SVGElement} overlay lies over the picture @param {() => {width: number, height: number}} sizeOf the picture's, in the overlay's units */
  constructor(overlay, sizeOf) {
    this.overlay = overlay;
    this.sizeOf = sizeOf;
  }

  clear() {
    this.overlay.querySelectorAll(".mark").forEach((old) => old.remove());
  }

  /** All marks anew. `outline`: {path, bbox}, or nothing. */
  show(objects, outline) {
    this.clear();
    for (const object of objects) this.draw(object);
    if (outline) this.outline(outline);
  }

  /** One box `{x_min, …}` or point `{x, y}`. @returns {SVGElement} */
  draw(object) {
    const { width, height } = this.sizeOf();
    const group = "x_min" in object
      ? this.group("box", "rect", {
        x: object.x_min * width, y: object.y_min * height, rx: 3, pathLength: 1,
        width: Math.max(0, (object.x_max - object.x_min) * width), height: Math.max(0, (object.y_max - object.y_min) * height),
      })
      : this.group("point", "circle", { cx: object.x * width, cy: object.y * height, r: 9 });
    if (!("x_min" in object)) group.append(shape("circle", "centre", { cx: object.x * width, cy: object.y * height, r: 2.5 }));
    this.overlay.append(group);
    return group;
  }

  /** An outline in place of the one before it; its path is in fractions of its box. */
  outline({ path, bbox }) {
    const { width, height } = this.sizeOf();
    const box = bbox ?? { x_min: 0, y_min: 0, x_max: 1, y_max: 1 };
    const wide = (box.x_max - box.x_min) * width, tall = (box.y_max - box.y_min) * height;
    const shown = drawable(path);
    const old = this.overlay.querySelector(".mark-outline");
    if (!shown) return;
    const group = old ?? this.group("outline", "path", {});
    for (const one of group.children) {
      one.setAttribute("d", shown);
      one.setAttribute("transform", `translate(${box.x_min * width} ${box.y_min * height}) scale(${wide} ${tall})`);
    }
    if (!old) this.overlay.append(group);
  }

  group(kind, element, attributes) {
    const group = shape("g", `mark mark-${kind}`, {});
    group.append(shape(element, "halo", attributes), shape(element, "line", attributes));
    return group;
  }
}

/** Lights some marks and dims the others of the same picture; none lit: all as they were. */
export function light(overlay, lit) {
  overlay.classList.toggle("some-lit", lit.length > 0);
  for (const mark of overlay.querySelectorAll(".mark")) mark.classList.toggle("lit", lit.includes(mark));
}
