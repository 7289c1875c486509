"""A model hub on a loopback port: as much of its interface as huggingface_hub needs to fetch a repository."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LoopbackHub(ThreadingHTTPServer):
    """One repository, `org/tiny`, of the files in a folder. Weights come in small pieces, `pause_s` apart."""

    daemon_threads = True

    def __init__(self, folder: Path, pause_s: float) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder, self.pause_s = folder, pause_s
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def log_message(self, *said: object) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/org/tiny"):
            self._describe(is_tree="/tree/" in path)
            return
        _, _, name = path.partition(f"/resolve/{COMMIT}/")
        name = name or path.partition("/resolve/main/")[2]
        file = self.server.folder / name
        if not path.startswith("/org/tiny/") or not name or not file.is_file():
            self._send(b'{"error": "not here"}', 404, **{"X-Error-Code": "RepoNotFound"})
            return
        tag = hashlib.sha256(file.read_bytes()).hexdigest()
        self._send(
            file.read_bytes(),
            200,
            **{"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"', "X-Linked-Etag": f'"{tag}"'},
        )

    def _describe(self, *, is_tree: bool) -> None:
        files = sorted(file.name for file in self.server.folder.iterdir())
        tree = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in files]
        whole = {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        self._send(json.dumps(tree if is_tree else whole).encode(), 200)

    def _send(self, body: bytes, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        is_slow = self.path.endswith(".safetensors")
        if is_slow:
            self.server.fetched.append(self.path)
        size = max(1, len(body) // 10) if is_slow else max(1, len(body))
        for start in range(0, len(body), size):
            self.wfile.write(body[start : start + size])
            time.sleep(self.server.pause_s if is_slow else 0)


@contextmanager
def loopback_hub(folder: Path, *, pause_s: float = 0.0) -> Iterator[LoopbackHub]:
    """A hub that serves the files of `folder` as `org/tiny`."""
    hub = LoopbackHub(folder, pause_s)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
