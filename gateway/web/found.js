// Owns what a model found in a picture: objects, an outline, a thought's places. Told by events; draws on the marks it is given.

const f = (value) => value.toFixed(2);
const NOUNS = { detect: ["box", "boxes"], point: ["point", "points"] };

export class Found {
  /** @param {string} task */
  constructor(task) {
    this.task = task;
    this.objects = [];
    this.outline = null;
    this.places = []; // that a thought pointed at
  }

  get isSpatial() { return this.task in NOUNS || this.task === "segment"; }

  get isEmpty() { return !this.objects.length && !this.places.length && !this.outline; }

  draw(marks) {
    marks.show([...this.objects, ...this.places], this.outline);
  }

  /** One more object. */
  add(object, marks) {
    this.objects.push(object);
    marks?.draw(object);
  }

  /** The outline as far as it goes. */
  trace({ path, bbox }, marks) {
    this.outline = { path, bbox };
    marks?.outline(this.outline);
  }

  /** In words, for the answer's place. */
  words() {
    if (this.task === "segment") return this.outline?.path ? "Outlined" : "Nothing found.";
    const count = this.objects.length;
    return count ? `${count} ${NOUNS[this.task][count === 1 ? 0 : 1]}` : "Nothing found.";
  }

  /** Coordinates of the last object, to be read. */
  lastInWords() {
    const object = this.objects.at(-1);
    return "x_min" in object
      ? `${f(object.x_min)}, ${f(object.y_min)} – ${f(object.x_max)}, ${f(object.y_max)}`
      : `${f(object.x)}, ${f(object.y)}`;
  }
}

/** Tells a thought's event to the page's part for thoughts, and draws its places. @param {import("./thinking.js").Thinking} thinking */
export function hearThought(event, at, thinking, found, marks) {
  if (event.text) thinking.add(event.text, at);
  for (const [x, y] of event.points ?? []) {
    const place = { x, y };
    found.places.push(place);
    const mark = marks?.draw(place) ?? null;
    thinking.point(event.start, event.end, mark, at);
  }
}
