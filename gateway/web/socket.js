// Owns the WebSocket itself, in a worker thread of its own: a message is timed when it arrives, not when the page,
// busy painting the one before, gets round to it. `FarSocket` is the page's end of it.

const isWorker = typeof WorkerGlobalScope !== "undefined" && self instanceof WorkerGlobalScope;

if (isWorker) {
  let socket = null;
  self.onmessage = ({ data: command }) => {
    if (command.open) {
      socket = new WebSocket(command.open, command.protocols);
      socket.onopen = () => self.postMessage({ kind: "open" });
      socket.onmessage = (event) =>
        self.postMessage({ kind: "message", data: event.data, at: performance.timeOrigin + performance.now() });
      socket.onclose = (event) => self.postMessage({ kind: "close", code: event.code });
    } else if (command.send !== undefined) socket.send(command.send);
    else socket.close();
  };
}

/** As much of a WebSocket as the page needs; a message event carries `at`, on the page's own clock. */
export class FarSocket extends EventTarget {
  constructor(url, protocols) {
    super();
    this.isOpen = false;
    this.worker = new Worker(new URL("socket.js", import.meta.url), { type: "module" });
    this.worker.onmessage = ({ data: said }) => {
      const event = new Event(said.kind);
      if (said.kind === "message") Object.assign(event, { data: said.data, at: said.at - performance.timeOrigin });
      if (said.kind === "close") {
        Object.assign(event, { code: said.code });
        this.worker.terminate();
      }
      this.isOpen = said.kind === "open" || (this.isOpen && said.kind !== "close");
      this.dispatchEvent(event);
    };
    // A server that is gone has no script for the worker either.
    this.worker.onerror = () => {
      this.isOpen = false;
      this.dispatchEvent(Object.assign(new Event("close"), { code: 1006 }));
    };
    this.worker.postMessage({ open: url, protocols });
  }

  send(text) {
    this.worker.postMessage({ send: text });
  }

  close() {
    this.worker.postMessage({});
  }
}
