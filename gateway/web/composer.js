// Owns what is being written: the text, its picture, whether it replaces the last message. Sends nothing itself.

const LONGEST_SIDE = 1024;
const byId = (id) => document.getElementById(id);

export class Composer {
  /** @param {{send: (asked: {text: string, image?: string}, isEdit: boolean) => boolean, stop: () => void, editLast: () => void, notice: (text: string) => void}} on */
  constructor(on) {
    this.on = on;
    this.field = byId("message");
    this.takesImages = false;
    this.image = "";
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
    const asked = this.image ? { text, image: this.image } : { text };
    if (!this.on.send(asked, this.isEditing)) return;
    this.field.value = "";
    this.attach("");
    this.markEdit(false);
    this.fit();
    if (this.isTouch) this.field.blur(); // the keyboard would cover the answer
    else this.field.focus();
  }

  edit(asked) {
    this.draft = this.isEditing ? this.draft : this.field.value;
    this.field.value = asked.text;
    this.attach(asked.image ?? "");
    this.markEdit(true);
    this.fit();
    this.field.focus();
    this.field.setSelectionRange(asked.text.length, asked.text.length);
  }

  endEdit() {
    this.field.value = this.draft ?? "";
    this.attach("");
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

  serve(model, converses) {
    this.takesImages = converses && Boolean(model.takes_images);
    this.field.placeholder = converses ? `Write to ${model.id}` : `Begin a text; ${model.id} goes on with it`;
    byId("chat-send").textContent = converses ? "Send" : "Go on";
    byId("attach").hidden = !this.takesImages;
    if (!this.takesImages) this.attach("");
  }

  attach(url) {
    this.image = url;
    byId("attached").hidden = !url;
    if (url) byId("attached-image").src = url;
    else byId("attached-image").removeAttribute("src");
  }

  async take(file) {
    if (!this.takesImages) {
      this.on.notice("This model reads text only; it was not given the picture.");
      return;
    }
    try {
      this.attach(await pictureUrl(file));
      this.field.focus();
    } catch {
      this.on.notice("That file is not a picture this browser can read.");
    }
  }

  listenToPictures() {
    byId("attach").addEventListener("click", () => byId("attach-file").click());
    byId("attach-file").addEventListener("change", ({ target }) => {
      if (target.files.length) this.take(target.files[0]);
      target.value = "";
    });
    byId("attached-remove").addEventListener("click", () => {
      this.attach("");
      this.field.focus();
    });
    const isShown = () => !byId("chat-view").hidden;
    this.field.addEventListener("paste", (event) => {
      const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
      if (file) this.take(file);
    });
    const carriesFile = (event) => isShown() && event.dataTransfer?.types.includes("Files");
    document.addEventListener("dragover", (event) => { if (carriesFile(event)) event.preventDefault(); });
    document.addEventListener("drop", (event) => {
      if (!carriesFile(event)) return;
      event.preventDefault(); // the browser would leave the page for the file
      this.take(event.dataTransfer.files[0]);
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
