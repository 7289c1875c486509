"""The supervisor over stand-in children: restarts, hangs, stops, and nothing left behind whatever ends it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loadtest.peers.waiting import Watched, wait_until

pytestmark = pytest.mark.slow
LIMIT_S = 30.0


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Supervised:
    """A supervisor process and what its children left in the folder."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        (folder / "run").mkdir()
        self.log = (folder / "out").open("w+")
        environment = os.environ | {
            "STAND_IN_FOLDER": str(folder),
            "DEGAS_GATEWAY_API_KEYS": "sk-not-for-workers",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.supervised"],
            env=environment | variables,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def output(self) -> str:
        return (self.folder / "out").read_text()

    def until(self, condition: Callable[[], object], what: str, *, ends: bool = False) -> None:
        """Wait for the condition; `ends`: although the supervisor may have ended."""
        watched = [] if ends else [Watched("the supervisor", self.process, self.folder / "out")]
        wait_until(condition, what, watched, timeout_s=LIMIT_S)

    def wait_ready(self) -> str:
        self.until(lambda: "DEGAS-READY" in self.output(), "ready")
        line = next(line for line in self.output().splitlines() if line.startswith("DEGAS-READY"))
        return str(json.loads(line.partition(" ")[2])["url"])

    def pids(self) -> dict[str, int]:
        return {path.stem: int(path.read_text()) for path in self.folder.glob("[a-z]*.pid")}

    def wait_started(self, name: str) -> None:
        self.until(lambda: name in self.pids(), f"{name} starts")

    def wait_exit(self) -> int:
        return self.process.wait(LIMIT_S)

    def assert_nothing_left(self) -> None:
        pids = self.pids()
        assert pids
        self.until(lambda: not any(map(is_running, pids.values())), f"all of {pids} gone", ends=True)
        self.until(lambda: not list((self.folder / "run").iterdir()), "runtime folder gone", ends=True)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Supervised]]:
    started: list[Supervised] = []

    def start(**variables: str) -> Supervised:
        started.append(Supervised(tmp_path, **variables))
        return started[-1]

    yield start
    for supervised in started:
        supervised.process.kill()
        supervised.process.wait()
        supervised.log.close()
        for pid in supervised.pids().values():
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_starts_tells_and_stops_cleanly(start: Callable[..., Supervised], number: signal.Signals) -> None:
    supervised = start()
    url = supervised.wait_ready()
    status = supervised.folder / "status" / "status.json"
    supervised.until(lambda: status.exists() and json.loads(status.read_text())["worker"]["ready"], "status")
    folders = list((supervised.folder / "run").iterdir())
    assert len(folders) == 1 and folders[0].stat().st_mode & 0o777 == 0o700
    environment = json.loads((supervised.folder / "worker-environment.json").read_text())
    assert environment["DEGAS_WORKER_ENDPOINT"] == f"ipc://{folders[0]}/worker.sock"
    assert environment["DEGAS_WORKER_MODEL"] == "stand-in"
    assert not [name for name in environment if name.startswith("DEGAS_GATEWAY_")]
    supervised.process.send_signal(number)
    assert supervised.wait_exit() == 0
    supervised.assert_nothing_left()
    output = supervised.output()
    assert f"{url}/" in output and "load weights" in output
    assert "worker says goodbye" in output
    assert (supervised.folder / "worker-while-draining").read_text() == "True"
    assert not status.exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5)


def test_a_dead_worker_is_started_again_and_its_descendants_are_not_left(
    start: Callable[..., Supervised],
) -> None:
    supervised = start()
    supervised.wait_ready()
    first = supervised.pids()
    os.kill(first["worker-0"], signal.SIGKILL)
    supervised.wait_started("worker-1")
    supervised.until(lambda: "serving again" in supervised.output(), "serving again")
    assert not is_running(first["grandchild-0"])
    assert is_running(first["gateway-0"])
    assert "signal SIGKILL" in supervised.output()
    supervised.process.terminate()
    assert supervised.wait_exit() == 0
    supervised.assert_nothing_left()


def test_a_dead_gateway_is_started_again_on_its_port(start: Callable[..., Supervised]) -> None:
    supervised = start()
    url = supervised.wait_ready()
    os.kill(supervised.pids()["gateway-0"], signal.SIGKILL)
    supervised.until(lambda: "serving again" in supervised.output(), "serving again")
    socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5).close()
    assert "worker-1" not in supervised.pids()


def test_a_hung_worker_is_replaced(start: Callable[..., Supervised]) -> None:
    supervised = start(STAND_IN="hang@0")
    supervised.wait_started("worker-1")
    supervised.until(lambda: "serving again" in supervised.output(), "serving again")
    assert "no decode progress" in supervised.output()
    assert not is_running(supervised.pids()["worker-0"])


def test_a_worker_that_is_ready_before_the_first_look_is_given_its_time(
    start: Callable[..., Supervised],
) -> None:
    supervised = start(STAND_IN="late-beat")
    supervised.wait_ready()
    time.sleep(0.6)  # it beats after 0.4
    supervised.process.terminate()
    assert supervised.wait_exit() == 0
    assert "no decode progress" not in supervised.output()


def test_a_stopped_worker_is_replaced(start: Callable[..., Supervised]) -> None:
    supervised = start()
    supervised.wait_ready()
    os.kill(supervised.pids()["worker-0"], signal.SIGSTOP)
    supervised.wait_started("worker-1")
    assert "no decode progress" in supervised.output()


def test_a_supervisor_that_was_stopped_itself_blames_nobody(start: Callable[..., Supervised]) -> None:
    supervised = start(STAND_IN_BEAT_TIMEOUT="1.2")
    supervised.wait_ready()
    worker = supervised.pids()["worker-0"]
    supervised.process.send_signal(signal.SIGSTOP)
    os.kill(worker, signal.SIGSTOP)
    time.sleep(1.6)  # longer than the beat timeout, seen by nobody
    os.kill(worker, signal.SIGCONT)
    supervised.process.send_signal(signal.SIGCONT)
    supervised.process.terminate()
    assert supervised.wait_exit() == 0
    assert "no decode progress" not in supervised.output()


@pytest.mark.parametrize("fault", ["die-early", "die"])
def test_a_crash_loop_ends_with_a_message(start: Callable[..., Supervised], fault: str) -> None:
    supervised = start(STAND_IN=fault)
    assert supervised.wait_exit() == 1
    output = supervised.output()
    assert "died 5 times in a row" in output
    assert ("exit code 7" if fault == "die-early" else "SIGKILL") in output
    assert "worker-4" in supervised.pids() and "worker-5" not in supervised.pids()
    supervised.assert_nothing_left()


def test_refused_settings_are_not_tried_again(start: Callable[..., Supervised]) -> None:
    supervised = start(STAND_IN="refuse")
    assert supervised.wait_exit() == 2
    assert "worker-1" not in supervised.pids()
    assert "refuses its settings" in supervised.output() and "depth: must be 4" in supervised.output()
    supervised.assert_nothing_left()


LEAVE_PID = (
    "import os, pathlib, sys, time; folder = pathlib.Path(os.environ['STAND_IN_FOLDER']); "
    "(folder / 'pid').write_text(str(os.getpid())); (folder / 'pid').rename(folder / 'fetch.pid')"
)


def test_a_model_may_take_longer_to_fetch_than_to_load(start: Callable[..., Supervised]) -> None:
    """The worker's time to start begins when its model is here."""
    fetch = f'{LEAVE_PID}; time.sleep(2.5); print(\'DEGAS-MODEL {{"path": "/here/it/is"}}\')'
    supervised = start(STAND_IN_FETCH=fetch)
    supervised.wait_ready()
    assert "not ready after" not in supervised.output() and "fetch model" in supervised.output()
    environment = json.loads((supervised.folder / "worker-environment.json").read_text())
    assert environment["DEGAS_WORKER_MODEL"] == "/here/it/is"
    supervised.process.send_signal(signal.SIGTERM)
    assert supervised.wait_exit() == 0
    supervised.assert_nothing_left()


@pytest.mark.parametrize(
    ("ends", "code"), [("sys.exit('degas worker: no such model')", 1), ("sys.exit(2)", 2), ("0", 1)]
)
def test_a_model_that_cannot_be_fetched_ends_the_start(
    start: Callable[..., Supervised], ends: str, code: int
) -> None:
    supervised = start(STAND_IN_FETCH=f"{LEAVE_PID}; {ends}")
    assert supervised.wait_exit() == code
    assert "the model was not fetched" in supervised.output()
    assert not any(name.startswith("worker") for name in supervised.pids())
    supervised.assert_nothing_left()


def test_a_stop_does_not_wait_for_a_download(start: Callable[..., Supervised]) -> None:
    supervised = start(STAND_IN_FETCH=f"{LEAVE_PID}; time.sleep(600)")
    supervised.wait_started("fetch")
    supervised.process.send_signal(signal.SIGTERM)
    assert supervised.wait_exit() == 0
    supervised.assert_nothing_left()


def test_children_that_will_not_end_are_killed(start: Callable[..., Supervised]) -> None:
    supervised = start(STAND_IN="stubborn")
    supervised.wait_ready()
    supervised.process.terminate()
    assert supervised.wait_exit() == 0
    assert "worker did not end in time" in supervised.output()
    supervised.assert_nothing_left()


def test_a_second_signal_does_not_wait(start: Callable[..., Supervised]) -> None:
    supervised = start(STAND_IN_GATEWAY="slow")
    supervised.wait_ready()
    supervised.process.terminate()
    supervised.until((supervised.folder / "worker-while-draining").exists, "drain begun")
    supervised.process.terminate()
    assert supervised.wait_exit() == 130
    supervised.assert_nothing_left()


def test_killing_the_supervisor_leaves_nothing(start: Callable[..., Supervised]) -> None:
    supervised = start()
    supervised.wait_ready()
    assert {"worker-0", "gateway-0", "grandchild-0"} <= set(supervised.pids())
    supervised.process.kill()
    supervised.wait_exit()
    supervised.assert_nothing_left()


def test_a_taken_port_is_named_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "degas", "serve", "--port", str(port), "--grpc-port", "0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 2
    assert str(port) in done.stderr and "--port" in done.stderr
