"""One worker's place on a node, with a stand-in for the worker."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq

from degas.on_ray.post import Task, WorkerPost, hold_port

# Tells what it was given, is ready, ends with 0 on SIGTERM.
WORKER = """
import json, os, pathlib, signal, sys
env = {name: value for name, value in os.environ.items() if name.startswith("DEGAS_")}
keys = pathlib.Path(env["DEGAS_WORKER_CURVE_KEY_DIR"])
modes = {one.name: oct(one.stat().st_mode & 0o777) for one in (keys, *sorted(keys.iterdir()))}
print(json.dumps({"env": env, "modes": modes, "pid": os.getpid()}), flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
pathlib.Path(env["DEGAS_SERVE_STATUS_FILE"]).write_text('{"worker": {"ready": true}}')
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
while True:
    signal.pause()
"""


def task(source: str = WORKER, **more: Any) -> Task:
    keys = {"worker.key_secret": b"secret", "gateway.key": b"public"}
    command = (sys.executable, "-I", "-S", "-c", source)
    return Task({"DEGAS_WORKER_MODEL": "sim"}, **{"keys": keys, "command": command, **more})


def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return found


@pytest.fixture
def post(monkeypatch: pytest.MonkeyPatch) -> WorkerPost:
    monkeypatch.setenv("DEGAS_GATEWAY_API_KEYS", "not-for-workers")
    monkeypatch.setenv("DEGAS_WORKER_DEPTH", "4")
    return WorkerPost(task(), "127.0.0.1", "node")


def test_a_worker_from_start_to_end(post: WorkerPost) -> None:
    lines: list[str] = []

    def described() -> dict[str, Any]:
        found = post.describe()
        lines.extend(found["lines"])
        return found

    until(lambda: described()["ready"])
    until(lambda: lines)
    told = json.loads(lines[0])
    found = described()
    assert found["endpoint"] == told["env"]["DEGAS_WORKER_ENDPOINT"]
    assert found["endpoint"].startswith("tcp://127.0.0.1:") and found["node_ip"] == "127.0.0.1"
    assert set(told["env"]) == {
        "DEGAS_WORKER_MODEL",
        "DEGAS_WORKER_ENDPOINT",
        "DEGAS_WORKER_CURVE_KEY_DIR",
        "DEGAS_SERVE_STATUS_FILE",
    }, "neither the gateway's variables nor this node's own"
    assert told["modes"] == {"keys": "0o700", "gateway.key": "0o600", "worker.key_secret": "0o600"}
    folder = Path(told["env"]["DEGAS_SERVE_STATUS_FILE"]).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    post.stop()
    assert until(lambda: described()["code"] is not None)
    assert described()["code"] == 0 and not described()["ready"]
    assert not folder.exists()
    post.stop()  # of one that has ended: nothing


def test_keys_may_lie_on_the_node_already(tmp_path: Path) -> None:
    (tmp_path / "worker.key_secret").write_bytes(b"there")
    post = WorkerPost(task(keys=None, keys_dir=str(tmp_path)), "127.0.0.1", "node")
    told = json.loads(until(lambda: post.describe()["lines"])[0])
    assert told["env"]["DEGAS_WORKER_CURVE_KEY_DIR"] == str(tmp_path)
    until(lambda: post.describe()["ready"])
    post.stop()
    until(lambda: post.describe()["code"] is not None)
    assert (tmp_path / "worker.key_secret").exists()


def test_what_a_worker_says_last_is_told_with_its_code() -> None:
    post = WorkerPost(
        task("import sys; print('no such model', file=sys.stderr); sys.exit(2)"), "127.0.0.1", "node"
    )
    found: list[dict[str, Any]] = []
    until(lambda: found.append(post.describe()) or found[-1]["code"] is not None)  # type: ignore[func-returns-value]
    assert found[-1]["code"] == 2
    assert [line for one in found for line in one["lines"]] == ["no such model"]


def test_a_killed_actor_leaves_neither_worker_nor_keys(tmp_path: Path) -> None:
    actor = f"""
import sys, time
from degas.on_ray.post import Task, WorkerPost
task = Task({{}}, keys={{"worker.key_secret": b"x"}}, command=(sys.executable, "-I", "-S", "-c", {WORKER!r}))
post = WorkerPost(task, "127.0.0.1", "node")
while True:
    for line in post.describe()["lines"]:
        print(line, flush=True)
    time.sleep(0.01)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", actor], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert child.stdout is not None
    told = json.loads(child.stdout.readline())
    folder = Path(told["env"]["DEGAS_SERVE_STATUS_FILE"]).parent
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    until(lambda: not folder.exists())

    def is_gone() -> bool:
        try:
            os.kill(told["pid"], 0)
            state = Path(f"/proc/{told['pid']}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        return state == "Z"

    until(is_gone)


def test_ports_come_from_the_range_that_is_allowed_and_are_kept() -> None:
    with hold_port("127.0.0.1", None) as first:
        port = first.getsockname()[1]
        with pytest.raises(OSError, match=f"every port from {port} to {port}"):
            hold_port("127.0.0.1", (port, port))
        for _ in range(2):  # a worker, and the one that takes its place
            with zmq.Context() as context, context.socket(zmq.ROUTER) as worker:  # whose end is waited for
                worker.bind(f"tcp://127.0.0.1:{port}")
                with pytest.raises(OSError):
                    hold_port("127.0.0.1", (port, port))
    with hold_port("127.0.0.1", (port, 65535)) as other:
        assert port <= other.getsockname()[1]
