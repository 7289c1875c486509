// Owns what is being written: the text, its pictures, what kind of answer, whether it replaces the last message. Sends nothing itself.

import { KINDS, kindsOf } from "./asking.js";
import { make } from "./elements.js";

const LONGEST_SIDE = 1024;
const byId = (id) => document.getElementById(id);

export class Composer {
  /** @param {{send: (asked: {text: string, images?: string[], kind?: string}, isEdit: boolean) => boolean, stop: () => void, editLast: () => void, drawing: () => string, notice: (text: string) => void}} on */
  constructor(on) {
    this.on = on;
    this.field = byId("message");
    this.mostImages = 0;
    this.images = [];
    this.isEditing = false;
    this.isRunning = false;
    // Touch keyboards have no Shift+Enter, so on them Enter breaks the line and only the button sends.
    this.isTouch = matchMedia("(hover: none) and (pointer: coarse)").matches;
    this.field.enterKeyHint = this.isTouch ? "enter" : "send";
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.field.addEventListener("keydown", (event) => this.type(event));
    this.field.addEventListener("input", () => this.fit());
    byId("chat-stop").addEventListener("click", () => {
      on.stop();
      this.field.focus();
    });
    byId("edit-cancel").addEventListener("click", () => this.endEdit());
    this.listenToPictures();
  }

  type(event) {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey && !this.isTouch) {
      event.preventDefault();
      this.send();
    } else if (event.key === "Escape" && this.isRunning) this.on.stop();
    else if (event.key === "Escape" && this.isEditing) this.endEdit();
    else if (event.key === "ArrowUp" && this.field.value === "" && !this.isRunning) {
      event.preventDefault();
      this.on.editLast();
    }
  }

  send() {
    const text = this.field.value.trim();
    if (!text || this.isRunning) return;
    const asked = { text };
    if (this.images.length) asked.images = this.images;
    if (this.kind !== "query") asked.kind = this.kind;
    if (!this.on.send(asked, this.isEditing)) return;
    this.field.value = "";
    this.attach([]);
    this.markEdit(false);
    this.fit();
    if (this.isTouch) this.field.blur(); // the keyboard would cover the answer
    else this.field.focus();
  }

  edit(asked) {
    this.draft = this.isEditing ? this.draft : this.field.value;
    this.field.value = asked.text;
    this.attach(asked.images ?? []);
    if (asked.kind) byId("answer-kind").value = asked.kind;
    this.markEdit(true);
    this.fit();
    this.field.focus();
    this.field.setSelectionRange(asked.text.length, asked.text.length);
  }

  endEdit() {
    this.field.value = this.draft ?? "";
    this.attach([]);
    this.markEdit(false);
    this.fit();
    this.field.focus();
  }

  markEdit(isEditing) {
    this.isEditing = isEditing;
    byId("editing").hidden = !isEditing;
    if (!isEditing) this.draft = "";
  }

  setRunning(isRunning) {
    const hadFocus = document.activeElement === byId("chat-stop") || document.activeElement === byId("chat-send");
    this.isRunning = isRunning;
    byId("chat-send").hidden = isRunning;
    byId("chat-stop").hidden = !isRunning;
    if (hadFocus && !this.isTouch) this.field.focus();
  }

  /** As tall as its text, up to what the style allows. */
  fit() {
    this.field.style.height = "auto";
    this.field.style.height = `${this.field.scrollHeight}px`;
  }

  // ---------------------------------------------------------------- pictures

  serve(model, converses, canDraw) {
    this.mostImages = converses && model.takes_images ? model.max_images : 0;
    this.field.placeholder = converses ? `Write to ${model.id}` : `Begin a text; ${model.id} goes on with it`;
    byId("chat-send").textContent = converses ? "Send" : "Go on";
    byId("attach").hidden = !this.mostImages;
    byId("attach").textContent = this.mostImages > 1 ? "Pictures" : "Picture";
    byId("attach-file").multiple = this.mostImages > 1;
    byId("attach-drawing").hidden = !canDraw;
    const kinds = converses ? kindsOf(model) : [];
    byId("answer-kind").replaceChildren(...kinds.map((kind) => new Option(KINDS[kind], kind)));
    this.attach(this.images.slice(0, this.mostImages));
  }

  /** What is to come back: a key of `KINDS`. */
  get kind() { return byId("answer-kind-line").hidden ? "query" : byId("answer-kind").value; }

  /** Boxes and the like need a picture to be in. */
  offerKinds() {
    const isOffered = byId("answer-kind").options.length > 0 && (this.images.length > 0 || this.hasEarlier);
    byId("answer-kind-line").hidden = !isOffered;
  }

  /** @param {boolean} hasEarlier whether the conversation holds a picture */
  tellPictures(hasEarlier) {
    this.hasEarlier = hasEarlier;
    this.offerKinds();
  }

  attach(images) {
    this.images = images;
    byId("attached").hidden = !images.length;
    byId("attached").replaceChildren(...images.map((url, i) => this.thumb(url, i)));
    byId("attach").disabled = byId("attach-drawing").disabled = images.length >= this.mostImages;
    this.offerKinds();
  }

  thumb(url, i) {
    const which = this.images.length > 1 ? `picture ${i + 1}` : "the picture";
    const image = make("img");
    image.src = url;
    image.alt = this.images.length > 1 ? `Picture ${i + 1} that goes along` : "The picture that goes along";
    const remove = make("button", "attached-remove", "×");
    remove.type = "button";
    remove.title = "Remove";
    remove.setAttribute("aria-label", `Remove ${which}`);
    remove.addEventListener("click", () => {
      this.attach(this.images.filter((_, other) => other !== i));
      this.field.focus();
    });
    return make("li", "", image, remove);
  }

  /** Takes pictures on, as many as the model does. @param {Iterable<File>} files */
  async take(files) {
    if (!this.mostImages) {
      this.on.notice("This model reads text only; it was not given the picture.");
      return;
    }
    const before = this.images.length;
    const read = await Promise.allSettled([...files].map(pictureUrl));
    const urls = read.filter(({ status }) => status === "fulfilled").map(({ value }) => value);
    const room = this.mostImages - before;
    this.attach([...this.images, ...urls.slice(0, room)]);
    if (urls.length > room) this.on.notice(`This model takes at most ${this.mostImages} ${this.mostImages === 1 ? "picture" : "pictures"}.`);
    else if (urls.length < read.length) this.on.notice(read.length === 1 ? "That file is not a picture this browser can read." : "Not all of those files are pictures this browser can read.");
    if (this.images.length > before) this.field.focus();
  }

  listenToPictures() {
    byId("attach").addEventListener("click", () => byId("attach-file").click());
    byId("attach-file").addEventListener("change", ({ target }) => {
      const files = [...target.files]; // emptied with the field
      target.value = "";
      if (files.length) this.take(files);
    });
    byId("attach-drawing").addEventListener("click", () => {
      this.attach([...this.images, this.on.drawing()]);
      this.field.focus();
    });
    const isShown = () => !byId("chat-view").hidden;
    this.field.addEventListener("paste", (event) => {
      const files = [...(event.clipboardData?.files ?? [])].filter((one) => one.type.startsWith("image/"));
      if (files.length) this.take(files);
    });
    const carriesFile = (event) => isShown() && event.dataTransfer?.types.includes("Files");
    document.addEventListener("dragover", (event) => { if (carriesFile(event)) event.preventDefault(); });
    document.addEventListener("drop", (event) => {
      if (!carriesFile(event)) return;
      event.preventDefault(); // the browser would leave the page for the file
      this.take(event.dataTransfer.files);
    });
  }
}

/** A picture file as a data URL, no larger than the model looks at. Throws where it is no picture. */
async function pictureUrl(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#ffffff"; // what is transparent would turn black
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.92);
}
