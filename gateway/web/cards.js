// Owns one question and its answer on the page: text, objects, figures, problems. Hears events, opens no sockets.

import { Beads } from "./beads.js";
import { serversAccount, showFigures } from "./figures.js";
import { Found, hearThought } from "./found.js";
import { Problem, wordsFor } from "./problems.js";
import { Thinking } from "./thinking.js";

const TASK_WORDS = { query: "Ask", caption: "Caption", detect: "Detect", point: "Point", segment: "Outline" };

const LENGTH_WORDS = { short: "in short", normal: "as a sentence", long: "at length" };

export class Card {
  /**
   * @param {{task: string, text: string, length: string, thinks: boolean}} asked
   * @param {{stop: () => void, again: () => void, pick: () => void}} on
   */
  constructor(asked, source, on) {
    this.asked = asked;
    this.version = source.version;
    this.found = new Found(asked.task);
    this.text = "";
    this.state = "waiting";
    const fragment = document.getElementById("card").content.cloneNode(true);
    this.root = fragment.querySelector(".card");
    this.part = (name) => this.root.querySelector(`.${name}`);
    this.part("card-task").textContent = TASK_WORDS[asked.task];
    this.part("card-question").textContent = asked.task === "caption" ? `The picture, ${LENGTH_WORDS[asked.length]}` : asked.text;
    this.part("stop").addEventListener("click", on.stop);
    this.part("again").addEventListener("click", on.again);
    this.root.addEventListener("click", on.pick);
    this.root.addEventListener("focus", on.pick);
    this.part("stop").setAttribute("aria-label", `Stop: ${this.title}`);
    this.part("again").setAttribute("aria-label", `Ask again: ${this.title}`);
    this.keepThumb(source.canvas);
    this.beads = new Beads(this.part("beads"));
    this.thinking = new Thinking(this.part("thinking"));
    this.problem = new Problem(this.part("problem"), this.part("again"));
  }

  get title() { return `${TASK_WORDS[this.asked.task]} ${this.part("card-question").textContent}`; }
  get finished() { return !["waiting", "streaming"].includes(this.state); }
  get isSpatial() { return this.found.isSpatial; }
  /** Whether something of it may be shown on the picture. */
  get canMark() { return this.isSpatial || this.asked.thinks; }

  keepThumb(canvas) {
    const thumb = this.part("thumb"), side = thumb.width;
    const scale = Math.max(side / canvas.width, side / canvas.height);
    const context = thumb.getContext("2d");
    const wide = canvas.width * scale, tall = canvas.height * scale;
    context.drawImage(canvas, (side - wide) / 2, (side - tall) / 2, wide, tall);
  }

  /** Draws what was found on the picture, and lets the thought's pieces light their places there. */
  draw(marks) {
    this.found.draw(marks);
    this.thinking.drawn([...marks.overlay.querySelectorAll(".mark")].slice(this.found.objects.length));
  }

  /** One server event. Returns true when it was the last. `marks`: where to draw, if this card's picture is shown. */
  hear(event, at, marks) {
    switch (event.type) {
      case "response.output_text.delta":
        if (this.isSpatial) return false; // the same box or point as text; `degas.object` brought it already
        this.beat(at);
        this.thinking.end(at);
        this.write(event.delta);
        return false;
      case "degas.object":
        this.beat(at);
        this.found.add(event.object, marks);
        this.list();
        return false;
      case "degas.outline":
        this.beat(at);
        this.found.trace(event, marks);
        this.part("answer").textContent = this.found.words();
        return false;
      case "degas.thought":
        this.beat(at);
        hearThought(event, at, this.thinking, this.found, marks);
        return false;
      case "response.completed":
      case "response.incomplete":
        this.finish(event.response);
        return true;
      case "response.failed":
        this.fail(event.response.error?.type ?? "internal_error", event.response.error?.message, event.response.degas?.retry_after_s ?? 0);
        return true;
      case "error":
        if (event.error.code === "cancelled") this.settle("stopped");
        else this.fail(event.error.code, event.error.message, Number(event.headers?.["retry-after"] ?? 0));
        return true;
      default:
        return false;
    }
  }

  beat(at) {
    if (this.state === "waiting") this.become("streaming");
    this.beads.add(at);
    this.showFigures();
  }

  write(text) {
    this.text += text;
    this.part("answer").append(text);
  }

  list() {
    const list = this.part("finds") ?? this.startFinds();
    const item = document.createElement("li");
    item.textContent = this.found.lastInWords();
    list.append(item);
    this.part("answer").textContent = this.found.words();
  }

  startFinds() {
    const list = document.createElement("ol");
    list.className = "finds";
    this.part("answer").after(list);
    return list;
  }

  finish(response) {
    const usage = response.usage ?? {}, timing = response.degas ?? {};
    if (this.isSpatial) this.part("answer").textContent = this.found.words();
    else if (!this.text && response.status !== "cancelled") this.part("answer").textContent = "No answer.";
    if (usage.output_tokens) this.tokens = usage.output_tokens;
    if (timing.time_to_first_token_s) this.part("figures").title = serversAccount(timing);
    const reason = timing.finish_reason === "deadline" ? "deadline" : response.incomplete_details?.reason;
    if (response.status === "cancelled") this.settle("stopped");
    else {
      this.settle("done");
      if (reason === "max_output_tokens") this.problem.say("Stopped at the token limit.");
      else if (reason === "deadline") this.problem.say("Stopped at the time limit.");
    }
  }

  fail(code, message, waitS) {
    this.code = code;
    this.settle("failed");
    this.problem.fail(code === "payload_too_large" ? "The picture is too large." : wordsFor(code, message), waitS);
  }

  settle(state) {
    this.become(state);
    this.thinking.end();
    this.beads.end();
    this.part("stop").hidden = true;
    this.part("again").hidden = false;
    this.part("answer").setAttribute("aria-busy", "false");
    if (state === "stopped") this.problem.say("Stopped.");
    this.showFigures();
  }

  become(state) {
    this.state = state;
    this.root.dataset.state = state;
  }

  showFigures() {
    // The first bead of a box or point is all of its tokens.
    const lead = this.asked.task === "detect" ? 3 : this.asked.task === "point" ? 2 : 1;
    showFigures(this.part, this.beads, this.tokens, lead);
  }
}
