"""What counts as evidence against a request whose worker was lost: crashes, not slowness."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from gateway.decisions.recovery import is_guilty


@dataclass
class Suspect:
    attempts: int
    num_crashes: int
    crashed_alone: bool = False


@pytest.mark.parametrize(
    ("suspect", "guilty"),
    [
        (Suspect(2, 2), True),  # a crash each time
        (Suspect(2, 1), False),  # one crash, among others; the other worker fell silent
        (Suspect(2, 0), False),  # two workers that were slow, stopped or hung
        (Suspect(2, 1, crashed_alone=True), True),
        (Suspect(0, 0), False),
    ],
)
def test_evidence(suspect: Suspect, guilty: bool) -> None:
    assert is_guilty(suspect) is guilty
