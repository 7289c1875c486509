// Owns the conversation with a model: its exchanges, what of them is sent, and what the tab keeps of them.

import { askAbout } from "./asking.js";
import { Composer } from "./composer.js";
import { Exchange } from "./exchange.js";
import { Following } from "./following.js";
import { number } from "./figures.js";
import { questionItem, sentPictures, turnsOf } from "./turns.js";
import { Settings } from "./settings.js";

const KEPT_UNDER = "degas.conversation";
const TOO_LONG = ["context_length_exceeded", "payload_too_large"];
const SPOKEN_CHARS = 1200;
const SUGGESTIONS = [
  "What is the capital of France?", "Write a haiku about rain.",
  "Explain tides to a child.", "Sort a list in Python",
];
const BEGINNINGS = ["The capital of France is", "Once upon a time", "The tides come and go because", "def is_prime(n):"];
const byId = (id) => document.getElementById(id);

export class Chat {
  /** @param {HTMLElement} root @param {{lanes, texts, moondream, drawing: () => string, onUnauthorized: (retry) => void, onFailure: () => void}} links */
  constructor(root, links) {
    this.root = root;
    this.links = links;
    this.exchanges = [];
    this.forgotten = 0; // this many of the oldest are no longer sent
    this.model = null;
    this.running = null;
    this.cleared = null;
    this.following = new Following(byId("to-end"), byId("dock"));
    this.settings = new Settings(() => this.keep());
    this.composer = new Composer({
      send: (asked, isEdit) => this.send(asked, isEdit),
      stop: () => this.running?.cancel(),
      editLast: () => this.editLast(),
      drawing: links.drawing,
      notice: (text) => this.notice(text),
    });
    byId("new-chat").addEventListener("click", () => this.clear());
    byId("chat-notice-undo").addEventListener("click", () => this.undoClear());
    byId("chat-notice-close").addEventListener("click", () => this.notice(""));
    addEventListener("pagehide", () => this.keep());
    this.restore();
  }

  get last() { return this.exchanges.at(-1); }

  show(isShown) {
    this.root.hidden = !isShown;
    this.followIfAny();
    if (!isShown) return;
    this.composer.fit();
    this.following.grown();
    if (!this.composer.isTouch) this.composer.field.focus({ preventScroll: true });
  }

  /** The greeting is read from its top. */
  followIfAny() {
    this.following.isShown = !this.root.hidden && this.exchanges.length > 0;
    this.following.showButton();
  }

  /** @param {boolean} canDraw whether the page has an easel for this model */
  serve(model, canDraw) {
    this.model = model;
    this.converses = model.capabilities.includes("chat");
    this.composer.serve(model, this.converses, canDraw && this.converses);
    this.settings.serve(model, this.converses);
    byId("chat-model").textContent = model.id;
    const asksAboutPictures = model.capabilities.includes("query");
    byId("chat-opening").textContent = !this.converses ? "Begin a text for" : asksAboutPictures ? "Show something to" : "Say something to";
    const about = model.description || "A language model on this server. Small ones are quick and often wrong: check what matters.";
    byId("chat-description").textContent = this.converses
      ? about
      : `${about} This one has no chat template, so it does not answer: it goes on with the text that you begin.`;
    byId("new-chat").textContent = this.converses ? "New chat" : "Clear";
    const starters = !this.converses ? BEGINNINGS : asksAboutPictures ? [] : SUGGESTIONS;
    byId("starters").replaceChildren(...starters.map((text) => this.starter(text)));
    if (!starters.length) byId("starters").append(...this.openers(canDraw));
    this.showContext();
  }

  /** Above the composer, while the server cannot answer. */
  tellServer(state, words) {
    const isFine = state === "ready";
    byId("chat-server").hidden = isFine;
    byId("chat-server").textContent = isFine ? "" : `${words}…`;
  }

  starter(text) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "chip";
    button.textContent = text;
    button.addEventListener("click", () => {
      if (this.send({ text }, false) && !this.composer.isTouch) this.composer.field.focus();
    });
    return button;
  }

  /** For a model that is asked about pictures: ways to give it one. */
  openers(canDraw) {
    return [["attach", "Choose pictures"], ...(canDraw ? [["attach-drawing", "Take the drawing"]] : [])].map(([id, words]) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "chip";
      button.textContent = words;
      button.addEventListener("click", () => byId(id).click());
      return button;
    });
  }

  // ---------------------------------------------------------------- asking

  /** Takes a message on; false where a setting is wrong or an answer is still coming. */
  send(asked, isEdit) {
    const body = this.settings.read();
    if (!body || this.running) return false;
    const { kind, images } = asked;
    if (kind && !images && !this.pictured(isEdit ? this.last : null)) {
      this.notice("There is no picture here to look in.");
      return false;
    }
    if (isEdit && this.last) this.drop(this.last);
    this.notice("");
    this.cleared = null;
    this.run(this.add(this.converses ? asked : { text: asked.text, isText: true }), body);
    this.following.toEnd();
    return true;
  }

  add(asked) {
    const exchange = new Exchange(asked, {
      again: () => this.again(exchange),
      edit: () => this.editLast(),
      shorten: () => this.shorten(exchange),
      grown: () => this.following.grown(),
      marks: () => this.marksFor(exchange),
    });
    exchange.root.addEventListener("pointerenter", () => this.showMarks(exchange));
    exchange.root.addEventListener("focusin", () => this.showMarks(exchange));
    this.last?.setLast(false);
    exchange.setLast(true);
    this.exchanges.push(exchange);
    byId("exchanges").append(exchange.root);
    this.followIfAny();
    byId("welcome").hidden = true;
    byId("new-chat").disabled = false;
    return exchange;
  }

  run(exchange, body) {
    this.composer.setRunning(true);
    this.say("");
    const hear = (event, at) => {
      if (exchange.hear(event, at)) this.ended(exchange);
    };
    this.running = this.ask(exchange, body, hear);
    this.composer.tellPictures(this.exchanges.some((one) => one.asked.images?.length));
    this.keep();
  }

  ask(exchange, body, hear) {
    const { kind, text, isText } = exchange.asked;
    if (isText) return this.links.texts.ask(this.textBody(exchange, body), hear);
    if (!kind) return this.links.lanes.ask({ model: this.model.id, input: this.inputFor(exchange), store: false, ...body }, hear);
    const image = this.pictured(null, exchange).asked.images.at(-1);
    this.marksFor(exchange)?.clear();
    return askAbout(this.links, this.model, { task: kind === "think" ? "query" : kind, thinks: kind === "think", text, image }, hear);
  }

  /** The last exchange with pictures, up to `until`; `but` is about to be replaced. */
  pictured(but, until = this.last) {
    const upTo = this.exchanges.slice(0, this.exchanges.indexOf(until) + 1);
    return upTo.findLast((one) => one !== but && one.asked.images?.length);
  }

  /** Where what this exchange finds is drawn: over the last picture up to it. */
  marksFor(exchange) {
    return this.pictured(null, exchange)?.gallery.marks.at(-1) ?? null;
  }

  /** Several answers may be about one picture: what one of them found is shown when the reader comes to it. */
  showMarks(exchange) {
    if (exchange.found.isEmpty) return;
    const marks = this.marksFor(exchange);
    if (marks && this.shown !== exchange) exchange.draw(marks);
    this.shown = exchange;
  }

  /** The request that goes on with a text: that text alone, whatever stands above it. */
  textBody(exchange, { instructions, max_output_tokens, ...sampling }) {
    const max_tokens = max_output_tokens ?? this.model.defaults?.max_tokens;
    return { model: this.model.id, prompt: exchange.asked.text, max_tokens, ...sampling };
  }

  ended(exchange) {
    this.running = null;
    this.composer.setRunning(false);
    if (!this.exchanges.includes(exchange)) return; // cleared meanwhile
    if (TOO_LONG.includes(exchange.code)) {
      exchange.explainLength(this.model.context_tokens, !exchange.asked.isText && this.exchanges.slice(this.forgotten).some((one) => one !== exchange && one.isTold));
    }
    if (exchange.state === "failed") this.links.onFailure();
    if (exchange.code === "unauthorized") this.links.onUnauthorized(() => this.again(exchange));
    const problem = exchange.part("problem-words").textContent;
    this.say(exchange.state === "failed" ? problem : exchange.part("prose").textContent || "No answer.");
    this.showContext();
    this.following.grown();
    this.keep();
  }

  /** The messages of a request; pictures that no longer go along are shown so. */
  inputFor(exchange) {
    const turns = turnsOf(this.exchanges.slice(this.forgotten), exchange);
    const counts = sentPictures(turns, this.model.max_images);
    turns.forEach(({ exchanges }, i) => {
      let left = counts[i];
      for (const one of exchanges.toReversed()) {
        const own = one.asked.images?.length ?? 0;
        one.gallery.sends(Math.min(own, left));
        left -= Math.min(own, left);
      }
    });
    return turns.flatMap((turn, i) => {
      const question = questionItem(turn.text, turn.images.slice(turn.images.length - counts[i]));
      return turn.answer === null ? [question] : [question, { role: "assistant", content: turn.answer }];
    });
  }

  again(exchange) {
    const body = this.settings.read();
    if (!body || this.running || exchange !== this.last) return;
    exchange.begin();
    this.run(exchange, body);
    this.following.toEnd();
    if (!this.composer.isTouch) this.composer.field.focus({ preventScroll: true });
  }

  editLast() {
    if (this.last && !this.running) this.composer.edit(this.last.asked);
  }

  /** Leaves the older half of what was sent out of what is sent from now on. */
  shorten(exchange) {
    const sent = this.exchanges.length - 1 - this.forgotten;
    this.forgotten += Math.max(1, Math.ceil(sent / 2));
    this.markForgotten();
    this.again(exchange);
  }

  markForgotten() {
    this.exchanges.forEach((one, i) => {
      one.root.classList.toggle("forgotten", i < this.forgotten);
      one.root.classList.toggle("first-told", i > 0 && i === this.forgotten);
    });
  }

  drop(exchange) {
    this.exchanges.pop();
    exchange.root.remove();
    this.forgotten = Math.min(this.forgotten, this.exchanges.length);
    this.last?.setLast(true);
  }

  // ---------------------------------------------------------------- clearing

  clear() {
    this.running?.cancel();
    this.cleared = { exchanges: this.exchanges, forgotten: this.forgotten };
    this.exchanges = [];
    this.forgotten = 0;
    this.showAll();
    this.notice("Conversation cleared.", true);
    this.composer.field.focus();
  }

  undoClear() {
    Object.assign(this, this.cleared);
    this.cleared = null;
    this.showAll();
    this.notice("");
    this.following.toEnd();
    this.composer.field.focus();
  }

  showAll() {
    byId("exchanges").replaceChildren(...this.exchanges.map((one) => one.root));
    this.followIfAny();
    byId("welcome").hidden = this.exchanges.length > 0;
    this.composer.tellPictures(this.exchanges.some((one) => one.asked.images?.length));
    byId("new-chat").disabled = this.exchanges.length === 0;
    this.showContext();
    this.keep();
  }

  notice(text, canUndo = false) {
    byId("chat-notice").hidden = !text;
    byId("chat-notice-words").textContent = text;
    byId("chat-notice-undo").hidden = !canUndo;
  }

  /** Announces a whole answer to a screen reader; word by word it could not be followed. */
  say(text) {
    byId("said").textContent = text.length > SPOKEN_CHARS ? `${text.slice(0, SPOKEN_CHARS)} … and more.` : text;
  }

  showContext() {
    const usage = this.last?.usage, room = this.model?.context_tokens;
    const used = usage ? (usage.input_tokens ?? 0) + (usage.output_tokens ?? 0) : 0;
    byId("context").hidden = !(used && room);
    byId("context-tokens").textContent = `${number(used, 0)} of ${number(room ?? 0, 0)} tokens`;
    byId("context-share").textContent = `${Math.ceil((100 * used) / (room || 1))} %`;
  }

  // ---------------------------------------------------------------- what the tab keeps

  keep() {
    const isEmpty = !this.exchanges.length && !Object.values(this.settings.kept()).some(Boolean);
    try {
      if (isEmpty) sessionStorage.removeItem(KEPT_UNDER);
      else {
        const exchanges = this.exchanges.map((one) => one.kept());
        sessionStorage.setItem(KEPT_UNDER, JSON.stringify({ exchanges, forgotten: this.forgotten, settings: this.settings.kept() }));
      }
    } catch {
      // Storage may be full or forbidden; the conversation then lasts as long as the page.
    }
  }

  restore() {
    try {
      const kept = JSON.parse(sessionStorage.getItem(KEPT_UNDER) ?? "null");
      if (!kept) return;
      this.settings.restore(kept.settings ?? {});
      for (const one of kept.exchanges) this.add(one.asked).restore(one);
      this.forgotten = kept.forgotten ?? 0;
      this.markForgotten();
    } catch {
      sessionStorage.removeItem(KEPT_UNDER);
    }
  }
}
