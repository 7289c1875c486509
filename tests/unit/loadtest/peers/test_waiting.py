"""Waiting for processes: what they do is waited for, and their end, or too long a time, ends the wait with what they said."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from loadtest.bench.processes import WorkerProbe
from loadtest.peers.waiting import NUM_LINES, ProcessEnded, Watched, wait_ready, wait_until
from tests.integration.stack import stack

Start = Callable[[str], Watched]
FOREVER = "import time; print('up', flush=True); time.sleep(600)"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as children:

        def started(code: str) -> Watched:
            log = tmp_path / "log"
            with log.open("wb") as output:
                command = [sys.executable, "-I", "-S", "-c", code]
                process = subprocess.Popen(command, stdout=output, stderr=output)
            children.callback(process.wait)
            children.callback(process.kill)
            return Watched("the child", process, log)

        yield started


def test_what_a_process_does_is_waited_for(start: Start) -> None:
    child = start(FOREVER)
    assert wait_until(lambda: "up" in child.last_lines() and "found", "it is up", [child]) == "found"


@pytest.mark.parametrize("wait", ["until", "ready", "probe"])
def test_a_process_that_has_ended_is_told_at_once_with_its_last_lines(
    start: Start, tmp_path: Path, wait: str
) -> None:
    child = start("import sys; [print('line', i, flush=True) for i in range(100)]; sys.exit('no such model')")
    with pytest.raises(ProcessEnded, match="the child ended with exit code 1") as told:
        if wait == "until":
            wait_until(lambda: False, "it is up", [child], timeout_s=250)
        elif wait == "ready":
            wait_ready(NOWHERE, [child])
        else:
            WorkerProbe(f"ipc://{tmp_path}/nobody", [child])
    said = str(told.value)
    assert "no such model" in said and "line 99" in said and not re.search(r"^line 1$", said, re.MULTILINE)
    assert len(said.splitlines()) == 1 + NUM_LINES


def test_what_a_process_did_before_it_ended_counts(start: Start) -> None:
    child = start("print('done')")
    child.process.wait()
    assert wait_until(lambda: "done" in child.last_lines(), "it is done", [child])


def test_too_long_a_wait_ends_with_what_all_said(start: Start) -> None:
    child = start(FOREVER)
    wait_until(lambda: "up" in child.last_lines(), "it is up", [child])
    with pytest.raises(TimeoutError, match="in vain for this: a wonder\nthe child said:\nup"):
        wait_until(lambda: False, "a wonder", [child], timeout_s=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "settings", "name"),
    [(["--depth", "9"], {}, "worker"), (["--device", "sim"], {"max_queue": "-1"}, "gateway")],
)
def test_a_stack_whose_process_refuses_its_settings_says_so(
    flags: list[str], settings: dict[str, str], name: str
) -> None:
    with pytest.raises(ProcessEnded, match=rf"(?s)the {name} ended with exit code 2.*(depth|max_queue)"):  # noqa: SIM117
        with stack(flags, **settings):
            pass
