"""Owns the recording that a gateway asked for, while it runs. Decode thread."""

from __future__ import annotations

from shared.protocol import TraceChunk
from worker.loop.inbox import Outbox
from worker.loop.trace import HOST, TraceRecorder
from worker.schedule.pipeline import InFlight
from worker.step.contract import DeviceTimes

MAX_STEPS = 2000


class Recording:
    """Records steps from `begin` on, and sends the complete recording to the gateway that asked."""

    def __init__(self, outbox: Outbox, epoch: int) -> None:
        self._outbox = outbox
        self._epoch = epoch
        self._gateway = b""
        self._recorder: TraceRecorder | None = None

    def begin(self, gateway: bytes, num_steps: int) -> None:
        """Record the next steps for this gateway; a recording that runs is dropped."""
        self._gateway = gateway
        self._recorder = TraceRecorder(min(max(num_steps, 1), MAX_STEPS))

    @property
    def is_on(self) -> bool:
        """Whether a recording runs."""
        return self._recorder is not None

    def on_host(self, name: str, start_s: float, end_s: float) -> None:
        """Note what the decode thread did, and for how long."""
        if self._recorder is not None:
            self._recorder.span(HOST, name, start_s, end_s)

    def on_commit(self, step: InFlight, read_s: float, times: DeviceTimes) -> None:
        """A step's outputs were read at `read_s`."""
        recorder = self._recorder
        if recorder is not None and recorder.on_commit(
            step, busy_s=times.busy_s, idle_s=times.idle_s, read_s=read_s
        ):
            self._outbox.send(self._gateway, TraceChunk(self._epoch, step.plan.step), [recorder.to_json()])
            self._recorder = None
