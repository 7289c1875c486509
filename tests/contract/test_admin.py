"""The operator's listener: its own port and token, and nothing of it on the public one; `/v1/stats` beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from shared.errors import FinishReason
from shared.logs import configure_logs, current_level, set_level
from shared.settings import ConfigError
from tests.fake_worker import FakeWorker
from tests.gateway_thread import GatewayThread
from tests.http_client import Answer, Opened, ask
from tests.keys import KEY, key

TOKEN = key("admin-token-1")
PROMPT = {"prompt": "hi"}


@pytest.fixture
def admin(worker: FakeWorker, tmp_path: Path) -> Iterator[GatewayThread]:
    (tmp_path / "token").write_text(TOKEN + "\n")
    entry = {"name": "alice", "hash": "sha256:" + "ab" * 32, "tenant": "acme", "requests_per_minute": 7}
    (tmp_path / "keys").write_text(json.dumps(entry) + "\n")
    with GatewayThread(
        workers=[worker.endpoint],
        api_keys=KEY,
        keys_file=str(tmp_path / "keys"),
        admin_listen="127.0.0.1:0",
        admin_token_file=str(tmp_path / "token"),
    ) as gateway:
        gateway.wait_ready()
        yield gateway


def tell(gateway: GatewayThread, method: str, path: str, body: object = None, token: str = TOKEN) -> Answer:
    url = f"http://127.0.0.1:{gateway.gateway.admin_port}"
    return ask(url, path, body, method=method, headers={"Authorization": f"Bearer {token}"})


def complete(gateway: GatewayThread) -> Answer:
    return ask(gateway.url, "/v1/completions", PROMPT, headers={"Authorization": f"Bearer {KEY}"})


def test_a_drain_and_its_end(admin: GatewayThread, worker: FakeWorker) -> None:
    worker.hold()
    body = {**PROMPT, "stream": True}
    with Opened(
        admin.url, "/v1/completions", body, headers={"Authorization": f"Bearer {KEY}"}, timeout_s=5
    ) as opened:
        assert tell(admin, "POST", "/drain").json == {"draining": True, "num_in_flight": 1}
        refused = complete(admin)
        assert refused.status == 503 and refused.error["code"] == "shutting_down"
        worker.release()
        assert list(opened.events())[-1] == "[DONE]"  # what ran goes on
    assert ask(admin.url, "/readyz", headers={"Authorization": f"Bearer {KEY}"}).status == 503
    assert tell(admin, "POST", "/resume").json["draining"] is False
    assert complete(admin).status == 200
    admin.call(admin.gateway.service.begin_drain)  # as a signal does: for good
    assert tell(admin, "POST", "/resume").status == 503


def test_keys_and_workers(admin: GatewayThread, worker: FakeWorker) -> None:
    answer = tell(admin, "GET", "/keys")
    (entry,) = answer.json["keys"]
    assert (entry["name"], entry["tenant"], entry["requests_per_minute"]) == ("alice", "acme", 7)
    assert entry["use"] == {
        "streams": 0, "requests": 0, "refused": 0, "prompt_tokens": 0, "generated_tokens": 0
    }  # fmt: skip
    assert answer.json["num_settings_keys"] == 1
    assert b"abab" not in answer.body and b"sha256" not in answer.body
    (one,) = tell(admin, "GET", "/workers").json["workers"]
    assert one["endpoint"] == worker.endpoint and one["takes_work"] and one["model"] == "fake-vl"
    assert one["places"] == 40 and one["places_taken"] == 0


@pytest.fixture
def logs() -> Iterator[None]:
    before, config = current_level(), structlog.get_config()
    yield
    structlog.configure(**config)
    set_level(before)
    structlog.configure(**config)


def test_the_log_level_changes_at_once(
    admin: GatewayThread, logs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logs("gateway", level="info", json=True)
    assert tell(admin, "GET", "/log-level").json == {"level": "info"}
    complete(admin)
    assert '"level": "debug"' not in capsys.readouterr().err
    assert tell(admin, "POST", "/log-level", {"level": "debug"}).json == {"level": "debug"}
    complete(admin)
    assert "/v1/completions" in capsys.readouterr().err
    tell(admin, "POST", "/log-level", {"level": "error"})
    capsys.readouterr()
    complete(admin)
    tell(admin, "GET", "/nothing")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("GET", "/drain", None, 405, None),
        ("DELETE", "/keys", None, 405, None),
        ("GET", "/nothing", None, 404, None),
        ("GET", "/v1/models", None, 404, None),
        ("POST", "/log-level", {"level": "loud"}, 400, "level"),
        ("POST", "/log-level", {}, 400, None),
        ("POST", "/log-level", {"level": "info", "x": 1}, 400, "x"),
        ("POST", "/log-level", b"{", 400, None),
        ("POST", "/log-level", b"x" * 5000, 413, None),
        ("GET", "/trace?steps=0", None, 400, "steps"),
        ("GET", "/trace?steps=%C3%A9", None, 400, "steps"),
    ],
)
def test_bad_input(
    admin: GatewayThread, method: str, path: str, body: object, status: int, param: str | None
) -> None:
    answer = tell(admin, method, path, body)
    assert answer.status == status and answer.error["param"] == param and answer.error["message"]


def test_the_token_is_its_own(admin: GatewayThread) -> None:
    paths = [
        ("POST", "/drain"),
        ("GET", "/keys"),
        ("GET", "/log-level"),
        ("GET", "/nothing"),
        ("GET", "/trace"),
    ]
    for method, path in paths:
        for token in ("", KEY, TOKEN + "x"):
            answer = tell(admin, method, path, token=token)
            assert answer.status == 401 and answer.error["code"] == "unauthorized"
        public = ask(admin.url, path, method=method, headers={"Authorization": f"Bearer {KEY}"})
        assert public.status == 404
    assert ask(admin.url, "/v1/models", headers={"Authorization": f"Bearer {TOKEN}"}).status == 401
    assert not admin.gateway.service.draining
    url = f"http://127.0.0.1:{admin.gateway.admin_port}"
    foreign = ask(url, "/keys", headers={"Authorization": f"Bearer {TOKEN}", "Host": "evil.example"})
    assert foreign.status == 400


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"admin_listen": "9090"}, "<host>:<port>"),
        ({"admin_listen": "127.0.0.1:0"}, "needs admin_token_file"),
        ({"admin_listen": "127.0.0.1:0", "admin_token_file": "/nonexistent"}, "No such file"),
        ({"admin_listen": "127.0.0.1:0", "admin_token_file": "short"}, "at least 16"),
        ({"admin_listen": "127.0.0.1:0", "admin_token_file": "two"}, "one word"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    for name, text in (("short", "x" * 15), ("two", "hush-hush-123456 hush-hush-123456")):
        (tmp_path / name).write_text(text)
    file = settings.get("admin_token_file")
    if file in ("short", "two"):
        settings = {**settings, "admin_token_file": str(tmp_path / file)}
    with pytest.raises(ConfigError, match=words), GatewayThread(**settings):
        pass


def test_stats_as_moondream_station_has_them(gateway: GatewayThread, worker: FakeWorker) -> None:
    worker.reply("hi", FinishReason.DEADLINE)
    assert ask(gateway.url, "/v1/completions", PROMPT).status == 200
    # What runs is told by heartbeats, and the last one may have been sent while it ran.
    until_s = time.monotonic() + 10
    while (told := ask(gateway.url, "/v1/stats").json)["processing"] and time.monotonic() < until_s:
        time.sleep(0.01)
    assert told == {
        "status": "running",
        "model": "fake-vl",
        "workers": 1,
        "queue_size": 0,
        "max_queue_size": 32,
        "processing": 0,
        "timeouts": 1,
        "default_timeout": 300.0,
        "requests_processed": 1,
    }
    worker.die()
    gateway.wait_for(lambda: not gateway.gateway.service.readiness()[0])
    gone = ask(gateway.url, "/v1/stats").json
    assert (gone["status"], gone["workers"]) == ("stopped", 0)
