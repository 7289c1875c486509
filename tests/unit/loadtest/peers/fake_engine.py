"""A peer in a process of its own that answers as told: `python -m tests.unit.loadtest.peers.fake_engine BEHAVIOUR…`."""

from __future__ import annotations

import os
import sys
import time

from loadtest.peers.side import Run, Spec, serve

BEHAVIOURS = set(sys.argv[1:])


class FakeEngine:
    """Continues a prompt by its last id plus 1, 2, …; every run takes a second by its own account."""

    version = "fake 1"

    def __init__(self, spec: Spec) -> None:
        if "refuse" in BEHAVIOURS:
            raise ValueError(f"no weights in {spec.folder}")
        self._runs = 0

    def warm(self, prompts: list[list[int]], new_tokens: int) -> str:
        print("an engine prints what it likes")
        return "warmed"

    def run(self, prompts: list[list[int]], new_tokens: int) -> Run:
        self._runs += 1
        if "crash" in BEHAVIOURS:
            print("segmentation fault, more or less", file=sys.stderr, flush=True)
            os._exit(1)
        if "hang" in BEHAVIOURS:
            time.sleep(600)
        if "raise-second" in BEHAVIOURS and self._runs == 2:
            raise RuntimeError("out of luck")
        missing = 1 if "short" in BEHAVIOURS else 0
        tokens = [[row[-1] + step for step in range(1, new_tokens + 1 - missing)] for row in prompts]
        pace_s = 2.0 if "slow" in BEHAVIOURS else 1.0
        return Run(tokens, pace_s, pace_s / 2, pace_s / 4, pace_s / 8)


if __name__ == "__main__":
    serve(FakeEngine)
