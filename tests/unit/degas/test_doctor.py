"""`degas doctor` on this machine, and what it says of a compiler that is not there."""

from __future__ import annotations

import pytest

from degas.doctor import CHECKS, examine
from worker.native import build


def test_this_machine_can_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert examine() == 0
    assert len(capsys.readouterr().out.splitlines()) >= len(CHECKS)


def test_a_machine_without_a_compiler_serves_and_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(build, "prebuilt", lambda source: None)
    assert examine() == 0
    told = capsys.readouterr().out
    assert "no C++ compiler" in told and "install g++" in told
