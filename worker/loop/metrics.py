"""Owns the worker's counters, as plain numbers the decode thread adds to and ships in each `Beat`. Decode thread.

Names here reach Prometheus with the prefix `degas_worker_`. Everything ending in `_total` or `_seconds_total`
only grows; the rest are gauges.
"""

from __future__ import annotations

from shared.histogram import Histogram
from worker.schedule.plan import StepPlan
from worker.step.contract import DeviceTimes, GraphCounts


class WorkerMetrics:
    """What the loop did since it started."""

    def __init__(self, graphs: GraphCounts) -> None:
        self.steps_total = 0
        self.step_rows_total = 0
        self.prefill_tokens_total = 0
        self.generation_tokens_total = 0
        self.zombie_rows_total = 0
        self.bubble_seconds_total = 0.0  # device idle while work was there
        self.device_busy_seconds_total = 0.0
        self.host_seconds_total = 0.0  # decode thread's own time in steps, waits left out
        self.wait_seconds_total = 0.0  # decode thread blocked on the device
        self.mask_seconds_total = 0.0  # building masks of constrained rows
        self.paced_rows_total = 0  # masks so slow that their sequence sat out until the next was built
        self.copy_seconds_total = 0.0  # from sampled to the outputs being on the host
        self.finished_total: dict[str, int] = {}
        self.rejected_total = 0
        self.duplicate_submits_total = 0
        self.sync_steps_total: dict[str, int] = {}  # by reason: `on_sync`
        self.eager_steps_total = graphs.eager_steps_total  # steps that ran without a graph, by kind
        self.captures_total = graphs.captures_total  # captured graphs by kind: startup, late, failed
        self.prefills_total: dict[str, int] = {}  # prompts that prefill workers were to compute, by outcome
        self.given_pages_total = 0  # that came from them
        self.given_page_bytes_total = 0
        self.given_seconds_total = 0.0  # that prompts waited for them
        self.sent_pages_total = 0  # of a prefill worker
        self.sent_page_bytes_total = 0
        self.depth = 0  # steps in flight after the last launch
        self.step_host = Histogram()
        self.step_wait = Histogram()
        self.step_bubble = Histogram()
        self.queue_time = Histogram()
        self.prefill_time = Histogram()
        self.decode_time = Histogram()

    def on_commit(
        self, plan: StepPlan, num_tokens: int, num_zombies: int, times: DeviceTimes, wait_s: float
    ) -> None:
        """A step was committed, for which the decode thread waited so long; `num_tokens` were accepted."""
        self.steps_total += 1
        self.step_rows_total += len(plan.samples)
        self.generation_tokens_total += num_tokens
        self.prefill_tokens_total += sum([chunk.num_tokens for chunk in plan.chunks])
        self.zombie_rows_total += num_zombies
        self.device_busy_seconds_total += times.busy_s
        self.copy_seconds_total += times.copy_s
        self.wait_seconds_total += wait_s
        self.step_wait.observe(wait_s)

    def on_sync(self, reason: str) -> None:
        """Count a step for which the device may have waited: `depth` (blocking mode), `idle` (no work before the step),
        `behind` (the host was late), `mask` (constrained rows needed their last token)."""
        self.sync_steps_total[reason] = self.sync_steps_total.get(reason, 0) + 1

    def on_bubble(self, idle_s: float) -> None:
        """The device had nothing to run for so long before a step, though there was work."""
        self.bubble_seconds_total += idle_s
        self.step_bubble.observe(idle_s)

    def export(self) -> dict[str, float]:
        """Counters and gauges by name; labelled ones as `name|label`."""
        out: dict[str, float] = {}
        for name, value in vars(self).items():
            if isinstance(value, dict):
                for label, count in value.items():
                    out[f"{name}|{label}"] = count
            elif not isinstance(value, Histogram):
                out[name] = value
        return out

    def export_histograms(self) -> dict[str, list[float]]:
        """Histograms by name."""
        return {name: value.export() for name, value in vars(self).items() if isinstance(value, Histogram)}
