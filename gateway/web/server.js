// Owns what the page knows of the server: is it ready, which models answer. Asks again and again; shows nothing.

const POLL_MS = 3000;

export class Server extends EventTarget {
  /** Tells by events: `state` {state, words}, `models` {models}, `locked`. @param {() => string} key */
  constructor(key) {
    super();
    this.key = key;
    this.models = [];
    this.isReady = null; // null: not heard from yet
    this.timer = 0;
  }

  /** Asks after `delay` ms, then for ever; a failed answer is a reason to ask at once. */
  pollSoon(delay = 300) {
    clearTimeout(this.timer);
    this.timer = setTimeout(async () => {
      if (!document.hidden) await this.poll();
      this.pollSoon(this.isReady ? POLL_MS : POLL_MS / 2);
    }, delay);
  }

  async poll() {
    const wasReady = this.isReady;
    try {
      const answer = await fetch("readyz", { cache: "no-store", ...this.withKey() });
      if (answer.status === 401) this.lock();
      else if (answer.ok) {
        const isKnown = (wasReady && this.models.length) || (await this.askModels());
        if (isKnown) this.tell("ready", "Ready");
      } else this.tell("waiting", this.models.length ? "Restarting" : "Loading the model");
      this.isReady = answer.ok;
    } catch {
      this.tell("offline", "Not reachable");
      this.isReady = false;
    }
  }

  async askModels() {
    const answer = await fetch("v1/models", this.withKey());
    if (answer.status === 401) this.lock();
    if (!answer.ok) return false;
    const models = (await answer.json()).data ?? [];
    if (models.length) {
      this.models = models;
      this.dispatchEvent(Object.assign(new Event("models"), { models }));
    }
    return true;
  }

  lock() {
    this.tell("locked", "Key needed");
    this.dispatchEvent(new Event("locked"));
  }

  tell(state, words) {
    this.dispatchEvent(Object.assign(new Event("state"), { state, words }));
  }

  withKey() {
    const key = this.key();
    return key ? { headers: { authorization: `Bearer ${key}` } } : {};
  }
}
