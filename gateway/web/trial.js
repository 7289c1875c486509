// Owns the box in which one route is tried: a body, the curl line that sends it, and what comes back as it comes.

import { copyButton } from "./copying.js";
import { make } from "./elements.js";

const MOST_SHOWN = 200_000; // characters of an answer; a longer one is cut
let served = null; // the first model's name, asked for once

async function firstModel(key) {
  served ??= (async () => {
    const answer = await fetch("v1/models", { headers: headersOf(key, false) });
    return (await answer.json()).data?.[0]?.id ?? "MODEL";
  })().catch(() => "MODEL");
  return served;
}

function headersOf(key, hasBody) {
  return { ...(hasBody ? { "Content-Type": "application/json" } : {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** The box. `body` is the document's, with an example, or undefined; `streams`: its answer may; `key()` is the key that the reader gave. */
export function trial({ method, path, body, streams, parameters, key }) {
  const box = make("section", "try", make("h3", "", "Try it"));
  const fields = parameters.map((one) => {
    const input = make("input");
    input.type = "text";
    input.value = one.schema.default ?? "";
    input.placeholder = one.name;
    input.setAttribute("aria-label", one.name);
    return { one, input };
  });
  const text = body ? make("textarea") : null;
  if (text) {
    text.value = JSON.stringify(body.example ?? {}, null, 2);
    text.rows = Math.min(16, text.value.split("\n").length + 1);
    text.spellcheck = false;
    text.setAttribute("aria-label", "Body, as JSON");
  }
  const send = make("button", "button strong", "Send");
  const took = make("span", "took");
  const curl = make("pre", "curl");
  const output = make("pre");
  send.type = "button";
  output.hidden = true;
  output.setAttribute("aria-live", "polite");

  const target = () => {
    let to = path;
    const query = new URLSearchParams();
    for (const { one, input } of fields) {
      if (one.in === "path") to = to.replace(`{${one.name}}`, encodeURIComponent(input.value || one.name).replaceAll("%2F", "/"));
      else if (input.value !== "") query.set(one.name, input.value);
    }
    return new URL(`${to.slice(1)}${query.size ? `?${query}` : ""}`, document.baseURI);
  };

  const line = () => {
    const parts = ["curl", ...(text ? ["-N"] : method === "get" ? [] : ["-X", method.toUpperCase()]), quoted(target().href)];
    if (key()) parts.push("-H", '"Authorization: Bearer $KEY"'); // the key itself stays out of what people paste
    if (text) {
      let data = text.value;
      try { data = JSON.stringify(JSON.parse(data)); } catch { /* sent as it is */ }
      parts.push("-H", quoted("Content-Type: application/json"), "-d", quoted(data));
    }
    curl.textContent = parts.join(" ");
  };

  const show = async () => {
    output.hidden = false;
    output.textContent = "";
    send.disabled = true;
    took.textContent = "Waiting";
    const began = performance.now();
    try {
      const answer = await fetch(target(), { method: method.toUpperCase(), headers: headersOf(key(), Boolean(text)), body: text?.value });
      const isWhole = (answer.headers.get("Content-Type") ?? "").includes("application/json");
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let said = "";
      for (let piece = await reader.read(); !piece.done && said.length < MOST_SHOWN; piece = await reader.read()) {
        said += piece.value;
        if (!isWhole) output.textContent = said;
      }
      output.textContent = isWhole ? pretty(said) : said.slice(0, MOST_SHOWN);
      took.textContent = `${answer.status}, ${Math.round(performance.now() - began)} ms`;
    } catch (fault) {
      took.textContent = `Nothing came: ${fault.message}`;
    } finally {
      send.disabled = false;
    }
  };

  for (const input of [text, ...fields.map(({ input }) => input)]) input?.addEventListener("input", line);
  send.addEventListener("click", show);
  box.append(...fields.map(({ input }) => input), ...(text ? [text] : []));
  const row = make("div", "try-row", send, took, make("span", "grows"));
  if (streams) row.append(switchOf(text, line));
  row.append(copyButton("Copy curl", "Copy the curl line", () => curl.textContent));
  box.append(row, curl, output);
  line();
  if (text && text.value.includes('"MODEL"')) {
    firstModel(key()).then((name) => {
      text.value = text.value.replaceAll('"MODEL"', JSON.stringify(name));
      line();
    });
  }
  return box;
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2).slice(0, MOST_SHOWN);
  } catch {
    return text.slice(0, MOST_SHOWN);
  }
}

/** A box to tick: the answer streams. */
function switchOf(text, changed) {
  const box = make("input");
  box.type = "checkbox";
  box.addEventListener("change", () => {
    try {
      text.value = JSON.stringify({ ...JSON.parse(text.value), stream: box.checked }, null, 2);
      changed();
    } catch { /* no JSON yet: nothing to add to */ }
  });
  return make("label", "took", box, " stream");
}
