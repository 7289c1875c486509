// Owns the picture: what was drawn, in order, and how it is painted. Knows nothing of questions or sockets.

export const COLOURS = {
  red: "#de2424", orange: "#fa8c14", yellow: "#f6dc28", green: "#28a03c",
  blue: "#285adc", purple: "#8232aa", pink: "#fa82b9", black: "#161618",
};
export const SHAPES = ["circle", "square", "triangle", "star", "diamond", "cross"];
export const SIZES = { small: 0.07, medium: 0.12, large: 0.2 };

const SIDE = 512;
const LONGEST = 640;

/** The outline of a shape of radius 1 around the origin. */
function outline(shape) {
  if (shape === "square") return [[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]];
  if (shape === "triangle") return [[0, -1], [0.95, 0.8], [-0.95, 0.8]];
  if (shape === "diamond") return [[0, -1.05], [0.84, 0], [0, 1.05], [-0.84, 0]];
  if (shape === "star") {
    return Array.from({ length: 10 }, (_, i) => {
      const turn = (i * Math.PI) / 5 - Math.PI / 2;
      const radius = i % 2 ? 0.44 : 1.05;
      return [Math.cos(turn) * radius, Math.sin(turn) * radius];
    });
  }
  const a = 0.34;
  return [[-a, -1], [a, -1], [a, -a], [1, -a], [1, a], [a, a], [a, 1], [-a, 1], [-a, a], [-1, a], [-1, -a], [-a, -a]];
}

/** Adds a shape to the current path. */
export function trace(context, shape, x, y, radius, tilt = 0) {
  context.beginPath();
  if (shape === "circle") {
    context.arc(x, y, radius, 0, Math.PI * 2);
    return;
  }
  const cos = Math.cos(tilt), sin = Math.sin(tilt);
  outline(shape).forEach(([px, py], i) => {
    const tx = x + (px * cos - py * sin) * radius;
    const ty = y + (px * sin + py * cos) * radius;
    if (i === 0) context.moveTo(tx, ty);
    else context.lineTo(tx, ty);
  });
  context.closePath();
}

/** An SVG path of a shape, for buttons. */
export function shapePath(shape, x, y, radius) {
  return outline(shape).map(([px, py], i) => `${i ? "L" : "M"}${x + px * radius} ${y + py * radius}`).join("") + "Z";
}

const between = (low, high) => low + Math.random() * (high - low);
const oneOf = (list) => list[Math.floor(Math.random() * list.length)];
const shuffled = (list) => [...list].sort(() => Math.random() - 0.5);

function rgbOf(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

/** A scene like those the model learnt from: one to five shapes, well apart, on a ground they stand out from. */
function inventScene() {
  const grounds = [[255, 255, 255], [255, 255, 255], [238, 234, 224], [214, 226, 232], [232, 220, 228], [221, 230, 214], [58, 62, 70]];
  const ground = oneOf(grounds);
  const grain = Math.random() < 0.45 ? between(6, 14) : 0;
  const apart = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1], a[2] - b[2]);
  const names = shuffled(Object.keys(COLOURS).filter((name) => apart(rgbOf(COLOURS[name]), ground) > 115));
  const palette = names.slice(0, 2 + Math.floor(Math.random() * 3));
  const shapes = shuffled(SHAPES).slice(0, 2 + Math.floor(Math.random() * 3));
  const wanted = 3 + Math.floor(Math.random() * 3);
  const things = [];
  for (let tries = 0; tries < 200 && things.length < wanted; tries += 1) {
    const radius = between(0.075, wanted > 3 ? 0.14 : 0.17);
    const x = between(radius + 0.03, 0.97 - radius), y = between(radius + 0.03, 0.97 - radius);
    const clear = things.every((other) => Math.hypot(other.x - x, other.y - y) > (other.radius + radius) * 1.25);
    if (clear) {
      const shape = oneOf(shapes);
      const tilt = shape === "circle" ? 0 : between(-0.12, 0.12);
      things.push({ kind: "shape", shape, colour: oneOf(palette), x, y, radius, tilt });
    }
  }
  return [{ kind: "ground", rgb: ground, grain, seed: Math.floor(Math.random() * 1e9) }, ...things];
}

export class Picture {
  /** @param {HTMLCanvasElement} canvas @param {() => void} onChange */
  constructor(canvas, onChange) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.onChange = onChange;
    this.steps = [];
    this.version = 0;
    this.paint();
  }

  get width() { return this.canvas.width; }
  get height() { return this.canvas.height; }
  get isPhoto() { return this.steps.some((step) => step.kind === "image"); }
  get isEmpty() { return this.steps.length === 0; }

  /** Names such as "red circle" that were placed since the last clear; empty once other things were drawn. */
  get names() {
    if (this.steps.some((step) => step.kind === "image" || step.kind === "stroke")) return [];
    return this.steps.filter((step) => step.kind === "shape").map((step) => `${step.colour} ${step.shape}`);
  }

  add(step) {
    this.steps.push(step);
    this.changed();
  }

  undo() {
    const gone = this.steps.pop();
    if (!gone) return;
    if (gone.kind === "image") this.resize(SIDE, SIDE);
    this.changed();
  }

  clear() {
    this.steps = [];
    this.resize(SIDE, SIDE);
    this.changed();
  }

  surprise() {
    this.steps = inventScene();
    this.resize(SIDE, SIDE);
    this.changed();
  }

  /** Takes over a picture file, keeping its proportions. */
  async load(blob) {
    const bitmap = await createImageBitmap(blob);
    const scale = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
    this.resize(Math.max(16, Math.round(bitmap.width * scale)), Math.max(16, Math.round(bitmap.height * scale)));
    this.steps = [{ kind: "image", bitmap }];
    this.changed();
  }

  resize(width, height) {
    if (this.canvas.width === width && this.canvas.height === height) return;
    this.canvas.width = width;
    this.canvas.height = height;
  }

  changed() {
    this.version += 1;
    this.paint();
    this.onChange();
  }

  paint() {
    const { context } = this;
    context.fillStyle = "#ffffff";
    context.fillRect(0, 0, this.width, this.height);
    for (const step of this.steps) this.paintStep(step);
  }

  paintStep(step) {
    const { context, width, height } = this;
    const short = Math.min(width, height);
    if (step.kind === "ground") this.paintGround(step);
    else if (step.kind === "image") context.drawImage(step.bitmap, 0, 0, width, height);
    else if (step.kind === "shape") {
      trace(context, step.shape, step.x * width, step.y * height, step.radius * short, step.tilt ?? 0);
      context.fillStyle = COLOURS[step.colour];
      context.fill();
    } else {
      context.strokeStyle = COLOURS[step.colour];
      context.lineWidth = step.weight * short;
      context.lineCap = context.lineJoin = "round";
      context.beginPath();
      step.points.forEach(([x, y], i) => {
        if (i === 0) context.moveTo(x * width, y * height);
        context.lineTo(x * width + (step.points.length === 1 ? 0.1 : 0), y * height);
      });
      context.stroke();
    }
  }

  paintGround({ rgb, grain, seed }) {
    const { context, width, height } = this;
    context.fillStyle = `rgb(${rgb.join(" ")})`;
    context.fillRect(0, 0, width, height);
    if (!grain) return;
    const pixels = context.getImageData(0, 0, width, height);
    let state = seed || 1;
    for (let i = 0; i < pixels.data.length; i += 4) {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      const shift = ((state / 4294967296) * 2 - 1) * grain * 1.4;
      pixels.data[i] += shift;
      pixels.data[i + 1] += shift;
      pixels.data[i + 2] += shift;
    }
    context.putImageData(pixels, 0, 0);
  }

  /** The picture as it is sent; kept until it changes, as one picture is asked about many times. */
  dataUrl() {
    if (this.encoded?.version !== this.version) {
      const noisy = this.steps.some((step) => step.kind === "image" || step.grain);
      const url = noisy ? this.canvas.toDataURL("image/jpeg", 0.92) : this.canvas.toDataURL("image/png");
      this.encoded = { version: this.version, url };
    }
    return this.encoded.url;
  }
}
