// Owns one thought on the page: a folded part that fills while it streams, with its tokens and its time, and the pieces of
// it that point. Hears texts and points, opens no sockets.

import { ms, number } from "./figures.js";
import { light } from "./marks.js";

const TICK_MS = 200;

export class Thinking {
  /** @param {HTMLDetailsElement} root `.thinking`, hidden until there is a thought */
  constructor(root) {
    this.root = root;
    this.words = root.querySelector(".thinking-words");
    this.count = root.querySelector(".thinking-count");
    this.body = root.querySelector(".thinking-text");
    this.timer = 0;
    root.addEventListener("toggle", () => this.follow());
    this.clear();
  }

  get isRunning() { return this.timer !== 0; }

  clear() {
    clearInterval(this.timer);
    this.timer = 0;
    this.text = "";
    this.tokens = 0;
    this.tookMs = 0;
    this.began = null;
    this.pieces = []; // {start, end, marks}: characters of the text and what they point at
    this.root.hidden = true;
    this.root.open = false;
    delete this.root.dataset.state;
    this.body.replaceChildren();
  }

  /** The next words of the thought, which arrived at this time. */
  add(text, at) {
    this.begin(at);
    this.tokens += 1;
    this.text += text;
    this.body.append(text);
    this.follow();
  }

  /** A place that characters [start, end) speak of. `mark`: what was drawn for it; null where its picture is not shown. */
  point(start, end, mark, at) {
    this.begin(at);
    this.tokens += 2; // x and y
    const last = this.pieces.at(-1);
    if (last?.start === start) {
      last.end = end;
      last.marks.push(mark);
    } else this.pieces.push({ start, end, marks: [mark] });
    this.write();
    this.light(this.pieces.at(-1)); // until the next piece points elsewhere
  }

  begin(at) {
    if (this.began !== null) return;
    this.began = at;
    this.root.hidden = false;
    this.root.dataset.state = "thinking";
    this.timer = setInterval(() => this.tell(), TICK_MS);
    this.tell();
  }

  /** The thought is over. */
  end(at = performance.now()) {
    if (!this.isRunning) return;
    clearInterval(this.timer);
    this.timer = 0;
    this.tookMs = at - this.began;
    this.root.dataset.state = "thought";
    this.write();
    this.tell();
    this.light(null);
  }

  /** Its places were drawn anew, in their order. */
  drawn(marks) {
    let from = 0;
    for (const piece of this.pieces) {
      const count = piece.marks.length;
      piece.marks = Array.from({ length: count }, (_, i) => marks[from + i] ?? null);
      from += count;
    }
  }

  /** Lights one piece's places; null: none. */
  light(piece) {
    const drawn = this.pieces.flatMap(({ marks }) => marks).find((mark) => mark?.isConnected);
    if (drawn) light(drawn.ownerSVGElement, piece?.marks ?? []);
  }

  tell() {
    const took = this.isRunning ? performance.now() - this.began : this.tookMs;
    const seconds = took < 1000 && !this.isRunning ? ms(took) : `${number(took / 1000, 1)} s`;
    this.words.textContent = this.isRunning ? "Thinking" : "Thought";
    this.count.textContent = `${number(this.tokens, 0)} ${this.tokens === 1 ? "token" : "tokens"}, ${seconds}`;
  }

  /** The text with its pointing pieces marked; pointing at one, or coming to it by Tab, lights its places. */
  write() {
    const parts = [];
    let from = 0;
    for (const piece of this.pieces) {
      if (piece.start < from) continue;
      parts.push(this.text.slice(from, piece.start), this.pointing(piece));
      from = piece.end;
    }
    this.body.replaceChildren(...parts, this.text.slice(from));
    this.follow();
  }

  pointing(piece) {
    const text = this.text.slice(piece.start, piece.end);
    const [, before, words, after] = /^(\s*)(.*?)(\s*)$/s.exec(text);
    const button = document.createElement("button");
    button.type = "button";
    button.className = "pointing";
    button.textContent = words || "here";
    for (const type of ["pointerenter", "focus", "click"]) button.addEventListener(type, () => this.light(piece));
    for (const type of ["pointerleave", "blur"]) button.addEventListener(type, () => this.light(null));
    const whole = document.createDocumentFragment();
    whole.append(before, button, after);
    return whole;
  }

  follow() {
    if (this.root.open && this.isRunning) this.body.scrollTop = this.body.scrollHeight;
  }

  kept() {
    return this.text ? { text: this.text, tokens: this.tokens, tookMs: Math.round(this.tookMs) } : undefined;
  }

  restore(kept) {
    if (!kept) return;
    Object.assign(this, kept);
    this.root.hidden = false;
    this.root.dataset.state = "thought";
    this.body.textContent = this.text;
    this.tell();
  }
}
