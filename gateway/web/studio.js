// Owns the studio: a picture to draw or open, questions about it, and the cards of their answers.

import { askAbout, canThink } from "./asking.js";
import { Card } from "./cards.js";
import { Easel } from "./easel.js";
import { Marks } from "./marks.js";
import { COLOURS, Picture, SHAPES, SIZES, shapePath } from "./picture.js";

const SVG = "http://www.w3.org/2000/svg";
const MOST_CARDS = 40;
const byId = (id) => document.getElementById(id);

const picture = new Picture(byId("picture"), onPictureChange);
const easel = new Easel(picture, byId("marks"));
const marks = new Marks(byId("marks"), () => picture);
const cards = [];
let active = null;
let model = null;
let isShown = false;
let links = null; // {lanes, moondream, onUnauthorized(retry), onFailure()}

/** Starts the studio, hidden until `show`. */
export function startStudio(connections) {
  links = connections;
  buildTools();
  listenToPicture();
  listenToQuestions();
  picture.surprise();
}

/** Shows or hides the studio; it takes pasted and dropped pictures only while it is shown. */
export function showStudio(visible) {
  isShown = visible;
  byId("studio-view").hidden = !visible;
}

/** Offers what this model can do. */
export function serveStudio(served) {
  model = served;
  for (const input of document.querySelectorAll('input[name="task"]')) {
    const isOffered = model.capabilities.includes(input.value);
    input.closest("label").hidden = !isOffered;
    if (!isOffered) input.checked = false;
  }
  if (!document.querySelector('input[name="task"]:checked')) {
    const first = [...document.querySelectorAll('input[name="task"]')].find((input) => model.capabilities.includes(input.value));
    first.checked = true;
  }
  const isPocket = model.id === "pocket";
  for (const part of document.querySelectorAll("[data-pocket]")) part.hidden = !isPocket;
  byId("model-description").textContent = model.description
    || `${model.id} looks at pictures. Models of its size are quick and sometimes wrong: check what matters.`;
  showTask();
}

/** The picture as it would be sent now. */
export const currentPicture = () => picture.dataUrl();

// ---------------------------------------------------------------- tools

function svgIcon(path) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const shape = document.createElementNS(SVG, "path");
  shape.setAttribute("d", path);
  svg.append(shape);
  return svg;
}

function addTool(row, group, value, label, fill) {
  const holder = document.createElement("label");
  holder.className = `tool tool-${group}`;
  holder.title = label;
  const input = document.createElement("input");
  input.type = "radio";
  input.name = group;
  input.value = value;
  input.setAttribute("aria-label", label);
  const face = document.createElement("span");
  face.className = "face";
  if (typeof fill === "string") face.style.setProperty("--swatch", fill);
  else face.append(fill);
  holder.append(input, face);
  byId(row).append(holder);
  input.addEventListener("change", () => { easel[group === "shape" ? "tool" : group] = value; });
  input.checked = easel[group === "shape" ? "tool" : group] === value;
}

const circlePath = (r) => `M${12 - r} 12A${r} ${r} 0 1 0 ${12 + r} 12A${r} ${r} 0 1 0 ${12 - r} 12Z`;

function buildTools() {
  for (const shape of SHAPES) {
    addTool("shapes", "shape", shape, shape, svgIcon(shape === "circle" ? circlePath(8) : shapePath(shape, 12, 12, 8.5)));
  }
  const brush = svgIcon("M3.5 17.5C7 9.5 9.5 7 11.5 8.5C13.5 10 9 15.5 11.5 16.5C14 17.5 17 12 20.5 8");
  brush.classList.add("line");
  addTool("shapes", "shape", "brush", "freehand", brush);
  for (const [name, hex] of Object.entries(COLOURS)) addTool("colours", "colour", name, name, hex);
  Object.keys(SIZES).forEach((size, i) => addTool("sizes", "size", size, size, svgIcon(circlePath(3 + i * 2.6))));
}

// ---------------------------------------------------------------- picture

function onPictureChange() {
  const { width, height } = picture;
  byId("marks").setAttribute("viewBox", `0 0 ${width} ${height}`);
  byId("frame").style.setProperty("--aspect", `${width} / ${height}`);
  byId("frame").style.setProperty("--ratio", String(width / height));
  byId("undo").disabled = picture.isEmpty;
  showMarks();
  showSuggestions();
}

async function openPicture(blob) {
  try {
    await picture.load(blob);
    notice("");
  } catch {
    notice("That file is not a picture this browser can read.");
  }
}

function listenToPicture() {
  const frame = byId("frame");
  byId("surprise").addEventListener("click", () => picture.surprise());
  byId("undo").addEventListener("click", () => picture.undo());
  byId("clear").addEventListener("click", () => picture.clear());
  byId("open").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", (event) => {
    if (event.target.files.length) openPicture(event.target.files[0]);
    event.target.value = "";
  });
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
    if (isShown && file) openPicture(file);
  });
  for (const type of ["dragover", "dragenter"]) {
    document.addEventListener(type, (event) => {
      if (!isShown) return;
      event.preventDefault();
      frame.classList.add("dropping");
    });
  }
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) frame.classList.remove("dropping"); });
  document.addEventListener("drop", (event) => {
    if (!isShown) return;
    event.preventDefault();
    frame.classList.remove("dropping");
    const file = event.dataTransfer?.files[0];
    if (file) openPicture(file);
  });
  document.addEventListener("keydown", (event) => {
    if (!isShown) return;
    const typing = event.target instanceof HTMLInputElement && event.target.type === "text";
    if ((event.ctrlKey || event.metaKey) && event.key === "z" && !typing) {
      event.preventDefault();
      picture.undo();
    }
  });
}

// ---------------------------------------------------------------- marks on the picture

/** What the picked card found, over the picture it was asked about. */
function showMarks() {
  marks.clear();
  if (active && active.version === picture.version) active.draw(marks);
}

function pick(card) {
  if (active === card) return;
  active?.root.classList.remove("active");
  active = card;
  card?.root.classList.toggle("active", card.canMark);
  showMarks();
}

// ---------------------------------------------------------------- questions

const currentTask = () => document.querySelector('input[name="task"]:checked').value;

function showTask() {
  const task = currentTask();
  const words = {
    query: ["Your question", "How many shapes are there?", "Ask"],
    caption: ["", "", "Caption"],
    detect: ["What to box", "red circle", "Detect"],
    point: ["What to point at", "blue star", "Point"],
    segment: ["What to outline", "red circle", "Outline"],
  }[task];
  byId("question").hidden = task === "caption";
  byId("lengths").hidden = task !== "caption";
  byId("think-first").hidden = task !== "query" || !canThink(model);
  byId("question-label").textContent = words[0] || "Your question";
  byId("question").placeholder = words[1];
  byId("send").textContent = words[2];
  showSuggestions();
}

const withArticle = (name) => (/^[aeiou]/.test(name) ? `an ${name}` : `a ${name}`);

function suggestions() {
  const names = [...new Set(picture.names)];
  const shapes = names.map((name) => name.split(" ")[1]);
  const [some = "red circle", other = "blue star"] = names;
  const lone = shapes.find((shape) => shapes.filter((one) => one === shape).length === 1) ?? some.split(" ")[1];
  const task = currentTask();
  if (task === "caption") return [];
  if (picture.isPhoto) return task === "query" ? ["What is in the picture?", "What is in the background?", "Is there any writing?"] : [];
  if (task !== "query") return ["shapes", ...(names.length ? names.slice(0, 4) : ["red circle", "blue star", "triangles"])];
  return [
    "What is in the picture?", "How many shapes are there?", `Where is the ${some}?`,
    `Is there ${withArticle(other)}?`, `What color is the ${lone}?`, "What is the largest shape?",
  ];
}

function showSuggestions() {
  const holder = byId("suggestions");
  const task = currentTask();
  const list = suggestions();
  holder.replaceChildren(...list.map((text) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "chip";
    button.textContent = text;
    button.addEventListener("click", () => ask({ task, text }));
    return button;
  }));
  if (list.length > 1 && task === "query") {
    const all = document.createElement("button");
    all.type = "button";
    all.className = "chip all";
    all.textContent = "All at once";
    all.addEventListener("click", () => suggestions().reverse().forEach((text) => ask({ task: "query", text })));
    holder.append(all);
  }
}

function ask(asked) {
  const length = document.querySelector('input[name="length"]:checked').value;
  const thinks = asked.task === "query" && canThink(model) && byId("think").checked;
  pose({ length, thinks, image: picture.dataUrl(), ...asked }, { canvas: picture.canvas, version: picture.version });
}

/** Asks about a picture as it was when `source` was taken. */
function pose(whole, source) {
  let running = null;
  const card = new Card(whole, source, {
    stop: () => running?.cancel(),
    again: () => {
      remove(card);
      pose(whole, { canvas: card.part("thumb"), version: card.version });
    },
    pick: () => pick(card),
  });
  show(card);
  running = run(card, whole);
}

function run(card, whole) {
  return askAbout(links, model, whole, (event, at) => {
    const isShown = active === card && card.version === picture.version;
    const last = card.hear(event, at, isShown ? marks : null);
    if (last && card.code === "unauthorized") links.onUnauthorized(() => card.part("again").click());
    if (last && card.state === "failed") links.onFailure();
  });
}

function show(card) {
  cards.unshift(card);
  byId("answers").prepend(card.root);
  pick(card);
  while (cards.length > MOST_CARDS && cards.at(-1).finished) remove(cards.at(-1));
}

function remove(card) {
  cards.splice(cards.indexOf(card), 1);
  card.root.remove();
  if (active === card) pick(null);
}

function listenToQuestions() {
  byId("tasks").addEventListener("change", showTask);
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const task = currentTask(), field = byId("question");
    const text = field.value.trim() || field.placeholder;
    ask({ task, text });
    field.value = "";
  });
}

function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}
