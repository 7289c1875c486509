"""A worker on the simulated device with a virtual clock, and the sequential oracle its outputs must equal."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np

from shared.errors import FinishReason
from shared.protocol import (
    Beat,
    Cancel,
    FeatureFormat,
    Finish,
    FromWorker,
    Grammar,
    ImageInput,
    ModelCard,
    PromptLogprobs,
    Rejected,
    Sampling,
    StepOutputs,
    Submit,
    ThinkingBudget,
    TraceChunk,
    pack_i32,
    unpack_i32,
    unpack_i64,
)
from tests.two_sheets import image_input
from tests.unit.worker.constraints.spatial_grammar import SpatialGrammar
from worker.constraints.constraint import Constraint
from worker.constraints.thought_budget import ThoughtBudget
from worker.loop.engine import Engine
from worker.loop.inbox import Command, CompiledSubmit, Inbox, MaskReady, Outbox, Prefills, Received
from worker.loop.masks import MaskFiller
from worker.loop.page_export import PageExport
from worker.loop.page_intake import PageIntake
from worker.schedule.automaton_places import AutomatonPlaces, TableLimits
from worker.schedule.depth import DepthGovernor
from worker.schedule.kv_events import AllBlocksCleared, BlockRemoved, KvEvent, KvEvents, hash_of
from worker.schedule.limits import SchedulerLimits
from worker.schedule.pace import Pace
from worker.schedule.pages import PagePool
from worker.schedule.prefix_cache import PrefixCache
from worker.schedule.rng import uniform
from worker.schedule.scheduler import Scheduler
from worker.sim.page_store import SimPages
from worker.sim.profiles import TEST, Profile
from worker.sim.runner import (
    NAN_TOKEN,
    SimRunner,
    choose,
    fake_card,
    image_mark,
    mark_of,
    prefix_hash,
    score_of,
    value_of,
)
from worker.sim.timeline import VirtualClock
from worker.step.staging import StepShape

GATEWAY = b"gateway-0"
EPOCH = 7
CARD = fake_card()


@dataclass
class Stream:
    """What one sequence's client has seen."""

    submit: Submit
    tokens: list[int] = field(default_factory=list)
    values: list[tuple[float, float]] = field(default_factory=list)
    finish: Finish | None = None
    rejected: Rejected | None = None
    cancelled: bool = False
    gateway: bytes = GATEWAY
    scores: list[tuple[float, int, list[int], list[float]]] = field(default_factory=list)  # of the prompt
    logprobs: list[float] = field(default_factory=list)  # of its tokens
    value_logprobs: list[list[float]] = field(default_factory=list)


class RecordingOutbox:
    """Collects what the decode thread sends, checking order and terminal events as it goes (I11)."""

    def __init__(self) -> None:
        self.streams: dict[tuple[bytes, int], Stream] = {}
        self.beats: list[Beat] = []
        self.traces: list[bytes] = []

    def send(self, gateway: bytes, message: FromWorker, payloads: list[bytes] | None = None) -> None:
        if isinstance(message, TraceChunk):
            self.traces.extend(payloads or [])
            return
        if isinstance(message, Rejected):
            stream = self.streams[gateway, message.sequence_id]
            assert stream.rejected is None and stream.finish is None
            stream.rejected = message
            return
        assert isinstance(message, StepOutputs), message
        assert message.epoch == EPOCH
        for own in message.logprobs:
            self.streams[gateway, own.sequence_id].logprobs.append(own.logprob)
        for item in message.prompt_logprobs:
            stream = self.streams[gateway, item.sequence_id]
            assert stream.finish is None and not stream.tokens, "a prompt's scores after its answer"
            assert item.first == len(stream.scores) + 1, "a gap or a repeat"
            stream.scores += unpack_scores(item)
        rows = zip(
            unpack_i64(message.sequence_ids),
            unpack_i32(message.first_index),
            unpack_i32(message.token_ids),
            strict=True,
        )
        for sequence_id, index, token_id in rows:
            stream = self.streams[gateway, sequence_id]
            assert stream.finish is None, "a token after the terminal event"
            assert index == len(stream.tokens), "a gap or a repeat"
            stream.tokens.append(token_id)
        for value in message.values:
            stream = self.streams[gateway, value.sequence_id]
            assert value.token_index == len(stream.values)
            stream.values.append((value.values[0], value.values[1]))
            stream.value_logprobs.append(value.logprobs)
        for finish in message.finishes:
            stream = self.streams[gateway, finish.sequence_id]
            assert stream.finish is None, "two terminal events"
            stream.finish = finish

    def broadcast(self, message: FromWorker) -> None:
        if isinstance(message, Beat):
            self.beats.append(message)


def unpack_scores(item: PromptLogprobs) -> list[tuple[float, int, list[int], list[float]]]:
    """Logprob, rank, and the most likely ids with theirs, of each token."""
    logprobs = np.frombuffer(item.logprobs, np.float32).tolist()
    ranks = np.frombuffer(item.ranks, np.int32).tolist()
    ids = np.frombuffer(item.top_ids, np.int32).reshape(len(ranks), -1).tolist()
    tops = np.frombuffer(item.top_logprobs, np.float32).reshape(len(ranks), -1).tolist()
    return list(zip(logprobs, ranks, ids, tops, strict=True))


def punctual_masks() -> MaskFiller:
    """A filler to which no mask is ever slow, however busy the machine."""

    def never(ready: MaskReady) -> None:
        raise AssertionError("a mask was built ahead")

    return MaskFiller(never, clock=lambda: 0.0)


class SimWorker:
    """One real engine over one simulated device; `outbox` is whatever takes what it says."""

    def __init__(
        self,
        outbox: Outbox,
        *,
        epoch: int = EPOCH,
        inbox: Inbox | None = None,
        depth: int = 2,
        num_slots: int = 2,
        max_rows: int = 4,
        num_pages: int = 64,
        page_tokens: int = 4,
        step_tokens: int = 32,
        mixed_tokens: int | None = None,
        max_waiting: int = 64,
        max_sequence_tokens: int = 128,
        prefix_cache: bool = True,
        clock: VirtualClock | None = None,
        profile: Profile = TEST,
        exact: bool = True,
        jitter_seed: int | None = None,
        late_launch: bool = True,
        automata: bool = True,
        card: ModelCard = CARD,
        masks: MaskFiller | None = None,
        governor: DepthGovernor | None = None,
        pace: Pace | None = None,
        on_beat: Callable[[int, float], None] | None = None,
        format: FeatureFormat | None = None,
        prefills: Prefills | None = None,
        prefill_wait_s: float = 2.0,
        prefill_bytes: int = 1 << 20,
        gives_pages: bool = False,
    ) -> None:
        """`prefills`: where pages are asked for, as with the role decode; `gives_pages`: it has the role prefill."""
        self.clock = clock or VirtualClock()
        self.epoch = epoch
        self.inbox: Inbox = inbox or SimpleQueue()
        self.pool = PagePool(num_pages, page_tokens)
        self.cache = PrefixCache(self.pool, KvEvents()) if prefix_cache else None
        self.published: set[int] = set()  # what those know who are told of the prefix cache
        limits = SchedulerLimits(
            max_rows=max_rows,
            max_waiting=max_waiting,
            step_tokens=step_tokens,
            mixed_tokens=mixed_tokens or step_tokens,
            max_sequence_tokens=max_sequence_tokens,
        )
        places = AutomatonPlaces(TableLimits(num_places=3)) if automata else None
        self.scheduler = Scheduler(limits, self.pool, self.cache, places, pace)
        jitter = None
        if jitter_seed is not None:
            jitter = np.random.default_rng(jitter_seed).uniform(0.02, 3.0, 997)
        self.runner = SimRunner(
            card,
            self.clock,
            profile,
            StepShape(
                max_rows=max_rows,
                max_sequence_tokens=max_sequence_tokens,
                step_tokens=step_tokens,
                page_tokens=page_tokens,
                num_pages=num_pages,
                vocab_size=card.vocab_size,
                num_slots=num_slots,
            ),
            exact=exact,
            jitter=jitter,
        )
        self.store = SimPages(self.runner)
        self.intake: PageIntake | None = None
        if prefills is not None and self.cache is not None:
            self.intake = PageIntake(
                prefills,
                self.store,
                self.scheduler,
                self.cache,
                self.clock.now,
                wait_s=prefill_wait_s,
                max_bytes=prefill_bytes,
            )
        self.engine = Engine(
            self.scheduler,
            self.runner,
            card,
            inbox=self.inbox,
            outbox=outbox,
            clock=self.clock.now,
            epoch=epoch,
            depth=depth,
            late_launch=late_launch,
            on_kv_events=self._on_kv_events,
            wait_for_command=self._wait_for_command,
            governor=governor,
            masks=masks or punctual_masks(),
            on_beat=on_beat,
            format=format,
            intake=self.intake,
            export=PageExport(outbox, self.store, epoch) if gives_pages else None,
        )

    def _on_kv_events(self, events: list[KvEvent]) -> None:
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self.published.clear()
            elif isinstance(event, BlockRemoved):
                assert self.published.issuperset(event.hashes), "gone before it was there"
                self.published.difference_update(event.hashes)
            else:
                assert self.published.isdisjoint(event.hashes), "stored twice"
                assert event.parent is None or event.parent in self.published
                assert len(event.token_ids) == len(event.hashes) * event.block_tokens
                self.published.update(event.hashes)

    def _wait_for_command(self, timeout_s: float) -> Command | None:
        """Waiting on a virtual clock: what is there comes now, else the time passes."""
        if not self.inbox.empty():
            return self.inbox.get()
        self.clock.sleep_until(self.clock.now() + timeout_s)
        return None

    def tick(self) -> bool:
        """One tick, then every invariant that can be seen from outside."""
        progress = self.engine.tick()
        self.check()
        return progress

    def run(self, max_ticks: int = 10_000) -> None:
        """Tick until nothing is left to do."""
        for _ in range(max_ticks):
            if not self.tick() and self.inbox.empty():
                assert not self.scheduler.has_work, "work is left but nothing can run: a livelock"
                assert not len(self.engine.pipeline)
                return
        raise AssertionError("the loop does not come to rest")

    def check(self) -> None:
        """I3, I5, I7, I12, and that rows, sequences and queues agree."""
        scheduler, pipeline = self.scheduler, self.engine.pipeline
        self.pool.check()
        if self.cache is not None:
            self.cache.check()
            self._on_kv_events(self.cache.take_events())
            assert self.published == {hash_of(key) for key in self.cache.keys}
        in_flight: dict[int, int] = {}
        for step in pipeline._in_flight:
            held = [*step.plan.decode, *(chunk.seq for chunk in step.plan.chunks)]
            for chunk in step.plan.chunks:
                end = chunk.start + chunk.num_tokens
                assert not any(first < end < stop for first, stop in chunk.seq.blocks), "block split"
            assert len(held) == len(set(map(id, held))), "a sequence holds two rows of one step"
            for seq in held:
                in_flight[id(seq)] = in_flight.get(id(seq), 0) + 1
        rows = [seq.row for seq in scheduler.running]
        assert sorted(rows + scheduler.free_rows) == list(range(scheduler.limits.max_rows)), "rows lost"
        for seq in scheduler.running:
            assert seq.inflight_refs == in_flight.pop(id(seq), 0), "I3"
            assert seq.inflight_refs <= pipeline.num_slots, "I3: above depth"
            assert seq.finish is None or seq.inflight_refs > 0, "I5: finished and idle, yet not released"
            assert seq.num_sampled <= seq.max_tokens, "I12"
        assert not in_flight, "I5: a row in flight belongs to a released sequence"
        automata = scheduler.automata
        if automata is not None:
            places = {seq.table_place for seq in scheduler.running if seq.table_place}
            assert automata.num_held == len(places), "a table slot leaked"
        held_pages = {page for seq in scheduler.running for page in seq.pages}
        assert len(held_pages) == self.pool.num_allocated, "I7"
        for seq in scheduler.waiting:
            assert not seq.pages and seq.row == -1 and seq.inflight_refs == 0
        live = {id(s) for s in scheduler.sequences.values()}
        assert live == {id(s) for s in [*scheduler.running, *scheduler.waiting] if s.finish is None}

    def check_at_rest(self) -> None:
        """Everything exactly back at its baseline."""
        assert not self.scheduler.running and not len(self.scheduler.waiting) and not self.scheduler.sequences
        assert len(self.scheduler.free_rows) == self.scheduler.limits.max_rows
        assert self.pool.num_allocated == 0
        assert self.pool.num_free + self.pool.num_cached == self.pool.total
        assert not len(self.engine.pipeline)
        if self.intake is not None:
            assert not len(self.intake) and not self.intake._num_bytes, "pages are waited for by nobody"


class Simulation(SimWorker):
    """A worker whose commands and outputs are handed over directly, without a wire."""

    outbox: RecordingOutbox

    def __init__(self, **options: Any) -> None:
        self.outbox = RecordingOutbox()
        super().__init__(self.outbox, **options)
        self._next_id = 0
        self.arrivals: list[tuple[float, tuple[list[int], int]]] = []  # submissions to come, by time
        self.arrived: list[Stream] = []

    def _wait_for_command(self, timeout_s: float) -> Command | None:
        self._arrive()
        until_s = self.clock.now() + timeout_s
        if self.inbox.empty() and self.arrivals and self.arrivals[0][0] <= until_s:
            self.clock.sleep_until(self.arrivals[0][0])
            self._arrive()
            return self.inbox.get()
        return super()._wait_for_command(timeout_s)

    def _arrive(self) -> None:
        while self.arrivals and self.arrivals[0][0] <= self.clock.now():
            _, (prompt, max_tokens) = self.arrivals.pop(0)
            self.arrived.append(self.submit(prompt, max_tokens))

    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        gateway: bytes = GATEWAY,
        image: bytes | None = None,
        task: str = "text",
        sampling: Sampling | None = None,
        tenant: str = "",
        priority: int = 0,
        deadline_s: float = 0.0,
        max_objects: int = 3,
        grammar: Grammar | None = None,
        constraint: Constraint | None = None,
        thinking: ThinkingBudget | None = None,
    ) -> Stream:
        """Hand the engine one submission through its inbox; a grammar comes with its compiled constraint."""
        sequence_id = self._next_id
        self._next_id += 1
        images: list[ImageInput] = []
        frames: list[bytes] = []
        if image is not None:
            images = [image_input(1, 9, 8, hashlib.sha256(image).digest())]
            frames = [bytes(192), bytes(192)]
        message = Submit(
            epoch=EPOCH,
            sequence_id=sequence_id,
            request_id=f"r{sequence_id}",
            prompt=pack_i32(prompt),
            max_tokens=max_tokens,
            sampling=sampling or Sampling(),
            images=images,
            task=task,
            max_objects=max_objects if task != "text" else 0,
            tenant=tenant,
            priority=priority,
            deadline_s=deadline_s,
            grammar=grammar,
            thinking=thinking,
        )
        stream = Stream(message, gateway=gateway)
        self.outbox.streams[gateway, sequence_id] = stream
        if constraint is None:
            self.inbox.put(Received(gateway, message, frames))
        else:
            self.inbox.put(CompiledSubmit(gateway, message, frames, constraint))
        return stream

    def cancel(self, stream: Stream) -> None:
        """Cancel through the inbox."""
        stream.cancelled = True
        self.inbox.put(Received(stream.gateway, Cancel(EPOCH, [stream.submit.sequence_id])))

    def tick(self) -> bool:
        self._arrive()
        return super().tick()

    def check_at_rest(self) -> None:
        super().check_at_rest()
        for stream in self.outbox.streams.values():
            assert (stream.finish is None) != (stream.rejected is None), "I11: exactly one terminal event"


@dataclass
class Answer:
    """What a request must be answered with; `values` has one pair a token, (0, 0) for ordinary text."""

    reason: FinishReason = FinishReason.LENGTH
    tokens: list[int] = field(default_factory=list)
    values: list[tuple[float, float]] = field(default_factory=list)
    scores: list[tuple[float, int, list[int], list[float]]] = field(default_factory=list)


def expected(submit: Submit) -> tuple[list[int], FinishReason]:
    """The oracle's tokens and finish reason (I8)."""
    answer = oracle(submit)
    return answer.tokens, answer.reason


def oracle(submit: Submit) -> Answer:
    """The sequential, single-request answer to a submission (I8)."""
    prompt = unpack_i32(submit.prompt).tolist()
    marks = [mark_of(token_id, (0.0, 0.0)) for token_id in prompt]
    nan_index = None
    expanded = list(prompt)
    if submit.images:
        image = submit.images[0]
        assert CARD.image is not None
        ((position, num),) = image.runs
        marks[:position] = [image_mark(image.digest, i) for i in range(-position, num)]
        expanded[position:position] = [-1] * num
    if NAN_TOKEN in expanded[:-1]:
        nan_index = expanded[expanded.index(NAN_TOKEN) + 1]
    grammar = None
    if submit.task != "text":
        grammar = SpatialGrammar(
            coord_id=CARD.coord_id,
            size_id=CARD.size_id,
            end_id=0,
            with_size=submit.task == "detect",
            max_objects=submit.max_objects,
        )
    answer = Answer()
    num_top = submit.sampling.num_prompt_logprobs
    for place in range(1, len(prompt) if num_top >= 0 else 0):
        logprob, rank, ids = score_of(
            prefix_hash(np.array(marks[:place], np.uint64)), num_top, CARD.vocab_size
        )
        answer.scores.append((logprob, rank, ids, [-float(k) for k in range(num_top)]))
    asked = submit.thinking
    thought = None if asked is None else ThoughtBudget(asked.budget, asked.opens, asked.closes)
    everything = list(range(CARD.vocab_size))
    for index in range(submit.max_tokens):
        state = prefix_hash(np.array(marks, np.uint64))
        if nan_index is not None and index == nan_index:
            answer.reason = FinishReason.ERROR
            return answer
        sampling = submit.sampling
        draw = float(np.float32(uniform(sampling.seed, index))) if sampling.temperature > 0 else 0.0
        allowed = everything if grammar is None else sorted(grammar.allowed_ids())
        if thought is not None:
            words = np.zeros(-(-CARD.vocab_size // 32), np.int32)
            thought.fill_mask(words)
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: CARD.vocab_size]
            allowed = np.flatnonzero(bits).tolist()
        token_id = choose(state, draw, allowed)
        if grammar is not None:
            grammar.advance(token_id)
        if thought is not None:
            thought.advance(token_id)
        if token_id in (0, *submit.stop_ids):
            answer.reason = FinishReason.STOP
            return answer
        answer.tokens.append(token_id)
        value = value_of(token_id, state, CARD) if grammar is not None else (0.0, 0.0)
        answer.values.append(value)
        marks.append(mark_of(token_id, value))
        if grammar is not None and grammar.is_complete():
            answer.reason = FinishReason.STOP
            return answer
    return answer


def check_stream(stream: Stream) -> None:
    """A finished stream equals the oracle; a cancelled one is a prefix of it."""
    assert stream.finish is not None
    answer = oracle(stream.submit)
    tokens, reason = answer.tokens, answer.reason
    wanted = answer.scores if stream.tokens else answer.scores[: len(stream.scores)]
    assert stream.scores == wanted, "log-probabilities of the prompt"
    if stream.finish.reason in (FinishReason.CANCELLED, FinishReason.DEADLINE):
        assert stream.tokens == tokens[: len(stream.tokens)]
    else:
        assert stream.tokens == tokens, (stream.tokens, tokens)
        assert stream.finish.reason is reason


def random_prompt(rng: random.Random, length: int) -> list[int]:
    """Ids of ordinary tokens."""
    return [rng.randrange(20, CARD.vocab_size) for _ in range(length)]
