// Owns one message and its answer in the conversation: text, beads, figures, problems. Hears events, opens no sockets.

import { Beads } from "./beads.js";
import { copyButton } from "./copying.js";
import { number, serversAccount, showFigures } from "./figures.js";
import { Found, hearThought } from "./found.js";
import { Prose } from "./markdown.js";
import { Gallery } from "./gallery.js";
import { Problem, isWorthRetrying, wordsFor } from "./problems.js";
import { Thinking } from "./thinking.js";

const LIMITS = {
  max_output_tokens: (tokens) => `Stopped at the limit of ${number(tokens, 0)} tokens; Settings can raise it.`,
  deadline: () => "Stopped at the server’s time limit.",
};

export class Exchange {
  /**
   * @param {{text: string, images?: string[], kind?: string, isText?: boolean}} asked
   * @param {{marks: () => import("./marks.js").Marks | null, again: () => void, edit: () => void, shorten: () => void, grown: () => void}} on
   */
  constructor(asked, on) {
    this.asked = asked;
    this.on = on;
    this.text = "";
    this.state = "waiting";
    this.code = "";
    this.frame = 0;
    this.root = document.getElementById("exchange").content.cloneNode(true).querySelector(".exchange");
    this.part = (name) => this.root.querySelector(`.${name}`);
    this.part("asked-text").textContent = asked.text;
    this.part("asked-text").hidden = Boolean(asked.isText); // it stands at the head of the answer
    this.gallery = new Gallery(this.part("asked-images"), asked.images ?? []);
    this.found = new Found(asked.kind ?? "query");
    this.thinking = new Thinking(this.part("thinking"));
    this.prose = asked.isText ? new BegunText(this.part("prose"), asked.text) : new Prose(this.part("prose"));
    this.problem = new Problem(this.part("problem-words"), this.part("retry"));
    this.part("retry").addEventListener("click", on.again);
    this.part("again").addEventListener("click", on.again);
    this.part("edit").addEventListener("click", on.edit);
    this.part("edit-problem").addEventListener("click", on.edit);
    this.part("shorten").addEventListener("click", on.shorten);
    this.part("tools").prepend(copyButton("Copy", "Copy this answer", () => (asked.isText ? asked.text + this.text : this.text)));
    this.begin();
  }

  get isRunning() { return this.state === "waiting" || this.state === "streaming"; }
  /** Whether later turns contain this exchange: only if it has an answer, or the start of one, in words. */
  get isTold() { return this.text.trim() !== "" && !this.found.isSpatial; }

  /** Waits for a first answer, or for another in place of what was there. */
  begin() {
    this.before = this.text;
    this.text = "";
    this.code = "";
    this.tokens = undefined;
    this.usage = null;
    this.prose.set("");
    this.thinking.clear();
    this.found = new Found(this.found.task);
    this.problem.clear();
    for (const name of ["problem", "note"]) this.part(name).hidden = true;
    for (const name of ["first", "rate", "tokens", "gap"]) this.part(`f-${name}`).textContent = "–";
    this.part("exchange-foot").classList.remove("told");
    this.beads?.close();
    this.part("beads").replaceChildren(document.createElement("canvas"));
    this.beads = new Beads(this.part("beads"));
    this.become("waiting");
  }

  /** One server event. Returns true when it was the last. */
  hear(event, at) {
    switch (event.type) {
      case "response.output_text.delta":
        if (this.found.task === "detect" || this.found.task === "point") return false; // the same as text; `degas.object` brought it
        this.beat(at);
        this.thinking.end(at);
        this.text += event.delta;
        return false;
      case "response.reasoning_text.delta":
        this.beat(at);
        this.thinking.add(event.delta, at);
        return false;
      case "degas.thought":
        this.beat(at);
        hearThought(event, at, this.thinking, this.found, this.on.marks());
        return false;
      case "degas.object":
        this.beat(at);
        this.found.add(event.object, this.on.marks());
        this.text = this.found.words();
        return false;
      case "degas.outline":
        this.beat(at);
        this.found.trace(event, this.on.marks());
        this.text = this.found.words();
        return false;
      case "response.completed":
      case "response.incomplete":
        this.finish(event.response);
        return true;
      case "response.failed": {
        const { error, degas } = event.response;
        this.fail(error?.type ?? "internal_error", error?.message, degas?.retry_after_s ?? 0);
        return true;
      }
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
    this.soon();
  }

  /** What it found, over a picture. */
  draw(marks) {
    this.found.draw(marks);
    this.thinking.drawn([...marks.overlay.querySelectorAll(".mark")].slice(this.found.objects.length));
  }

  /** Many tokens may come between two frames; the page is written once for all of them. */
  soon() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.write();
    });
  }

  write() {
    this.prose.set(this.text);
    showFigures(this.part, this.beads, this.tokens);
    this.on.grown();
  }

  finish(response) {
    const timing = response.degas ?? {};
    this.usage = response.usage ?? null;
    if (this.usage?.output_tokens) this.tokens = this.usage.output_tokens;
    if (timing.time_to_first_token_s) this.part("figures").title = serversAccount(timing);
    if (this.found.isSpatial) this.text = this.found.words();
    const reason = timing.finish_reason === "deadline" ? "deadline" : response.incomplete_details?.reason;
    this.settle(response.status === "cancelled" ? "stopped" : "done");
    if (LIMITS[reason]) this.note(LIMITS[reason](this.tokens ?? 0));
    else if (this.state === "done" && this.before && this.before === this.text) this.note("Word for word the same. With a temperature above 0, in Settings, it may differ.");
    else if (this.state === "done" && !this.text.trim()) this.note("The model ended without a word.");
  }

  fail(code, message, waitS) {
    this.code = code;
    this.settle("failed");
    const isTooLong = code === "context_length_exceeded" || code === "payload_too_large";
    this.part("problem").hidden = false;
    this.part("exchange-foot").classList.toggle("told", this.beads.times.length > 0);
    this.part("retry").hidden = !isWorthRetrying(code);
    this.part("edit-problem").hidden = isWorthRetrying(code);
    this.part("shorten").hidden = true;
    this.problem.fail(isTooLong ? "This is longer than the model can take in." : wordsFor(code, message), waitS);
    this.part("problem").title = message ?? "";
  }

  /** Says what can be done about a conversation that has become too long. */
  explainLength(contextTokens, hasEarlier) {
    const room = contextTokens ? `It can take in ${number(contextTokens, 0)} tokens, your messages and its answers together.` : "";
    this.problem.say(hasEarlier
      ? `This conversation has become longer than the model can take in. ${room}`
      : `Your message is longer than the model can take in. ${room}`);
    this.part("shorten").hidden = !hasEarlier;
    this.part("edit-problem").hidden = false; // the message alone may be too long: nobody here counts its tokens
  }

  note(text) {
    this.part("note").textContent = text;
    this.part("note").hidden = false;
  }

  settle(state) {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    this.become(state);
    this.thinking.end();
    this.beads.end();
    if (state === "stopped") this.note("Stopped.");
    this.write();
  }

  become(state) {
    this.state = state;
    this.root.dataset.state = state;
    this.part("answer").setAttribute("aria-busy", String(this.isRunning));
  }

  /** Only the last one can be asked again or changed. */
  setLast(isLast) {
    this.root.classList.toggle("last", isLast);
  }

  /** The exchange as the tab stores it, without its pictures, which are too large. */
  kept() {
    const { asked, text, state, code, tokens, usage, beads } = this;
    const numLost = (asked.images?.length ?? 0) + (asked.numLost ?? 0);
    const times = beads.times.map((at) => Math.round((at - beads.askedAt) * 10) / 10);
    const note = this.part("note").hidden ? "" : this.part("note").textContent;
    const thought = this.thinking.kept();
    return { asked: { text: asked.text, isText: asked.isText, kind: asked.kind, numLost }, text, state, code, tokens, usage, times, note, thought };
  }

  restore(kept) {
    const isCut = kept.state === "waiting" || kept.state === "streaming";
    Object.assign(this, { text: kept.text, tokens: kept.tokens, usage: kept.usage });
    this.thinking.restore(kept.thought);
    this.beads.restore(kept.times);
    this.become(isCut ? "stopped" : kept.state);
    this.write();
    if (kept.state === "failed") this.fail(kept.code, undefined, 0);
    else if (isCut) this.note("Stopped: the page was left.");
    else if (kept.note) this.note(kept.note);
    const { numLost = 0 } = kept.asked;
    this.part("asked-lost").hidden = !numLost;
    this.part("asked-lost").textContent = numLost === 1 ? "A picture went along; it was not kept." : `${numLost} pictures went along; they were not kept.`;
  }
}

/** A text and what the model adds to it, as they are: their spaces and marks may be a program's. */
class BegunText {
  /** @param {HTMLElement} root @param {string} beginning */
  constructor(root, beginning) {
    const begun = document.createElement("span");
    begun.className = "begun";
    begun.textContent = beginning;
    this.added = document.createTextNode("");
    root.append(begun, this.added);
    root.classList.add("plain");
  }

  set(text) {
    this.added.data = text;
  }
}
