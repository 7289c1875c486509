"""What a call of `loadtest/gpu/run.sh` leaves behind and refuses, without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.gpu.random_models import _words
from loadtest.gpu.results import gather, short_table
from shared.protocol import OverlappingTiles
from shared.tiling import canvas_for
from worker.formats.moondream_tokenizer import moondream_tokenizer

ROOT = Path(__file__).parents[4]
RUN = ROOT / "loadtest" / "gpu" / "run.sh"


def figures(shape: str, rows: int, step_ms: float, floor_ms: float, **other: object) -> dict[str, object]:
    base = {"shape": shape, "rows": rows, "depth": 2, "sampled": False, "path": "fused", "bubble_ms": 0.01}
    return {**base, "step_ms": step_ms, "floor_ms": floor_ms, **other}


def test_parts_become_one_file_and_a_table_of_multiples_of_the_floor(tmp_path: Path) -> None:
    decode = [
        figures("moondream2", 1, 1.3, 1.0),
        figures("moondream2", 32, 4.2, 2.0, bubble_ms=0.05),
        figures("moondream2", 8, 9.0, 1.0, depth=1),
    ]
    (tmp_path / "decode.json").write_text(json.dumps({"copy_bytes_per_s": 3e12, "figures": decode}))
    (tmp_path / "serve-3.json").write_text(json.dumps({"all": {"throughput_rps": 57.5}}))
    (tmp_path / "tests.log").write_text("passed")
    lines = short_table(gather(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "tests.log"]
    told = "\n".join(lines)
    assert re.search(r"moondream2, 1 rows: whole step +1\.300 × floor reach ≤ 1\.45 +met", told)
    assert re.search(r"moondream2, 32 rows: whole step +2\.100 × floor reach ≤ 1\.4 +MISSED", told)
    assert re.search(r"bubble: step less a replay +0\.050 ms +reach ≤ 0\.02 +MISSED", told)
    assert re.search(r"serve-3 tokens, requests a second +57\.500 /s +reach ≥ 55 +met", told)
    assert "8 rows" not in told, "the blocking loop has no reach"
    # A second call adds to the first's file; a part that ran again takes its place.
    (tmp_path / "decode.json").write_text(json.dumps({"copy_bytes_per_s": 4e12, "figures": []}))
    record = gather(tmp_path)
    assert record["decode"]["copy_bytes_per_s"] == 4e12 and "serve-3" in record


def test_a_smoke_run_says_nothing_is_met(tmp_path: Path) -> None:
    (tmp_path / "serve-3.json").write_text(json.dumps({"all": {"throughput_rps": 400.0}}))
    told = "\n".join(short_table(gather(tmp_path), smoke=True))
    assert "met" not in told and "MISSED" not in told and "400.000" in told


def test_the_wheels_are_the_tested_versions() -> None:
    pins = set((ROOT / "constraints.txt").read_text().split())
    wanted = [line for line in (RUN.parent / "wheels.txt").read_text().splitlines() if line[:1] not in "#"]
    assert len(wanted) == 10 and set(wanted) <= pins


def test_the_picture_of_the_serve_part_is_nine_crops() -> None:
    canvas = canvas_for(500, 700, crop_size=378, rule=OverlappingTiles(14, 4, 12))
    assert (canvas.tiles_h, canvas.tiles_w) == (2, 4)


def test_a_worker_takes_the_folder_that_the_serve_part_makes(tmp_path: Path) -> None:
    words = json.dumps(_words(51200)).encode()
    (tmp_path / "tokenizer.json").write_bytes(words)
    assert moondream_tokenizer({"config": {"text": {"vocab_size": 51200}}}, tmp_path) == words


def call(*arguments: str, python: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": python}
    return subprocess.run(
        ["bash", str(RUN), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_what_it_does_not_know_is_refused() -> None:
    assert call("third", python=sys.executable).returncode == 2
    nothing = call(python=sys.executable)
    assert nothing.returncode == 2 and "first, second" in nothing.stderr


@pytest.mark.slow
def test_a_missing_package_is_named_before_anything_runs(tmp_path: Path) -> None:
    """A Python without any package: as a bare machine to which no wheels were carried."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    done = subprocess.run(
        ["bash", str(RUN), "first"],
        env={"PATH": os.environ["PATH"], "PYTHON": str(bare), "OUT": str(tmp_path / "out")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1 and "missing here: torch" in done.stderr and "msgspec" in done.stderr
    assert "== tests" not in done.stdout


def test_each_call_fits_its_ten_minutes() -> None:
    text = RUN.read_text()
    limits = {name: int(seconds) for name, seconds in re.findall(r"run (\w+) (\d+) \d+ ", text)}
    for preset in ("first", "second"):
        named = re.search(rf"{preset}\) parts\+=\(([\w ]+)\)", text)
        assert named is not None
        assert sum(limits[part] for part in named[1].split()) <= 570, preset


def test_the_short_table_names_switches_that_stand_wrong() -> None:
    def line(turned: str, greedy_ms: float, rows: int = 1) -> dict[str, object]:
        return {"shape": "m", "rows": rows, "turned": turned, "greedy_ms": greedy_ms, "floor_ms": 1.0}

    figures = [
        line("as served", 1.5),
        line("histogram", 1.6),
        line("+own_products", 1.4),
        line("tail_norm", 1.48),
    ]
    told = short_table({"switches": {"figures": [*figures, line("+last_joins", 0.1, rows=8)]}})
    assert [said.strip() for said in told[1:]] == [
        "quicker with own_products: 100.0 µs",
        "quicker without tail_norm: 20.0 µs",
    ]
