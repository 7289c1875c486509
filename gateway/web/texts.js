// Owns going on with a text through /v1/completions, for models that do not chat. Tells the events that a lane tells.

const REASONS = { length: "max_output_tokens" };

export class Texts {
  /** @param {() => string} key */
  constructor(key) {
    this.key = key;
  }

  /**
   * Starts a continuation. `onEvent(event, at)` hears of every piece, and at last of the end.
   * @returns {{cancel: () => void}}
   */
  ask(body, onEvent) {
    const stop = new AbortController();
    this.read(body, onEvent, stop.signal).catch(() => {
      const error = stop.signal.aborted
        ? { code: "cancelled", message: "Stopped." }
        : { code: "connection_lost", message: "The connection was lost." };
      onEvent({ type: "error", error, headers: {} }, performance.now());
    });
    return { cancel: () => stop.abort() };
  }

  async read(body, onEvent, signal) {
    const key = this.key();
    const headers = { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
    const whole = { ...body, stream: true, stream_options: { include_usage: true } };
    const answer = await fetch("v1/completions", { method: "POST", headers, body: JSON.stringify(whole), signal });
    if (!answer.ok) {
      onEvent(await failureOf(answer), performance.now());
      return;
    }
    let reason = null, usage = null, failure = null;
    for await (const [event, at] of events(answer.body)) {
      if (event.error) failure = event.error;
      const choice = event.choices?.[0];
      if (choice?.text) onEvent({ type: "response.output_text.delta", delta: choice.text }, at);
      reason = choice?.finish_reason ?? reason;
      usage = event.usage ?? usage;
    }
    if (failure) onEvent({ type: "error", error: failure, headers: {} }, performance.now());
    else if (!reason) throw new Error("the stream broke off");
    else onEvent(ended(reason, usage), performance.now());
  }
}

function ended(reason, usage) {
  const counted = usage && { input_tokens: usage.prompt_tokens, output_tokens: usage.completion_tokens };
  const limit = REASONS[reason];
  const response = { status: limit ? "incomplete" : "completed", usage: counted };
  if (limit) response.incomplete_details = { reason: limit };
  return { type: `response.${response.status}`, response };
}

/** A refusal, as an event. */
export async function failureOf(answer) {
  const { error } = await answer.json();
  return { type: "error", error, headers: Object.fromEntries(answer.headers) };
}

/** The events of a body of Server-Sent Events, each with the time at which it arrived. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const at = performance.now();
    const blocks = (kept + value).split("\n\n");
    kept = blocks.pop();
    for (const block of blocks) {
      const data = block.startsWith("data: ") ? block.slice(6) : "";
      if (data.startsWith("{")) yield [JSON.parse(data), at];
    }
  }
}
