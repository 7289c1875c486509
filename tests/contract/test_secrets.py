"""No key that anybody sends, right or wrong, is in anything that a gateway process writes.

What the rest of the suite's gateways write is looked at by `tests.conftest` after every test.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from degas.api_keys import KEY_PREFIX, new_key
from gateway.keys import digest_of
from shared.redaction import redact
from tests import keys
from tests.fake_worker import FakeWorker
from tests.keys import KEY, MARK, WRONG_KEY
from tests.raw_socket import TEXT, RawSocket, frame

pytestmark = pytest.mark.slow

FILE_KEY = keys.key("of-the-file-1")
"""The process knows its hash only, so that it cannot look for it in what it writes."""

ROOT = Path(__file__).parents[2]


class Written:
    """A gateway process; `text` is all that it wrote so far."""

    def __init__(self, folder: Path, **settings: object) -> None:
        names = {f"DEGAS_GATEWAY_{name.upper()}": str(value) for name, value in settings.items()}
        self.file = folder / "written.txt"
        self._stream = self.file.open("wb")
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "gateway"],
            cwd=ROOT,
            env={**os.environ, "DEGAS_GATEWAY_PORT": "0", "DEGAS_GATEWAY_LOG_LEVEL": "debug", **names},
            stdout=self._stream,
            stderr=subprocess.STDOUT,
        )

    @property
    def text(self) -> str:
        return self.file.read_text()

    def wait_for(self, words: str) -> str:
        """The line that holds `words`."""
        for _ in range(2000):
            for line in self.text.splitlines():
                if words in line:
                    return line
            time.sleep(0.01)
        raise TimeoutError(self.text)

    def end(self) -> None:
        self.popen.send_signal(signal.SIGTERM)
        self.popen.wait(20)
        self._stream.close()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[tuple[Written, str, int]]:
    """A gateway process, its address and its gRPC port."""
    hashed = "sha256:" + digest_of(FILE_KEY.encode()).hex()
    (tmp_path / "keys").write_text(
        json.dumps({"name": "filed", "hash": hashed, "requests_per_minute": 9}) + "\n"
    )
    with FakeWorker() as worker:
        written = Written(
            tmp_path,
            workers=worker.endpoint,
            api_keys=KEY,
            keys_file=tmp_path / "keys",
            grpc_port=0,
            log_json="true",
            drain_deadline_s=0,
        )
        try:
            said = json.loads(written.wait_for("gateway_listening"))
            written.wait_for("model_served")
            yield written, said["url"], said["grpc_port"]
        finally:
            written.end()


def offers(key: str) -> Iterator[bytes]:
    """Requests that hold a key wherever one may be, or be put by mistake; some are no HTTP at all."""
    headers = [
        f"Authorization: Bearer {key}",
        f"Authorization: {key}",
        f"Authorization: Basic {base64.b64encode(key.encode()).decode()} {key}",
        f"X-Moondream-Auth: {key}",
        f"x-api-key: {key}",
        f"Cookie: key={key}",
        f"Origin: https://{key}.example",
        f"Host: {key}",
        f"Content-Type: {key}",
        f"Content-Encoding: {key}",
        f"Expect: {key}",
        f"x-request-id: {key if key == KEY else 'x'}",  # else an id of the client's own, which is what is logged
        f"traceparent: {key}",
        f"{key}: x",
        f"Bad Name: {key}",
        f"Content-Length: {key}",
        f"Transfer-Encoding: {key}",
    ]
    for line in headers:
        host = "" if line.startswith("Host") else "Host: localhost\r\n"
        for first in ("GET /v1/models", "POST /v1/responses", "GET /nothing"):
            yield f"{first} HTTP/1.1\r\n{host}{line}\r\nConnection: close\r\n\r\n".encode()
    for path in (f"/v1/models/{key}", f"/{key}", f"/v1/models?api_key={key}", f"/{key}\x7f"):
        yield f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    yield f"{key}\r\n\r\n".encode()
    yield f"GET / {key}\r\n\r\n".encode()
    for body in (f'{{"{key}": 1}}', f'{{"input": "{key}", "model": "{key}", "user": "{key}"}}', key):
        yield (
            "POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {KEY}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        ).encode()
    for names in (
        f"openai-insecure-api-key.{key}",
        f"realtime, openai-insecure-api-key.{key}",
        f"openai-api-key.{key}, {key}",
    ):
        yield (
            "GET /v1/responses HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n"
            f"Sec-WebSocket-Protocol: {names}\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        ).encode()


def test_nothing_that_a_process_writes_holds_a_key(process: tuple[Written, str, int]) -> None:
    written, url, grpc_port = process
    for key in (KEY, FILE_KEY, WRONG_KEY):
        for request in offers(key):
            with RawSocket(url) as client:
                client.send(request)
                client.half_close()
                client.rest()
        first = json.dumps({"type": "degas.authenticate", "api_key": key, "model": key}).encode()
        for headers, message in (
            ((f"Sec-WebSocket-Protocol: openai-insecure-api-key.{key}",), b"{}"),
            ((f"Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.{key}",), key.encode()),
            ((f"Origin: {url}",), first),
            ((f"Origin: {url}",), first.replace(b"authenticate", b"authentic")),
            (
                (f"Authorization: Bearer {key}",),
                json.dumps({"type": "response.create", "input": key}).encode(),
            ),
        ):
            with RawSocket(url) as client:
                client.upgrade(*headers)
                client.send(frame(TEXT, message) + frame(TEXT, key.encode(), masked=False))
                client.rest()
        with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
            for metadata in (("authorization", f"Bearer {key}"), ("authorization", key), ("x-key", key)):
                for call in (
                    lambda m: health_pb2_grpc.HealthStub(channel).Check(
                        health_pb2.HealthCheckRequest(service=m[1]), metadata=[m], timeout=5
                    ),
                    lambda m: list(
                        vllm_engine_pb2_grpc.VllmEngineStub(channel).Generate(
                            pb.GenerateRequest(text=m[1], request_id=m[1]), metadata=[m], timeout=5
                        )
                    ),
                ):
                    try:
                        call(metadata)
                    except grpc.RpcError:
                        pass
    (written.file.parent / "keys").write_text(f"{{{FILE_KEY}\n")
    written.wait_for("keys_file_refused")
    written.end()
    text = written.text
    assert MARK not in text, [line for line in text.splitlines() if MARK in line][:5]
    assert "Traceback" not in text and "handler_failed" not in text and "aiohttp" not in text
    assert "http" in text  # something was written at all


def test_what_degas_made_looks_like_a_key_anywhere() -> None:
    made, _ = new_key()
    assert made.removeprefix(KEY_PREFIX) not in redact(f"a library said {made} and more")
