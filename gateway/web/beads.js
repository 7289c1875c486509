// Owns the strip of beads under an answer: one bead a token, as wide as the time it took. Draws, decides nothing.

const TALLEST = 18;
const BUBBLE_FACTOR = 3;
const BUBBLE_LEAST_MS = 20;

export function median(values) {
  if (!values.length) return 0;
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

export class Beads {
  /** @param {HTMLElement} strip holds one canvas */
  constructor(strip) {
    this.strip = strip;
    this.canvas = strip.querySelector("canvas");
    this.times = [];
    this.askedAt = performance.now();
    this.running = true;
    this.usual = 0;
    this.frame = 0;
    this.observer = new ResizeObserver(() => this.soon());
    this.observer.observe(strip);
  }

  add(at) {
    this.times.push(at);
    this.soon();
  }

  /** Shows times that were kept: milliseconds since the question. */
  restore(times) {
    this.askedAt = 0;
    this.times = times;
    this.end();
  }

  end() {
    this.running = false;
    this.measure();
    this.strip.setAttribute("aria-label", this.words());
    this.soon();
  }

  /** Milliseconds between one token and the next; the wait for the first is not among them. */
  get gaps() {
    return this.times.slice(1).map((at, i) => at - this.times[i]);
  }

  /** The mean: tokens that arrive in one packet would make a median too small. */
  measure() {
    const { times } = this;
    this.usual = times.length > 1 ? (times.at(-1) - times[0]) / (times.length - 1) : 0;
  }

  isBubble(gap) {
    return gap > BUBBLE_LEAST_MS && gap > BUBBLE_FACTOR * this.usual;
  }

  words() {
    const { gaps } = this;
    if (!this.times.length) return "No tokens.";
    const first = `First token after ${Math.round(this.times[0] - this.askedAt)} ms`;
    if (!gaps.length) return `${first}.`;
    const bubbles = gaps.filter((gap) => this.isBubble(gap)).length;
    return `${first}; ${this.times.length} tokens, median gap ${median(gaps).toFixed(1)} ms, longest ${Math.max(...gaps).toFixed(1)} ms, ${bubbles} ${bubbles === 1 ? "bubble" : "bubbles"}.`;
  }

  /** Gives the strip up to another. */
  close() {
    this.running = false;
    this.observer.disconnect();
  }

  soon() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.paint();
      if (this.running) this.soon();
    });
  }

  paint() {
    const { canvas, strip } = this;
    const width = strip.clientWidth, height = strip.clientHeight;
    if (!width) return;
    const ratio = window.devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const style = getComputedStyle(strip);
    const [line, surface, wait, bubble, usual] = ["--line", "--surface", "--bead-wait", "--rose", "--verdigris"]
      .map((name) => style.getPropertyValue(name));
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const end = this.running ? performance.now() : this.times.at(-1) ?? this.askedAt;
    const scale = (width - 4) / Math.max(end - this.askedAt, 120);
    const middle = height / 2;
    this.measure();

    context.fillStyle = line;
    context.fillRect(0, middle - 0.5, width, 1);
    let previous = this.askedAt;
    this.times.forEach((at, i) => {
      const colour = i === 0 ? wait : this.isBubble(at - previous) ? bubble : usual;
      this.bead(context, 1 + (previous - this.askedAt) * scale, (at - previous) * scale, middle, colour, i === 0 ? surface : "");
      previous = at;
    });
    if (this.running) {
      const left = 1 + (previous - this.askedAt) * scale;
      this.bead(context, left, (end - previous) * scale, middle, wait, surface);
    }
  }

  /** One bead; hollow where there is a colour for its inside. */
  bead(context, left, wide, middle, colour, inside) {
    const breadth = Math.max(wide - 1, 1.6);
    const tall = Math.min(breadth, TALLEST);
    context.beginPath();
    context.roundRect(left + 0.5, middle - tall / 2, breadth, tall, tall / 2);
    if (inside) {
      context.fillStyle = inside;
      context.fill();
      context.strokeStyle = colour;
      context.lineWidth = 1.25;
      context.stroke();
    } else {
      context.fillStyle = colour;
      context.fill();
    }
  }
}
