"""The loop as a Hypothesis state machine: every rule of docs/architecture.md's invariants under random histories."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from shared.errors import ErrorCode, FinishReason
from shared.protocol import Drain, Sampling, ThinkingBudget
from tests.unit.worker.loop.simulation import GATEWAY, Simulation, Stream, check_stream, expected
from worker.loop.inbox import LeaseEnded, Received
from worker.sim.runner import NAN_TOKEN, OOM_TOKEN

OTHER = b"gateway-1"

sampling_strategy = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.0, 1.0]),
    seed=st.integers(0, 1 << 40),
)


class Loop(RuleBasedStateMachine):
    """Submits, cancels, ticks, lets time pass and gateways die; after every step the invariants are checked."""

    streams = Bundle("streams")

    @initialize(
        depth=st.integers(1, 3),
        max_rows=st.integers(1, 5),
        num_pages=st.sampled_from([10, 16, 48]),
        page_tokens=st.sampled_from([1, 2, 4]),
        step_tokens=st.sampled_from([12, 20, 64]),
        prefix_cache=st.booleans(),
        max_waiting=st.sampled_from([3, 64]),
        jitter=st.sampled_from([None, 1, 2, 3]),
        late_launch=st.booleans(),
        automata=st.booleans(),
    )
    def start(
        self,
        depth: int,
        max_rows: int,
        num_pages: int,
        page_tokens: int,
        step_tokens: int,
        prefix_cache: bool,
        max_waiting: int,
        jitter: int | None,
        late_launch: bool,
        automata: bool,
    ) -> None:
        self.sim = Simulation(
            depth=depth,
            num_slots=max(2, depth),
            max_rows=max_rows,
            num_pages=num_pages,
            page_tokens=page_tokens,
            step_tokens=step_tokens,
            prefix_cache=prefix_cache,
            max_waiting=max_waiting,
            jitter_seed=jitter,
            late_launch=late_launch,
            automata=automata,
        )
        self.dead: set[int] = set()
        self.draining = False

    @rule(
        target=streams,
        words=st.lists(st.integers(20, 24), max_size=6),
        max_tokens=st.integers(1, 9),
        image=st.sampled_from([None, None, b"x", b"y"]),
        task=st.sampled_from(["text", "text", "detect", "point"]),
        max_objects=st.integers(1, 3),
        sampling=sampling_strategy,
        tenant=st.sampled_from(["", "a"]),
        priority=st.integers(0, 1),
        deadline_s=st.sampled_from([0.0, 0.0, 0.02]),
        gateway=st.sampled_from([GATEWAY, GATEWAY, OTHER]),
    )
    def submit(
        self,
        words: list[int],
        max_tokens: int,
        image: bytes | None,
        task: str,
        max_objects: int,
        sampling: Sampling,
        tenant: str,
        priority: int,
        deadline_s: float,
        gateway: bytes,
    ) -> Stream:
        return self.sim.submit(
            [30, *words],
            max_tokens,
            gateway=gateway,
            image=image,
            task=task,
            max_objects=max_objects,
            sampling=sampling,
            tenant=tenant,
            priority=priority,
            deadline_s=deadline_s,
        )

    @rule(
        target=streams,
        words=st.lists(st.integers(20, 24), max_size=20),
        max_tokens=st.integers(1, 9),
        num_scores=st.integers(-1, 2),
        budget=st.one_of(st.none(), st.integers(0, 6)),
        marks=st.sampled_from([([], [40]), ([], [40, 41]), ([31], [40])]),
        temperature=st.sampled_from([0.0, 1.0]),
        seed=st.integers(0, 1 << 20),
    )
    def submit_scored_or_bounded(
        self,
        words: list[int],
        max_tokens: int,
        num_scores: int,
        budget: int | None,
        marks: tuple[list[int], list[int]],
        temperature: float,
        seed: int,
    ) -> Stream:
        """Log-probabilities of its prompt, a budget for its thought, or both."""
        sampling = Sampling(temperature=temperature, seed=seed, num_prompt_logprobs=num_scores)
        thinking = None if budget is None else ThinkingBudget(budget, *marks)
        return self.sim.submit([30, *words], max_tokens, sampling=sampling, thinking=thinking)

    @rule(target=streams, at=st.integers(0, 3), max_tokens=st.integers(1, 9))
    def submit_poisoned(self, at: int, max_tokens: int) -> Stream:
        return self.sim.submit([30, NAN_TOKEN, at, 21], max_tokens)

    @rule(target=streams, max_tokens=st.integers(1, 9))
    def submit_too_large(self, max_tokens: int) -> Stream:
        """The device has no memory for it: it ends with whatever shares its step's prefill."""
        return self.sim.submit([30, OOM_TOKEN, 21], max_tokens)

    @rule(stream=streams)
    def cancel(self, stream: Stream) -> None:
        """Queued, in prefill or in flight: the terminal event is out as soon as the command is read."""
        self.sim.cancel(stream)
        self.sim.engine.take_commands()
        known = (stream.gateway, stream.submit.sequence_id) in self.sim.scheduler.sequences
        assert not known, "a cancelled sequence is still live"

    @rule(stream=streams)
    def cancel_in_the_tick_that_commits(self, stream: Stream) -> None:
        """The cancel arrives between the launch and the commit of one tick."""
        self.sim.engine._plan_and_launch()
        self.sim.cancel(stream)
        self.sim.tick()

    @rule(times=st.integers(1, 6))
    def tick(self, times: int) -> None:
        for _ in range(times):
            self.sim.tick()

    @rule(seconds=st.sampled_from([0.0005, 0.003, 0.05]))
    def time_passes(self, seconds: float) -> None:
        self.sim.clock.advance(seconds)

    @rule()
    def gateway_dies(self) -> None:
        self.sim.inbox.put(LeaseEnded(OTHER))
        self.sim.engine.take_commands()
        for (gateway, number), stream in self.sim.outbox.streams.items():
            if gateway == OTHER and stream.finish is None and stream.rejected is None:
                self.dead.add(number)

    @rule()
    def run_to_rest(self) -> None:
        self.sim.run()
        self.check_at_rest()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "sim"):
            self.sim.check()

    def teardown(self) -> None:
        if not hasattr(self, "sim"):
            return
        self.sim.inbox.put(Received(GATEWAY, Drain(1000.0)))
        self.sim.submit([30], 1)
        self.sim.run()
        self.check_at_rest()
        last = self.sim.outbox.streams[GATEWAY, self.sim._next_id - 1]
        assert last.rejected is not None and last.rejected.code is ErrorCode.SHUTTING_DOWN

    def check_at_rest(self) -> None:
        sim = self.sim
        streams = sim.outbox.streams
        for number in self.dead:
            # Nobody was left to tell: the engine sends no terminal event to a dead gateway.
            streams.pop((OTHER, number), None)
        sim.check_at_rest()
        for stream in streams.values():
            if stream.rejected is not None:
                assert not stream.tokens
                continue
            if stream.finish is not None and stream.finish.code is ErrorCode.OUT_OF_MEMORY:
                assert stream.tokens == expected(stream.submit)[0][: len(stream.tokens)]
                continue
            check_stream(stream)
            if stream.finish is not None and stream.finish.reason is FinishReason.CANCELLED:
                assert stream.cancelled
