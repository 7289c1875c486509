"""Owns a recording of the loop as Chrome-trace events: host, compute and copy lanes. Decode thread.

Open the result in Perfetto or chrome://tracing. Device spans are chained from durations the device measured
itself and anchored once to the host's clock, so lanes agree to within one copy.
"""

from __future__ import annotations

from typing import Any

import msgspec

from worker.schedule.pipeline import InFlight

HOST, COMPUTE, COPY = 1, 2, 3
LANES = {HOST: "host (decode thread)", COMPUTE: "compute stream", COPY: "copy to host"}


class TraceRecorder:
    """Collects spans for `num_steps` commits. Times in seconds on the engine's clock."""

    def __init__(self, num_steps: int) -> None:
        self._left = num_steps
        self._events: list[dict[str, Any]] = []
        self._device_s: float | None = None

    def span(self, lane: int, name: str, start_s: float, end_s: float, **args: object) -> None:
        """One bar."""
        if end_s > start_s:
            event = {
                "name": name,
                "ph": "X",
                "pid": 1,
                "tid": lane,
                "ts": start_s * 1e6,
                "dur": (end_s - start_s) * 1e6,
            }
            self._events.append({**event, "args": args} if args else event)

    def on_commit(self, step: InFlight, *, busy_s: float, idle_s: float, read_s: float) -> bool:
        """A step's outputs were read at `read_s`; returns whether the recording is complete."""
        if self._device_s is None:
            self._device_s = read_s - busy_s - idle_s
        start_s = self._device_s + idle_s
        end_s = start_s + busy_s
        plan = step.plan
        name = f"step {plan.step}"
        rows = {"decode_rows": len(plan.decode), "prefill_tokens": plan.num_tokens - len(plan.decode)}
        if step.follows:
            self.span(COMPUTE, "bubble", self._device_s, start_s)
        self.span(COMPUTE, name, start_s, end_s, slot=step.slot, **rows)
        self.span(COPY, name, end_s, max(end_s, read_s))
        self._device_s = end_s
        self._left -= 1
        return self._left <= 0

    def to_json(self) -> bytes:
        """The recording as a Chrome-trace file."""
        names = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": lane, "args": {"name": name}}
            for lane, name in LANES.items()
        ]
        return msgspec.json.encode({"traceEvents": names + self._events, "displayTimeUnit": "ms"})
