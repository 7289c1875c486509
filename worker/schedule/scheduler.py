"""Owns what runs in the next step: admission, chunked prefill, decode rows, pages, preemption. Pure; decode thread.

Takes submissions, cancellations, step results and the time; returns plans and finished sequences. It never
reads a clock and never touches a device.
"""

from __future__ import annotations

from shared.errors import ErrorCode, FinishReason
from worker.constraints.automaton import TokenAutomaton, TokenTables
from worker.schedule.automaton_places import AutomatonPlaces
from worker.schedule.budget import StepBudget
from worker.schedule.life import Life, MaskLife
from worker.schedule.limits import SchedulerLimits
from worker.schedule.pace import Pace, guessed_costs, load_of_chunk, load_of_step
from worker.schedule.pages import PagePool
from worker.schedule.plan import Chunk, Committed, StepPlan, StepResult, crops_of, take_scores
from worker.schedule.prefix_cache import PrefixCache
from worker.schedule.refusal import Refusal
from worker.schedule.sequence import Sequence
from worker.schedule.waiting import WaitingQueue

# Read for every row of every step, and looking up an enum's member costs time.
RUNNING, PREEMPTED, AWAITED, NO_MASK = Life.RUNNING, Life.PREEMPTED, MaskLife.AWAITED, MaskLife.NONE


class Scheduler:
    """Sequences waiting and running, and the pages and rows they hold."""

    def __init__(
        self,
        limits: SchedulerLimits,
        pages: PagePool,
        cache: PrefixCache | None = None,
        automata: AutomatonPlaces | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.limits = limits
        self.pace = pace or Pace(guessed_costs(1, 1e6))
        self.automata = automata
        self.pages = pages
        self.cache = cache
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # in order of admission; zombies stay until released
        self.sequences: dict[tuple[bytes, int], Sequence] = {}
        self.free_rows = list(range(limits.max_rows - 1, -1, -1))
        self.num_preemptions = 0
        self._num_deadlines = 0
        self._step = 0

    # ------------------------------------------------------------------ events

    def submit(self, seq: Sequence) -> None:
        """Queue a new sequence. Raises `Refusal` when it can never fit, or the queue is full."""
        limits = self.limits
        limits.check(seq, self.pages.total * self.pages.page_tokens)
        # Rows and queue are counted together, as gateways count: for a gateway a row is free as soon as its sequence has
        # ended, here only when nothing in flight holds it.
        if len(self.sequences) >= limits.max_rows + limits.max_waiting:
            raise Refusal(
                ErrorCode.QUEUE_FULL, f"{len(self.sequences)} sequences are running or waiting already"
            )
        key = (seq.gateway, seq.sequence_id)
        assert key not in self.sequences, "the engine drops duplicates"
        self.sequences[key] = seq
        seq.num_known = len(seq.tokens)
        self._num_deadlines += seq.deadline_s > 0
        self.waiting.push(seq)

    def cancel(self, gateway: bytes, sequence_id: int, reason: FinishReason) -> Sequence | None:
        """Finish a sequence now; its row stays a zombie while in flight. None if it is not live."""
        seq = self.sequences.get((gateway, sequence_id))
        if seq is None or seq.finish is not None:
            return None
        self._finish(seq, reason)
        return seq

    def cancel_gateway(self, gateway: bytes) -> list[Sequence]:
        """Finish everything a gateway submitted: its lease ran out."""
        keys = [key for key in self.sequences if key[0] == gateway]
        ended = (self.cancel(gateway, sequence_id, FinishReason.CANCELLED) for _, sequence_id in keys)
        return [seq for seq in ended if seq is not None]

    def fail(self, seq: Sequence, code: ErrorCode, message: str) -> None:
        """Finish one live sequence with an error."""
        self._finish(seq, FinishReason.ERROR, (code, message))

    def abandon(self, code: ErrorCode, message: str) -> list[Sequence]:
        """The device is lost: finish every live sequence, and release nothing. Returns them."""
        live = [seq for seq in self.sequences.values() if seq.finish is None]
        for seq in live:
            seq.end(FinishReason.ERROR, (code, message))
        return live

    def expire(self, now_s: float) -> list[Sequence]:
        """Finish every sequence whose deadline has passed."""
        if not self._num_deadlines:
            return []
        late = [s for s in self.sequences.values() if 0 < s.deadline_s <= now_s and s.finish is None]
        for seq in late:
            self._finish(seq, FinishReason.DEADLINE)
        return late

    @property
    def has_work(self) -> bool:
        """Some sequence waits, runs, or is still in flight."""
        return bool(self.running) or len(self.waiting) > 0

    # ------------------------------------------------------------------ planning

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step, or None when nothing can run now. Advances the launched counters of its rows.

        The caller launches every plan it gets: `inflight_refs` counts it from here (I3).
        """
        decode: list[Sequence] = []
        prefilling: list[Sequence] = []
        stalled: list[Sequence] = []
        page_tokens = self.pages.page_tokens
        for seq in self.running:
            if seq.life is not RUNNING or seq.mask is AWAITED:
                continue
            if seq.num_computed < seq.num_known:
                prefilling.append(seq)
            elif seq.num_sampled < seq.max_tokens:  # I12
                if seq.num_computed < len(seq.pages) * page_tokens or self._grow(seq, seq.num_computed + 1):
                    decode.append(seq)
                else:
                    stalled.append(seq)
        if stalled:
            self._preempt_for(stalled, decode, prefilling)
        chunks, admitted = self._plan_prefill(prefilling, decode, blocked=bool(stalled), now_s=now_s)
        if not decode and not chunks:
            return None
        return self._take_into_step(decode, chunks, admitted)

    def _plan_prefill(
        self, prefilling: list[Sequence], decode: list[Sequence], *, blocked: bool, now_s: float
    ) -> tuple[list[Chunk], list[Sequence]]:
        budget = StepBudget(self.limits, self.pace, self.pages.page_tokens, decode)
        chunks: list[Chunk] = []
        admitted: list[Sequence] = []
        for seq in prefilling:
            chunk = budget.cut(seq)
            if chunk is None:
                return chunks, admitted
            chunks.append(chunk)
        # A stalled decode row gets pages first: a sequence admitted now would only be preempted again.
        while not blocked and self.free_rows and budget.has_room:
            best = self.waiting.peek()
            if best is None or best.mask is AWAITED or not self._has_room(best):
                break
            if not self.pace.row_fits([seq.num_known for seq in self.running], len(best.tokens)):
                break  # it would widen every running stream's gaps beyond the bound
            if self.cache is not None and not best.is_scored:  # a cached page has no logits
                best.num_computed = best.cached_tokens = self.cache.match(best)
            # A prompt's pages are taken whole: half-prefilled sequences never wait for each other's.
            chunk = budget.cut(best) if self._grow(best, best.num_known) else None
            if chunk is None:
                self._drop_pages(best)
                break
            chunks.append(chunk)
            self.waiting.take(best)
            best.row = self.free_rows.pop()
            best.move_to(Life.RUNNING)
            if not best.first_planned_s:
                best.first_planned_s = now_s
            self.running.append(best)
            admitted.append(best)
        return chunks, admitted

    def _take_into_step(
        self, decode: list[Sequence], chunks: list[Chunk], admitted: list[Sequence]
    ) -> StepPlan:
        """Count the rows of a step as in flight, and write down what it does."""
        samples: list[Sequence] = list(decode)
        indexes = [seq.num_sampled for seq in decode]
        positions = [seq.num_computed for seq in decode]
        for seq in decode:
            seq.num_computed += 1
            seq.num_sampled += 1
            seq.inflight_refs += 1
        for chunk in chunks:
            seq = chunk.seq
            seq.num_computed += chunk.num_tokens
            seq.inflight_refs += 1
            if chunk.is_last:
                samples.append(seq)
                indexes.append(seq.num_sampled)
                seq.num_sampled += 1
        tables = [table for seq in admitted if (table := self._place_automaton(seq)) is not None]
        for seq, index in zip(samples, indexes, strict=True):
            if seq.budget is not None:
                seq.watch_budget(index)
        deferred = [i for i, seq in enumerate(samples) if seq.mask is not NO_MASK]
        self._step += 1
        load = load_of_step(positions, [load_of_chunk(c.start, c.num_tokens, crops_of(c)) for c in chunks])
        adjusted = any([seq.is_adjusted for seq in samples])
        return StepPlan(
            self._step,
            decode,
            positions,
            chunks,
            samples,
            indexes,
            deferred,
            admitted,
            tables,
            any_adjusted=adjusted,
            load=load,
            expected_s=self.pace.costs.of(load) * (2 if any([c.num_scored for c in chunks]) else 1),
        )

    def _place_automaton(self, seq: Sequence) -> tuple[int, TokenTables] | None:
        """Find an admitted sequence's automaton a place on the device; returns what must be uploaded for it."""
        if self.automata is None or not isinstance(seq.constraint, TokenAutomaton):
            return None
        placed = self.automata.take(seq.constraint.tables)
        if placed is None:
            return None  # no room: the host makes its masks
        place, is_new = placed
        seq.place_automaton(place)
        return (place, seq.constraint.tables) if is_new else None

    # ------------------------------------------------------------------ commit

    def commit_rows(self, plan: StepPlan, result: StepResult, now_s: float) -> Committed:
        """Accept the outputs of a step's decode rows alone, before those of its chunks are known. `commit` follows, from
        the first sample that is none of them."""
        return self._accept(plan, result, now_s, 0, len(plan.decode))

    def commit(
        self, plan: StepPlan, result: StepResult, now_s: float, *, busy_s: float = 0.0, first: int = 0
    ) -> Committed:
        """Accept a step's outputs in order: advance, finish, release. Every row is counted off once (I3, I6).

        `busy_s`: for how long it kept the device busy. `first`: samples before it were accepted by `commit_rows`.
        """
        scored = take_scores(plan, result) if result.scores else []
        if not scored:  # its chunks cost more than others of their length
            self.pace.on_step(plan.load, busy_s)
        for chunk in plan.chunks:
            if not chunk.is_last:
                chunk.seq.inflight_refs -= 1
                self._settle(chunk.seq)
        done = self._accept(plan, result, now_s, first, len(plan.samples))
        done.scored = scored
        return done

    def _accept(self, plan: StepPlan, result: StepResult, now_s: float, first: int, last: int) -> Committed:
        """Accept samples [first, last)."""
        out = Committed()
        values, token_ids, bad = result.values, result.token_ids, result.bad
        rows, indexes, ids, source, finished = out.rows, out.indexes, out.token_ids, out.source, out.finished
        for i in range(first, last):
            seq = plan.samples[i]
            seq.inflight_refs -= 1
            if seq.finish is not None:
                out.num_zombies += 1
                self._settle(seq)
                continue
            token_id, tokens = token_ids[i], seq.tokens
            if bad[i]:
                if self.cache is not None:
                    self.cache.forget(seq)
                self.fail(seq, ErrorCode.NUMERICAL_ERROR, "the model produced a NaN for this sequence")
                finished.append(seq)
                continue
            index = len(tokens) - seq.num_prompt
            if not index:
                seq.first_token_s = now_s
                if self.cache is not None:
                    self.cache.insert(
                        seq, seq.num_prompt
                    )  # so that other questions about the same picture can use the pages at once
            tokens.append(token_id)
            constraint = seq.constraint
            if constraint is not None:
                try:
                    constraint.advance(token_id)
                except ValueError as error:
                    self.fail(seq, ErrorCode.INTERNAL, f"the constraint refused its own token: {error}")
                    finished.append(seq)
                    continue
                if values is not None and seq.is_spatial:
                    seq.values[index] = values[i]
            if token_id in seq.stop_ids:
                self._finish(seq, FinishReason.STOP)
                finished.append(seq)
                continue
            rows.append(seq)
            indexes.append(index)
            ids.append(token_id)
            source.append(i)
            if constraint is not None and constraint.is_complete():
                self._finish(seq, FinishReason.STOP)  # only an end could follow, so no step is run for it
                finished.append(seq)
            elif index + 1 >= seq.max_tokens:
                self._finish(seq, FinishReason.LENGTH)
                finished.append(seq)
            elif seq.life is PREEMPTED:
                self._settle(seq)
        return out

    # ------------------------------------------------------------------ resources

    def _finish(
        self, seq: Sequence, reason: FinishReason, error: tuple[ErrorCode, str] | None = None
    ) -> None:
        was_waiting = seq.life is Life.WAITING
        seq.end(reason, error)
        self._num_deadlines -= seq.deadline_s > 0
        del self.sequences[(seq.gateway, seq.sequence_id)]
        if was_waiting:
            self.waiting.remove(seq)
            seq.move_to(Life.RELEASED)
        else:
            self._settle(seq)

    def _settle(self, seq: Sequence) -> None:
        """Release rows and pages of a finished or preempted sequence once nothing in flight holds it (I5)."""
        if seq.inflight_refs or not seq.holds:
            return
        if self.cache is not None and seq.error is None:
            self.cache.insert(seq, min(seq.num_computed, len(seq.tokens)))
        if seq.life is Life.FINISHED:
            self._release(seq)
            seq.move_to(Life.RELEASED)
        elif seq.life is Life.PREEMPTED:
            self._release(seq)
            seq.move_to(Life.WAITING)
            seq.num_known = len(seq.tokens)
            self.waiting.push_front(seq)

    def _release(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.free_rows.append(seq.row)
        seq.row = -1
        if self.automata is not None and seq.table_place:
            self.automata.drop(seq.table_place)
            seq.place_automaton(0)
        self._drop_pages(seq)

    def _drop_pages(self, seq: Sequence) -> None:
        if self.cache is not None:
            self.cache.release(seq)
        else:
            self.pages.drop_all(seq.pages)
            seq.pages = []  # a new list: slots know a row's table by it (worker.step.staging)
        seq.num_computed = 0

    def _grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Give `seq` pages for `num_tokens` positions; all or nothing."""
        need = self.pages.pages_for(num_tokens) - len(seq.pages)
        if need <= 0:
            return True
        if not self._make_room(need):
            return False
        for _ in range(need):
            seq.pages.append(self.pages.take())
        return True

    def _make_room(self, num_pages: int) -> bool:
        short = num_pages - self.pages.num_free
        if short > 0 and self.cache is not None:
            self.cache.evict(short)
        return self.pages.num_free >= num_pages

    def _has_room(self, seq: Sequence) -> bool:
        """Whether all of a waiting sequence's known tokens and one more would fit now."""
        need = self.pages.pages_for(len(seq.tokens) + 1)
        return need <= self.pages.num_free + self.pages.num_cached

    def _preempt_for(
        self, stalled: list[Sequence], decode: list[Sequence], prefilling: list[Sequence]
    ) -> None:
        """Take pages back from the youngest running sequence, unless some are about to come back anyway."""
        if any(s.life is Life.PREEMPTED or (s.finish is not None and s.inflight_refs) for s in self.running):
            return
        oldest = stalled[0]
        for victim in reversed(self.running):
            if victim is oldest or victim.life is not Life.RUNNING:
                continue
            for rows in (stalled, decode, prefilling):
                if victim in rows:
                    rows.remove(victim)
            victim.move_to(Life.PREEMPTED)
            victim.preemptions += 1
            self.num_preemptions += 1
            self._settle(victim)  # at once if nothing in flight holds it, else at its last commit
            break
        decode.extend(seq for seq in stalled if self._grow(seq, seq.num_computed + 1))
