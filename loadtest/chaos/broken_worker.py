"""Owns a worker whose simulated device can be broken by a prompt: `python -m loadtest.chaos.broken_worker …`, then as `degas worker`.

Everything else is the real worker. A prompt with the id `ERROR_ID` makes the device report a fault, one with `DEATH_ID`
kills the process as a driver's crash would.
"""

from __future__ import annotations

import os
import signal
from typing import Final

from worker.__main__ import app
from worker.schedule.plan import StepPlan
from worker.sim.runner import SimRunner
from worker.step.contract import Progress

ERROR_ID: Final = 13
DEATH_ID: Final = 14


class DeviceFault(RuntimeError):
    """What a driver would report."""


def break_device() -> None:
    """Have the simulated device of this process take the orders."""
    launch = SimRunner.launch_forward

    def launch_or_break(self: SimRunner, slot_number: int, plan: StepPlan, progress: Progress) -> None:
        for chunk in plan.chunks:
            ids = chunk.seq.tokens[: chunk.seq.num_prompt]
            if DEATH_ID in ids:
                os.kill(os.getpid(), signal.SIGKILL)
            if ERROR_ID in ids:
                raise DeviceFault("an illegal memory access was encountered")
        launch(self, slot_number, plan, progress)

    SimRunner.launch_forward = launch_or_break  # type: ignore[method-assign]


if __name__ == "__main__":
    break_device()
    app(prog_name="degas worker")
