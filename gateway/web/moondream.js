// Owns asking Moondream's own routes, for what a response does not carry: a thought that points, and outlines.
// Tells the events that a lane tells, and two more: `degas.thought` {text, points, start, end} and `degas.outline` {path, bbox}.

import { events, failureOf } from "./texts.js";

const REASONS = { length: "max_output_tokens" };

export class Moondream {
  /** @param {() => string} key */
  constructor(key) {
    this.key = key;
  }

  /**
   * Asks `query` with a thought, or `segment`. `onEvent(event, at)` hears of every piece, and at last of the end.
   * @returns {{cancel: () => void}}
   */
  ask(route, body, onEvent) {
    const stop = new AbortController();
    this.read(route, body, onEvent, stop.signal).catch(() => {
      const error = stop.signal.aborted
        ? { code: "cancelled", message: "Stopped." }
        : { code: "connection_lost", message: "The connection was lost." };
      onEvent({ type: "error", error, headers: {} }, performance.now());
    });
    return { cancel: () => stop.abort() };
  }

  async read(route, body, onEvent, signal) {
    const key = this.key();
    const headers = { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
    const answer = await fetch(`v1/${route}`, { method: "POST", headers, body: JSON.stringify({ ...body, stream: true }), signal });
    if (!answer.ok) {
      onEvent(await failureOf(answer), performance.now());
      return;
    }
    let last = null, path = "", bbox = null;
    for await (const [event, at] of events(answer.body)) {
      if (event.error) {
        onEvent({ type: "error", error: event.error, headers: {} }, at);
        return;
      }
      bbox = event.bbox ?? bbox;
      if (event.completed) {
        last = event;
        if (event.path !== undefined) onEvent({ type: "degas.outline", path: event.path, bbox }, at);
      } else if (route === "segment") {
        path += event.chunk ?? "";
        onEvent({ type: "degas.outline", path, bbox }, at);
      } else if (event.reasoning) {
        const { text, points, start_idx: start, end_idx: end } = event.reasoning;
        onEvent({ type: "degas.thought", text, points, start, end }, at);
      } else if (event.chunk) onEvent({ type: "response.output_text.delta", delta: event.chunk }, at);
    }
    if (!last) throw new Error("the stream broke off");
    onEvent(ended(last), performance.now());
  }
}

function ended({ finish_reason: reason, metrics }) {
  const usage = metrics && { input_tokens: metrics.input_tokens, output_tokens: metrics.output_tokens };
  const limit = REASONS[reason];
  const response = { status: limit ? "incomplete" : "completed", usage };
  if (limit) response.incomplete_details = { reason: limit };
  return { type: `response.${response.status}`, response };
}
