"""`degas doctor` on this machine, and what it says of a compiler that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from degas.doctor import CHECKS, examine
from degas.doctor_model import copy_bandwidth, model_lines
from worker.native import build
from worker.native.kernels_in_use import kernels_in_use


def test_this_machine_can_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert examine() == 0
    assert len(capsys.readouterr().out.splitlines()) >= len(CHECKS)


def test_a_machine_without_a_compiler_serves_and_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr("worker.native.kernels_in_use.prebuilt", lambda source: None)
    assert examine() == 0
    told = capsys.readouterr().out
    assert "no C++ compiler" in told and "install g++" in told


def test_the_kernels_in_use_have_names(capsys: pytest.CaptureFixture[str]) -> None:
    found = kernels_in_use()
    if not found.library:
        pytest.skip("nothing is compiled here yet")
    examine()
    told = capsys.readouterr().out
    assert found.library in told and f"kind: {found.instructions or 'none'}" in told
    assert ("Q4_K" in told) == ("float32" in found.products)


def test_nothing_is_compiled_only_to_tell_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr("worker.native.kernels_in_use.prebuilt", lambda source: None)
    examine()
    told = capsys.readouterr().out
    assert build.find_compiler() is None or "compiles them for this processor" in told
    assert not list(tmp_path.iterdir())


def test_what_a_model_takes_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("degas.doctor_model.MEASURED_S", 0.02)
    monkeypatch.setattr("degas.doctor_model.COPY_BYTES", 1 << 20)
    monkeypatch.setenv("DEGAS_WORKER_KV_BYTES", "16MiB")
    *planned, weights, pages, speed = model_lines("pocket")
    parts = [text.split()[0] for _, text, good in planned if good]
    assert parts[:2] == ["weights", "pages"] and "features" in parts and "fits" in planned[-1][1]
    assert weights[:2] == ("weights", weights[1]) and "4.0 million" in weights[1]
    assert (
        "of 16 tokens" in pages[1]
        and "tokens/s at one row" in speed[1]
        and all(good for _, _, good in (weights, pages, speed))
    )
    for name, told in (("org/none", "degas serve org/none"), (str(tmp_path), "config.json")):
        ((_, text, good),) = model_lines(name)
        assert told in text and not good
    monkeypatch.setenv("DEGAS_WORKER_QUANTIZE", "int8")
    monkeypatch.setenv("DEGAS_WORKER_DTYPE", "float16")  # bfloat16 is multiplied by blocks on some processors
    ((_, text, good),) = model_lines("pocket")
    assert "quantize is int8" in text and not good


def test_bandwidth_is_positive_and_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    assert copy_bandwidth(torch.device("cpu"), 2) > 1e6 and torch.get_num_threads() == before
