// Owns drawing with pointer and keyboard on the picture, and the brush that shows where the next shape lands.

import { SHAPES, SIZES, shapePath } from "./picture.js";

const SVG = "http://www.w3.org/2000/svg";

export class Easel {
  /** @param {import("./picture.js").Picture} picture @param {SVGElement} overlay */
  constructor(picture, overlay) {
    this.picture = picture;
    this.overlay = overlay;
    this.tool = "circle";
    this.colour = "red";
    this.size = "medium";
    this.brush = { x: 0.5, y: 0.5 };
    this.started = null;
    this.ghost = document.createElementNS(SVG, "path");
    this.ghost.setAttribute("class", "ghost");
    this.ghost.setAttribute("visibility", "hidden");
    overlay.append(this.ghost);
    this.listen(picture.canvas);
  }

  get radius() { return SIZES[this.size]; }
  get short() { return Math.min(this.picture.width, this.picture.height); }

  listen(canvas) {
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.drag(event));
    canvas.addEventListener("pointerup", () => this.release());
    canvas.addEventListener("pointercancel", () => { this.started = null; });
    canvas.addEventListener("pointerleave", () => { if (!this.started) this.hideGhost(); });
    canvas.addEventListener("keydown", (event) => this.type(event));
    canvas.addEventListener("focus", () => { if (canvas.matches(":focus-visible")) this.showGhost(this.brush, this.radius); });
    canvas.addEventListener("blur", () => this.hideGhost());
  }

  where(event) {
    const box = this.picture.canvas.getBoundingClientRect();
    return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
  }

  press(event) {
    if (event.button !== 0) return;
    this.picture.canvas.setPointerCapture(event.pointerId);
    const at = this.where(event);
    this.started = at;
    this.dragged = this.radius;
    if (this.tool === "brush") {
      this.stroke = { kind: "stroke", colour: this.colour, weight: this.radius * 0.35, points: [[at.x, at.y]] };
      this.picture.paintStep(this.stroke);
    }
  }

  drag(event) {
    const at = this.where(event);
    this.brush = at;
    if (!this.started) {
      this.showGhost(at, this.radius);
      return;
    }
    if (this.tool === "brush") {
      this.stroke.points.push([at.x, at.y]);
      this.picture.paintStep({ ...this.stroke, points: this.stroke.points.slice(-2) });
      return;
    }
    const dx = (at.x - this.started.x) * this.picture.width, dy = (at.y - this.started.y) * this.picture.height;
    const reach = Math.hypot(dx, dy) / this.short;
    if (reach > 0.02) this.dragged = Math.min(0.6, reach);
    this.showGhost(this.started, this.dragged);
  }

  release() {
    if (!this.started) return;
    if (this.tool === "brush") this.picture.add(this.stroke);
    else this.place(this.started, this.dragged);
    this.started = null;
    this.hideGhost();
  }

  place(at, radius) {
    this.picture.add({ kind: "shape", shape: this.tool, colour: this.colour, x: at.x, y: at.y, radius, tilt: 0 });
  }

  type(event) {
    const step = event.shiftKey ? 0.01 : 0.05;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    const sizes = Object.keys(SIZES);
    if (moves[event.key]) {
      const clamp = (value) => Math.min(1, Math.max(0, value));
      this.brush = { x: clamp(this.brush.x + moves[event.key][0]), y: clamp(this.brush.y + moves[event.key][1]) };
    } else if (event.key === "Enter" || event.key === " ") {
      if (this.tool === "brush") this.tool = SHAPES[0];
      this.place(this.brush, this.radius);
    } else if (event.key === "+" || event.key === "=") {
      this.size = sizes[Math.min(sizes.length - 1, sizes.indexOf(this.size) + 1)];
    } else if (event.key === "-") {
      this.size = sizes[Math.max(0, sizes.indexOf(this.size) - 1)];
    } else return;
    event.preventDefault();
    this.showGhost(this.brush, this.radius);
  }

  showGhost(at, radius) {
    const x = at.x * this.picture.width, y = at.y * this.picture.height, reach = radius * this.short;
    const round = (r) => `M${x - r} ${y}A${r} ${r} 0 1 0 ${x + r} ${y}A${r} ${r} 0 1 0 ${x - r} ${y}Z`;
    const path = this.tool === "brush" ? round(reach * 0.175) : this.tool === "circle" ? round(reach) : shapePath(this.tool, x, y, reach);
    this.ghost.setAttribute("d", path);
    this.ghost.setAttribute("visibility", "visible");
  }

  hideGhost() {
    this.ghost.setAttribute("visibility", "hidden");
  }
}
