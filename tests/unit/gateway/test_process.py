"""`python -m gateway` as a process: its start, its log, its end, and encrypted workers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.auth

from tests.fake_worker import End, FakeWorker, Token, Wait, text_ids
from tests.gateway_thread import GatewayThread
from tests.http_client import Opened, ask

ROOT = Path(__file__).parents[3]
SECRET = "a question nobody may log"


class Process:
    """A gateway process and the log lines it wrote."""

    def __init__(self, **settings: Any) -> None:
        names = {f"DEGAS_GATEWAY_{name.upper()}": str(value) for name, value in settings.items()}
        environment = {**os.environ, "DEGAS_GATEWAY_PORT": "0", "DEGAS_GATEWAY_LOG_JSON": "true", **names}
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "gateway"],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self.lines: list[str] = []
        self._has_ended = False
        self._arrived = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            with self._arrived:
                self.lines.append(line)
                self._arrived.notify_all()
        with self._arrived:
            self._has_ended = True
            self._arrived.notify_all()

    def wait_event(self, name: str, timeout_s: float = 20.0) -> dict[str, Any]:
        """The first log line with this event."""

        def found() -> dict[str, Any] | None:
            for line in self.lines:
                if line.startswith("{") and json.loads(line)["event"] == name:
                    return dict(json.loads(line))
            return None

        with self._arrived:
            self._arrived.wait_for(lambda: found() is not None or self._has_ended, timeout_s)
            event = found()
            if event is None:
                raise TimeoutError(f"no {name} among {self.lines}; exit code: {self.popen.poll()}")
        return event

    def end(self) -> int:
        """Wait for the exit status, with all lines read."""
        status = self.popen.wait(20)
        self._reader.join(5)
        return status

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()
        self.popen.wait()


@pytest.mark.slow
def test_sigterm_drains_and_no_prompt_is_ever_logged(
    worker: FakeWorker, data_url: Callable[..., str]
) -> None:
    settings = {"workers": worker.endpoint, "drain_deadline_s": 0.5, "log_level": "debug"}
    with Process(**settings) as process:
        url = process.wait_event("gateway_listening")["url"]
        process.wait_event("model_served")
        answer = " an answer nobody may log"
        worker.reply(answer)
        picture = data_url()
        assert (
            ask(url, "/v1/query", {"question": SECRET, "image_url": picture}).json["answer"] == answer.strip()
        )
        assert ask(url, "/v1/query", {"question": SECRET, "image_url": picture[:60]}).status == 400
        assert ask(url, "/v1/query", {"question": SECRET, "unknown": SECRET}).status == 400
        worker.script = lambda _: [*map(Token, text_ids("begun")), Wait(60), End()]
        streams = [
            Opened(url, "/v1/query", {"question": SECRET, "stream": True}),
            Opened(
                url,
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": SECRET}], "stream": True},
            ),
        ]
        process.popen.send_signal(signal.SIGTERM)
        for stream in streams:
            assert list(stream.events())[-1]["error"]["code"] == "shutting_down"
            stream.close()
        assert process.end() == 0
        log = "".join(process.lines)
        assert '"event": "drain_deadline"' in log
        assert "nobody may log" not in log and picture[30:50] not in log and "Traceback" not in log


def test_before_it_drains_it_serves_on_while_it_says_that_it_is_not_ready(worker: FakeWorker) -> None:
    with Process(workers=worker.endpoint, drain_notice_s=30) as process:
        url = process.wait_event("gateway_listening")["url"]
        process.wait_event("model_served")
        process.popen.send_signal(signal.SIGTERM)
        process.wait_event("leaving")
        assert ask(url, "/readyz").status == 503
        assert ask(url, "/v1/query", {"question": "still there?"}).status == 200
        process.popen.send_signal(signal.SIGTERM)  # who is in a hurry asks twice
        assert process.end() == 0


@pytest.mark.slow
def test_bad_settings_end_with_one_clear_line() -> None:
    with Process(prot=1) as process:
        assert process.end() == 2
        assert process.lines == [
            "gateway: DEGAS_GATEWAY_PROT is not a setting of the gateway; did you mean DEGAS_GATEWAY_PORT?\n"
        ]


@pytest.mark.slow
def test_a_taken_port_ends_with_one_clear_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with Process(port=taken.getsockname()[1]) as process:
            assert process.end() == 2
            assert "address already in use" in process.lines[-1].lower() and "(0 picks" in process.lines[-1]


def test_the_gateway_imports_no_torch_and_no_numpy() -> None:
    code = (
        "import sys, gateway.__main__; print([m for m in ('torch', 'numpy', 'worker') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_tcp_workers_are_encrypted_and_authenticated(tmp_path: Path) -> None:
    keys, other = tmp_path / "keys", tmp_path / "other"
    for folder in (keys, other):
        folder.mkdir()
        for name in ("gateway", "worker"):
            zmq.auth.create_certificates(folder, name)

    def secure(server: zmq.Socket[bytes]) -> None:
        public, secret = zmq.auth.load_certificate(keys / "worker.key_secret")
        assert secret is not None
        server.curve_publickey, server.curve_secretkey = public, secret
        server.curve_server = True

    worker = FakeWorker("tcp://127.0.0.1:0", curve_server=secure)
    with worker, GatewayThread(workers=[worker.endpoint], curve_key_dir=str(keys)) as gateway:
        gateway.wait_ready()
        assert ask(gateway.url, "/v1/query", {"question": "x"}).status == 200
        for settings in ({"curve_key_dir": str(other)}, {}):
            with (
                GatewayThread(workers=[worker.endpoint], **settings) as stranger,
                pytest.raises(TimeoutError),
            ):
                stranger.wait_ready(timeout_s=0.7)
