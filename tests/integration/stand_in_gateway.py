"""A child that answers `/healthz` and `/readyz` as a gateway does. `STAND_IN_GATEWAY=slow` drains for ever."""

import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(os.environ["STAND_IN_FOLDER"])
FAULT = os.environ.get("STAND_IN_GATEWAY", "")


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def on_term(*_: object) -> None:
    alive = sorted(FOLDER.glob("worker-*.pid"))[-1].read_text()
    (FOLDER / "worker-while-draining").write_text(str(Path(f"/proc/{alive}/stat").exists()))
    if FAULT != "slow":
        sys.exit(0)


number = len(list(FOLDER.glob("gateway-*.pid")))
signal.signal(signal.SIGTERM, on_term)
(FOLDER / f"gateway-{number}.pid").write_text(str(os.getpid()))
address = (os.environ["DEGAS_GATEWAY_HOST"], int(os.environ["DEGAS_GATEWAY_PORT"]))
server = ThreadingHTTPServer(address, Answers)
server.serve_forever(poll_interval=0.02)
