// Owns the one WebSocket to /v1/responses and the lanes on it. Knows nothing of the page.

import { FarSocket } from "./socket.js";

const CONNECT_TIMEOUT_MS = 8000;

export class Lanes {
  /** @param {string} url */
  constructor(url) {
    this.url = url;
    this.key = "";
    this.socket = null;
    this.opening = null;
    this.lanes = new Map();
    this.counter = 0;
  }

  /** Uses another key from the next connection on. */
  useKey(key) {
    this.key = key;
    this.drop();
  }

  drop() {
    const socket = this.socket;
    this.socket = this.opening = null;
    socket?.close();
  }

  connect() {
    if (this.socket?.isOpen) return Promise.resolve(this.socket);
    this.opening ??= new Promise((resolve, reject) => {
      const socket = new FarSocket(this.url, ["degas"]);
      const failed = () => {
        clearTimeout(timer);
        socket.removeEventListener("close", failed); // must not end the next attempt
        this.opening = null;
        reject(new Error("no connection"));
      };
      const timer = setTimeout(() => {
        socket.close();
        failed();
      }, CONNECT_TIMEOUT_MS);
      socket.addEventListener("close", failed);
      socket.addEventListener("open", () => {
        clearTimeout(timer);
        socket.removeEventListener("close", failed);
        socket.addEventListener("close", (event) => this.lost(socket, event));
        socket.addEventListener("message", (event) => this.take(event));
        this.socket = socket;
        this.opening = null;
        if (this.key) socket.send(JSON.stringify({ type: "degas.authenticate", api_key: this.key }));
        resolve(socket);
      });
    });
    return this.opening;
  }

  /**
   * Starts a response. `onEvent(event, at)` hears every event of it, and at last one of type
   * response.completed, response.incomplete, response.failed or error.
   * @returns {{cancel: () => void}}
   */
  ask(body, onEvent) {
    this.counter += 1;
    const lane = `card-${this.counter}`;
    const entry = { onEvent, sent: false, cancelled: false };
    this.lanes.set(lane, entry);
    this.connect().then(
      (socket) => {
        if (!this.lanes.has(lane)) return;
        socket.send(JSON.stringify({ type: "response.create", stream_id: lane, ...body }));
        entry.sent = true;
      },
      () => this.fail(lane, { code: "connection_lost", message: "The server could not be reached." }),
    );
    return { cancel: () => this.cancel(lane) };
  }

  cancel(lane) {
    const entry = this.lanes.get(lane);
    if (!entry || entry.cancelled) return;
    entry.cancelled = true;
    if (entry.sent && this.socket?.isOpen) {
      this.socket.send(JSON.stringify({ type: "response.cancel", stream_id: lane }));
    } else this.fail(lane, { code: "cancelled", message: "Stopped." });
  }

  take(message) {
    const { at } = message;
    const event = JSON.parse(message.data);
    if (event.stream_id === undefined) {
      if (event.type === "error") for (const lane of [...this.lanes.keys()]) this.finish(lane, event, at);
      return;
    }
    const terminal = ["response.completed", "response.incomplete", "response.failed", "error"].includes(event.type);
    if (terminal) this.finish(event.stream_id, event, at);
    else this.lanes.get(event.stream_id)?.onEvent(event, at);
  }

  finish(lane, event, at) {
    const entry = this.lanes.get(lane);
    this.lanes.delete(lane);
    entry?.onEvent(event, at);
  }

  fail(lane, error) {
    this.finish(lane, { type: "error", error, headers: {} }, performance.now());
  }

  lost(socket, event) {
    if (this.socket === socket) this.socket = null;
    const going = event.code === 1001 || event.code === 1012;
    const error = going
      ? { code: "shutting_down", message: "The server is restarting." }
      : { code: "connection_lost", message: "The connection was lost." };
    for (const lane of [...this.lanes.keys()]) this.fail(lane, error);
  }
}
