// Owns what is said when an answer fails, in plain words, and the wait before another try.

const PROBLEMS = {
  queue_full: "The queue is full.",
  loading: "The model is still loading.",
  worker_lost: "The worker went away and is being restarted.",
  device_error: "The worker’s device failed; it is being restarted.",
  out_of_memory: "The worker is out of memory just now.",
  shutting_down: "The server is restarting.",
  connection_lost: "The connection to the server was lost.",
  unauthorized: "This server wants a key.",
  forbidden_origin: "This server does not take questions from this page.",
  slow_client: "The browser read too slowly.",
  quarantined: "This request stopped the worker before, so the server will not run it again.",
  numerical_error: "The model’s arithmetic went wrong on this one.",
  stream_gap: "Part of the answer was lost on the way.",
  version_skew: "Parts of the server have different versions. Whoever runs it needs to restart it.",
};
const NOT_AGAIN = ["quarantined", "payload_too_large", "context_length_exceeded", "forbidden_origin", "unsupported", "invalid_request"];

/** Words for a code; the server's own where it says more than the page knows. */
export const wordsFor = (code, message) => PROBLEMS[code] ?? message ?? "Something went wrong.";

/** Whether the same request may well be answered on another try. */
export const isWorthRetrying = (code) => !NOT_AGAIN.includes(code);

export class Problem {
  /** @param {HTMLElement} words @param {HTMLButtonElement} again disabled while the server asks to wait */
  constructor(words, again) {
    this.words = words;
    this.again = again;
    this.timer = 0;
  }

  say(text) {
    if (this.words.textContent !== text) this.words.textContent = text;
    this.words.hidden = !text;
  }

  clear() {
    clearTimeout(this.timer);
    this.again.disabled = false;
    this.say("");
  }

  /** Says what happened, and counts down to when it may be tried again. */
  fail(text, waitS) {
    this.say(text);
    if (!(waitS > 0)) return;
    this.again.disabled = true;
    const until = performance.now() + waitS * 1000;
    const tick = () => {
      const left = Math.ceil((until - performance.now()) / 1000);
      if (left > 0) {
        this.say(`${text} Try again in ${left} s.`);
        this.timer = setTimeout(tick, 250);
      } else {
        this.say(`${text} You can try again now.`);
        this.again.disabled = false;
      }
    };
    tick();
  }
}
