// Owns the description's page: reads openapi.json and lists its routes, each with its fields, its answers and a box to try it.

import { make } from "./elements.js";
import { trial } from "./trial.js";

const HUGE = 2 ** 31 - 1; // a bound from here on is the number format's, and says nothing

const el = (id) => document.getElementById(id);
let described = null;

/** A text whose `marked` words are code. */
function words(text) {
  return text.split("`").map((part, i) => (i % 2 ? make("code", "", part) : part));
}

// ------------------------------------------------------------ schemas

const named = (schema) => described.components.schemas[schema.$ref.split("/").pop()];

/** What a schema refers to, without the null that every optional field may be. */
function plain(schema) {
  if (schema.$ref) return { ...named(schema), ref: schema.$ref };
  if (schema.anyOf) {
    const kinds = schema.anyOf.filter((kind) => kind.type !== "null");
    if (kinds.length === 1) return plain(kinds[0]);
    return { ...schema, anyOf: kinds };
  }
  return schema;
}

/** A schema in a few words. */
function kindOf(schema) {
  const is = plain(schema);
  if (is.enum) return is.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (is.anyOf) return [...new Set(is.anyOf.map(kindOf))].join(" | ");
  if (is.type === "array") return is.items ? `list of ${kindOf(is.items)}` : "list";
  if (is.ref) return is.title;
  if (is.type === "object") return is.additionalProperties?.type ? `object of ${is.additionalProperties.type}` : "object";
  return Array.isArray(is.type) ? is.type.join(" | ") : (is.type ?? "any JSON");
}

function boundsOf(schema) {
  const is = plain(schema);
  const told = [];
  const least = Math.abs(is.minimum) < HUGE ? is.minimum : undefined;
  const most = Math.abs(is.maximum) < HUGE ? is.maximum : undefined;
  if (least !== undefined && most !== undefined) told.push(`${least} to ${most}`);
  else if (least !== undefined) told.push(`at least ${least}`);
  else if (most !== undefined) told.push(`${is.exclusiveMinimum !== undefined ? `above ${is.exclusiveMinimum}, ` : ""}at most ${most}`);
  if (is.maxItems !== undefined) told.push(`at most ${is.maxItems}`);
  if (is.maxLength !== undefined) told.push(`at most ${is.maxLength} characters`);
  if (schema.default !== undefined) told.push(`${JSON.stringify(schema.default)} if left out`);
  return told.join("; ");
}

/** The objects that a field may hold: their schemas, by name. */
function inner(schema, found = new Map()) {
  const is = plain(schema);
  if (is.ref && is.properties) found.set(is.title, is);
  else if (is.items) inner(is.items, found);
  else for (const kind of is.anyOf ?? []) inner(kind, found);
  return found;
}

function fieldOf(name, schema, isNeeded, above) {
  const nested = [...inner(schema).values()].filter((one) => !above.includes(one.title));
  const bounds = boundsOf(schema);
  const told = make("div", "kind", kindOf(schema), bounds ? make("span", "bounds", `, ${bounds}`) : "");
  for (const one of nested) {
    const more = make("details", "", make("summary", "", one.title));
    // Built when it is opened: the whole tree at once would be thousands of elements.
    more.addEventListener("toggle", () => {
      if (more.children.length === 1) more.append(make("div", "nested", ...fieldsOf(one, [...above, one.title])));
    });
    told.append(more);
  }
  return make("div", "field", make("div", "name", name, isNeeded ? make("span", "needed", "needed") : ""), told);
}

/** The fields of an object: those that are used, then the names of those that are not. */
function fieldsOf(schema, above) {
  const all = Object.entries(schema.properties ?? {});
  const used = all.filter(([, told]) => !told["x-refused"] && !told["x-ignored"]);
  const needed = new Set(schema.required ?? []);
  used.sort(([a], [b]) => needed.has(b) - needed.has(a));
  const names = (mark) => all.filter(([, told]) => told[mark]).map(([name]) => name);
  const list = (label, mark) => (names(mark).length ? [make("p", "passed", `${label}: `, names(mark).join(", "))] : []);
  const fields = make("div", "fields", ...used.map(([name, told]) => fieldOf(name, told, needed.has(name), above)));
  return [fields, ...list("Accepted, and changes nothing", "x-ignored"), ...list("Refused", "x-refused")];
}

// ------------------------------------------------------------ operations

function answersOf(operation) {
  return Object.entries(operation.responses).map(([status, answer]) => {
    const told = make("div", "", ...words(answer.description));
    for (const [media, content] of Object.entries(answer.content ?? {})) {
      const event = content.schema?.properties?.data?.contentSchema;
      const shapes = [...inner(event ?? content.schema ?? {}).values()];
      if (status >= "400" || !shapes.length) continue;
      for (const shape of shapes) {
        const more = make("details", "", make("summary", "", `${shape.title}${event ? ", an event's data" : media.endsWith("ndjson") ? ", a line" : ""}`));
        more.addEventListener("toggle", () => {
          if (more.children.length === 1) more.append(make("div", "nested", ...fieldsOf(shape, [shape.title])));
        });
        told.append(more);
      }
    }
    const code = make("span", `status-code ${status < "400" ? "good" : "bad"}`, status);
    return make("div", "answer-line", code, told);
  });
}

function insideOf(method, path, operation) {
  const inside = make("div", "inside");
  if (operation.description) inside.append(make("p", "", ...words(operation.description)));
  const body = operation.requestBody?.content["application/json"];
  if (body) {
    const schema = plain(body.schema);
    inside.append(make("section", "", make("h3", "", "Body"), ...fieldsOf(schema, [schema.title])));
  }
  const parameters = operation.parameters ?? [];
  if (parameters.length) {
    const fields = parameters.map((one) => fieldOf(one.name, one.schema, one.required, []));
    inside.append(make("section", "", make("h3", "", "Parameters"), make("div", "fields", ...fields)));
  }
  inside.append(make("section", "", make("h3", "", "Answers"), ...answersOf(operation)));
  if (!operation["x-messages"] && !operation.deprecated) {
    const streams = Object.keys(operation.responses["200"]?.content ?? {}).length > 1;
    inside.append(trial({ method, path, body, streams, parameters, key: () => el("key").value }));
  }
  return inside;
}

function operationOf(method, path, operation) {
  const isSocket = Boolean(operation["x-messages"]);
  const shown = isSocket ? "WS" : method.toUpperCase();
  const kind = isSocket ? "socket" : method;
  const card = make("details", `operation${operation.deprecated ? " refused" : ""}`);
  card.id = operation.operationId;
  card.append(make("summary", "", make("span", `method ${kind}`, shown), make("span", "path", path), make("span", "what", operation.summary)));
  card.addEventListener("toggle", () => {
    if (card.open && card.children.length === 1) card.append(insideOf(method, path, operation));
  });
  const link = make("a", operation.deprecated ? "refused" : "", make("span", `method ${kind}`, shown), make("span", "route", path));
  link.href = `#${operation.operationId}`;
  return { card, link };
}

function openNamed() {
  const card = el(location.hash.slice(1));
  if (!card?.classList.contains("operation")) return;
  card.open = true;
  for (const link of el("routes").querySelectorAll("a")) {
    if (link.hash === location.hash) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
  card.scrollIntoView();
}

function show() {
  el("introduction").replaceChildren(...described.info.description.split("\n\n").map((text) => make("p", "", ...words(text))));
  const all = Object.entries(described.paths).flatMap(([path, item]) => Object.entries(item).map(([method, operation]) => ({ method, path, operation })));
  for (const tag of described.tags) {
    const made = all.filter(({ operation }) => operation.tags[0] === tag.name).map((one) => operationOf(one.method, one.path, one.operation));
    el("routes").append(make("h2", "", tag.name), ...made.map(({ link }) => link));
    el("operations").append(make("h2", "family", tag.name), make("p", "family-words", tag.description), ...made.map(({ card }) => card));
  }
  openNamed();
}

async function read() {
  const key = el("key").value;
  const answer = await fetch("openapi.json", key ? { headers: { Authorization: `Bearer ${key}` } } : {});
  if (answer.status === 401) {
    el("notice").textContent = key ? "That key was not accepted." : "This server answers only with a key. Give it above.";
    el("key").focus();
    return;
  }
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  const read = await answer.json();
  if (described) return; // asked twice: by the key's own event and by the form's
  described = read;
  el("notice").hidden = true;
  show();
}

function tryToRead() {
  if (described) return;
  read().catch((fault) => { el("notice").textContent = `openapi.json could not be read: ${fault.message}`; });
}

el("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  tryToRead();
});
el("key").addEventListener("change", tryToRead);
addEventListener("hashchange", openNamed);
tryToRead();
