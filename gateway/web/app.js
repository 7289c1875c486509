// Owns the page: connects the server's state, the key and the views. Which view is shown follows what the model can do.

import { Chat } from "./chat.js";
import { Lanes } from "./lanes.js";
import { Moondream } from "./moondream.js";
import { Server } from "./server.js";
import { Texts } from "./texts.js";
import { currentPicture, serveStudio, showStudio, startStudio } from "./studio.js";

const byId = (id) => document.getElementById(id);
const PICTURE_TASKS = ["query", "caption", "detect", "point", "segment"];
const TAGLINES = {
  chat: "Words in, words out, no\u00a0bubbles in between.",
  studio: "Pictures in, words out, no\u00a0bubbles in between.",
};

const socketUrl = new URL("v1/responses", location.href);
socketUrl.protocol = socketUrl.protocol.replace("http", "ws");
socketUrl.hash = socketUrl.search = "";

const lanes = new Lanes(socketUrl.href);
const server = new Server(() => lanes.key);
const keyNow = () => lanes.key;
const links = {
  lanes, texts: new Texts(keyNow), moondream: new Moondream(keyNow), drawing: currentPicture,
  onUnauthorized: askForKey, onFailure: () => server.pollSoon(),
};
const chat = new Chat(byId("chat-view"), links);
let served = null, wanted = null; // the view that the reader chose

// ---------------------------------------------------------------- views

/** Where a model can be used on this page, the likeliest first: one that answers questions on pictures begins at the easel. */
function viewsOf(model) {
  const can = (task) => model.capabilities.includes(task);
  const views = [];
  if (can("chat") || can("completions")) views.push("chat");
  if (model.takes_images && PICTURE_TASKS.some(can)) views.push("studio");
  return can("query") ? views.reverse() : views;
}

function showView(view) {
  byId("foyer").hidden = view !== null;
  showStudio(view === "studio");
  chat.show(view === "chat");
  document.body.dataset.view = view ?? "none";
  byId("tagline").textContent = TAGLINES[view] ?? "No\u00a0bubbles in between.";
  byId("skip").href = view === "chat" ? "#message" : "#question";
  byId("skip").textContent = view === "chat" ? "Skip to your message" : "Skip to the question";
}

function serve(model) {
  const isSame = served && JSON.stringify(served) === JSON.stringify(model);
  served = model;
  if (isSame) return;
  document.title = `Degas · ${model.id}`;
  const views = viewsOf(model);
  byId("views").hidden = views.length < 2;
  if (views.includes("studio")) serveStudio(model);
  if (views.includes("chat")) chat.serve(model, views.includes("studio"));
  const view = views.includes(wanted) ? wanted : views[0] ?? null;
  if (view) document.querySelector(`input[name="view"][value="${view}"]`).checked = true;
  else foyer("Nothing to show here", `${model.id} neither writes nor looks at pictures. Programs can use it through the API.`);
  showView(view);
}

function showModels(models) {
  const choice = byId("model-choice");
  const ids = models.map((model) => model.id);
  const current = ids.includes(served?.id) ? served.id : ids[0];
  choice.hidden = models.length < 2;
  byId("model-name").hidden = models.length > 1;
  byId("model-name").textContent = byId("model-name").title = current;
  choice.replaceChildren(...ids.map((id) => new Option(id, id, false, id === current)));
  serve(models[ids.indexOf(current)]);
}

function foyer(title, words, action) {
  byId("foyer-title").textContent = title;
  byId("foyer-words").textContent = words;
  byId("foyer-key").hidden = action !== "key";
}

server.addEventListener("models", ({ models }) => showModels(models));
server.addEventListener("state", ({ state, words }) => {
  byId("status").dataset.state = state;
  if (byId("status-text").textContent !== words) byId("status-text").textContent = words;
  chat.tellServer(state, words);
  if (served) return;
  if (state === "waiting") foyer("The model is being loaded", "This page opens as soon as it can answer.");
  else if (state === "offline") foyer("The server cannot be reached", "This page keeps trying.");
});
byId("model-choice").addEventListener("change", ({ target }) => serve(server.models.find((model) => model.id === target.value)));
byId("views").addEventListener("change", ({ target }) => {
  wanted = target.value;
  showView(wanted);
});

// ---------------------------------------------------------------- the key

const waiting = []; // what to do again once there is a key
let isTried = false, isDeclined = false;

function askForKey(retry) {
  const dialog = byId("key-dialog");
  byId("key-error").hidden = !isTried;
  if (retry) waiting.push(retry);
  if (!dialog.open) dialog.showModal();
}

server.addEventListener("locked", () => {
  if (!served) foyer("This server wants a key", "It answers only with an API key.", "key");
  if (!isDeclined) askForKey();
});
byId("foyer-key").addEventListener("click", () => askForKey());
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
byId("key-dialog").addEventListener("close", () => { isDeclined = !lanes.key; });
byId("key-form").addEventListener("submit", async () => {
  isTried = true;
  lanes.useKey(byId("key").value);
  byId("key").value = "";
  await server.poll();
  waiting.splice(0).forEach((retry) => retry());
});

startStudio(links);
showView(null);
server.pollSoon(0);
