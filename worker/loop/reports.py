"""Owns what the decode thread tells gateways: tokens, terminal events, and how fast sequences end. Decode thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from shared.errors import ErrorCode
from shared.protocol import (
    Beat,
    Features,
    Finish,
    PromptLogprobs,
    Rejected,
    StepOutputs,
    Timing,
    TokenLogprobs,
    TokenValues,
    pack_i32,
    pack_i64,
)
from worker.loop.costs import Costs
from worker.loop.inbox import Outbox
from worker.loop.metrics import WorkerMetrics
from worker.schedule.drain_rate import DrainRate
from worker.schedule.plan import Committed, StepPlan, StepResult
from worker.schedule.refusal import Refusal
from worker.schedule.scheduler import Scheduler
from worker.schedule.sequence import Sequence


class Reports:
    """Builds the messages of commits and terminal events and leaves them in the outbox."""

    def __init__(
        self,
        outbox: Outbox,
        clock: Callable[[], float],
        epoch: int,
        metrics: WorkerMetrics,
        costs: Costs | None = None,
    ) -> None:
        self._outbox = outbox
        self._clock = clock
        self._epoch = epoch
        self.metrics = metrics
        self._costs = costs or Costs()
        self._drain_rate = DrainRate()

    def send_step(self, plan: StepPlan, done: Committed, result: StepResult) -> None:
        """One `StepOutputs` for each gateway that has a row or an end in this commit."""
        if not (done.rows or done.finished or done.scored):
            return
        gateways = {seq.gateway for seq in done.rows}
        gateways.update(seq.gateway for seq, _, _ in done.scored)
        gateways.update(seq.gateway for seq in done.finished)
        for gateway in gateways:
            mine: Iterable[int] = range(len(done.rows))
            if len(gateways) > 1:
                mine = [i for i in mine if done.rows[i].gateway == gateway]
            ids = [done.rows[i].sequence_id for i in mine]
            finishes = [self._finish_event(seq) for seq in done.finished if seq.gateway == gateway]
            message = StepOutputs(
                self._epoch,
                plan.step,
                pack_i64(ids),
                pack_i32([done.indexes[i] for i in mine]),
                pack_i32([done.token_ids[i] for i in mine]),
                finishes,
                _values(done, result, mine) if result.values is not None else [],
                _logprobs(done, result, mine) if result.logprobs is not None else [],
                [
                    PromptLogprobs(
                        seq.sequence_id,
                        at,
                        scores.logprobs,
                        scores.ranks,
                        scores.top_ids,
                        scores.top_logprobs,
                    )
                    for seq, at, scores in done.scored
                    if seq.gateway == gateway
                ],
            )
            self._outbox.send(gateway, message)

    def send_finish(self, seq: Sequence) -> None:
        """A terminal event outside of any step: cancelled, expired, failed."""
        message = StepOutputs(self._epoch, 0, b"", b"", b"", [self._finish_event(seq)])
        self._outbox.send(seq.gateway, message)

    def send_refusal(self, gateway: bytes, sequence_id: int, refusal: Refusal, num_waiting: int) -> None:
        """A request was not taken; nothing follows for it."""
        self.metrics.rejected_total += 1
        again_s = self.retry_after_s(num_waiting)
        rejected = Rejected(self._epoch, sequence_id, refusal.code, refusal.message, refusal.param, again_s)
        self._outbox.send(gateway, rejected)

    def send_features_refusal(self, gateway: bytes, job_id: int, code: ErrorCode, message: str) -> None:
        """A picture is not encoded here."""
        self._outbox.send(gateway, Features(self._epoch, job_id, None, code, message))

    def _finish_event(self, seq: Sequence) -> Finish:
        self.count_finish(seq)
        now_s = self._clock()
        first_planned_s = seq.first_planned_s or now_s
        first_token_s = seq.first_token_s or now_s
        timing = Timing(
            first_planned_s - seq.arrived_s, first_token_s - first_planned_s, max(0.0, now_s - first_token_s)
        )
        metrics = self.metrics
        metrics.queue_time.observe(timing.queue_s)
        metrics.prefill_time.observe(timing.prefill_s)
        metrics.decode_time.observe(timing.decode_s)
        self._drain_rate.on_end(now_s)
        code, text = seq.error or (None, "")
        assert seq.finish is not None
        return Finish(
            seq.sequence_id,
            seq.finish,
            seq.num_prompt,
            seq.num_generated,
            max(0, seq.cached_tokens - seq.given_tokens),
            code,
            text,
            timing,
            seq.preemptions,
        )

    def count_finish(self, seq: Sequence) -> None:
        """Count an ended sequence by its reason."""
        assert seq.finish is not None
        counts = self.metrics.finished_total
        counts[seq.finish.value] = counts.get(seq.finish.value, 0) + 1

    def send_beat(self, scheduler: Scheduler, *, draining: bool, loop_s: float, expected_s: float) -> None:
        """The loop's progress and figures, to every gateway. `loop_s`: how long the loop has run; `expected_s`: how
        long it may now be silent, at work on a step."""
        gauges = self.metrics.export()
        gauges["loop_seconds_total"] = loop_s
        gauges["preemptions_total"] = scheduler.num_preemptions
        gauges |= self._costs.figures(loop_s)
        if scheduler.cache is not None:
            gauges["prefix_cache_queries_total"] = scheduler.cache.num_query_tokens
            gauges["prefix_cache_hits_total"] = scheduler.cache.num_hit_tokens
        self._outbox.broadcast(
            Beat(
                self._epoch,
                self.metrics.steps_total,
                len(scheduler.running),
                len(scheduler.waiting),
                scheduler.pages.num_free + scheduler.pages.num_cached,
                scheduler.pages.total,
                draining,
                gauges,
                self.metrics.export_histograms(),
                self._drain_rate.per_s(self._clock(), len(scheduler.waiting)),
                expected_s,
            )
        )

    def retry_after_s(self, num_waiting: int) -> float:
        """When a place in the queue should be free, by the rate at which sequences have ended lately."""
        rate = self._drain_rate.per_s(self._clock(), num_waiting)
        return min(30.0, (num_waiting + 1) / rate) if rate else 1.0


def _values(done: Committed, result: StepResult, mine: Iterable[int]) -> list[TokenValues]:
    assert result.values is not None
    out = []
    for i in mine:
        seq = done.rows[i]
        if seq.is_spatial:
            source = done.source[i]
            scores = result.value_logprobs
            own = [] if scores is None or seq.sampling.num_logprobs < 0 else scores[source]
            out.append(
                TokenValues(seq.sequence_id, done.indexes[i], list(result.values[source]), logprobs=own)
            )
    return out


def _logprobs(done: Committed, result: StepResult, mine: Iterable[int]) -> list[TokenLogprobs]:
    assert result.logprobs is not None
    out = []
    for i in mine:
        seq = done.rows[i]
        num = seq.sampling.num_logprobs
        if num < 0 or seq.is_spatial:  # whose values have them
            continue
        source = done.source[i]
        ids = pack_i32(result.top_ids[source][:num]) if result.top_ids and num else b""
        top = result.top_logprobs[source][:num] if result.top_logprobs and num else []
        out.append(TokenLogprobs(seq.sequence_id, done.indexes[i], result.logprobs[source], ids, top))
    return out
