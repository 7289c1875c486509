"""One file in several engines: fake engines in real processes, and the figures that come out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from loadtest.peers import model_facts
from loadtest.peers.catalog import EnginePeer
from loadtest.peers.file_bench import PREFILL_TOKENS, FileWorkload, measure_file, prefill_rate
from loadtest.peers.side import Run

FAKE = "tests.unit.loadtest.peers.fake_engine"


def test_prefill_is_the_time_to_the_first_token() -> None:
    assert prefill_rate(Run([[1, 2]], 3.0, 3.0, 1.0, 1.0)) == PREFILL_TOKENS / 2.0
    assert prefill_rate(Run([[1, 2]], 3.0, 3.0)) is None


@pytest.mark.slow
def test_every_engine_gets_an_object_for_each_number_of_threads_and_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        model_facts, "model_facts", lambda path: model_facts.ModelFacts("Q4_0", 50, "float32")
    )
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    peers = [
        EnginePeer("degas", sys.executable, FAKE),
        EnginePeer("llama.cpp", sys.executable, FAKE, flags=["slow"], needs_gguf=True),
        EnginePeer("vllm", sys.executable, FAKE, flags=["raise"]),
    ]
    load = FileWorkload(file, rows=(1, 2), prompt_tokens=3, new_tokens=2, rounds=2, threads=(1,))
    done = measure_file(load, peers, [])
    lines = [line for line in done.figures() if line["engine"] != "vllm"]
    assert [(line["engine"], line["format"], line["rows"], line["threads"]) for line in lines] == [
        ("degas", "Q4_0", 1, 1),
        ("llama.cpp", "Q4_0", 1, 1),
        ("degas", "Q4_0", 2, 1),
        ("llama.cpp", "Q4_0", 2, 1),
    ]
    assert set(lines[0]) >= {"engine", "format", "rows", "threads", "decode_tps", "prefill_tps"}
    assert done.table() is not None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"path": Path("/nowhere.gguf")}, "there is nothing at /nowhere.gguf"),
        ({"rows": (0,)}, "--rows must be between 1 and 256"),
        ({"new_tokens": 1}, "--new-tokens must be between 2 and 1024"),
        ({"threads": (0,)}, "--threads must be between 1"),
    ],
)
def test_what_is_out_of_bounds_is_named(tmp_path: Path, fields: dict[str, object], words: str) -> None:
    load = FileWorkload(**{"path": tmp_path, **fields})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words):
        load.check()


def test_a_folder_that_holds_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        model_facts.model_facts(tmp_path)
