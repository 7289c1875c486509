"""Owns the simulated device's runner: real staging and real slots around a fake model. Decode thread.

The fake model's next token is a hash of the whole prefix *as it stands in the paged memory*, so any mix-up of slots,
rows, pages or order changes tokens. On a virtual clock every interleaving is reproducible; in real time a step is held
for a GPU's published forward time without using the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from shared.protocol import ImageSpec, ModelCard, OverlappingTiles
from worker.constraints.automaton import TokenAutomaton
from worker.schedule.plan import Chunk, PromptScores, StepPlan, StepResult, crops_of
from worker.schedule.sequence import Picture, Sequence
from worker.sim.profiles import Profile
from worker.sim.timeline import Clock, SimEvent, SimStream, Timeline
from worker.step.contract import DeviceTimes, GraphCounts, OutOfDeviceMemory, Progress
from worker.step.staging import I32, StepShape, Views, stage_chunks, stage_rows, used_words

U64 = npt.NDArray[np.uint64]

NAN_TOKEN = 11
"""A prompt that holds this id makes its row's logits NaN at the generated index given by the id after it."""

OOM_TOKEN = 12
"""A chunk whose part of the prompt holds this id finds no memory: it is not run, and its row samples old state."""

_MULTIPLIER = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def fake_card(*, vocab_size: int = 97, context_tokens: int = 4096, num_image_tokens: int = 9) -> ModelCard:
    """The fake model's card: ids below 10 are special as in Moondream, 0 ends."""
    return ModelCard(
        model_id="sim",
        family="fake",
        context_tokens=context_tokens,
        vocab_size=vocab_size,
        bos_id=0,
        eos_ids=[0],
        image=ImageSpec(8, num_image_tokens, OverlappingTiles(2, 1, 4), attends="prefix", max_images=16),
        capabilities=["chat", "detect", "point"],
    )


def mix(x: int) -> int:
    """SplitMix64's finaliser over 64 bits."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def choose(state: int, draw: float, allowed: list[int]) -> int:
    """The fake model's choice among `allowed` from a prefix's hash and the row's uniform number."""
    return allowed[mix(state ^ int(draw * (1 << 24))) % len(allowed)]


def prefix_hash(marks: U64) -> int:
    """Hash of the marks of positions 0 …: order and every position count."""
    powers = np.power(np.uint64(_MULTIPLIER | 1), np.arange(1, len(marks) + 1, dtype=np.uint64))
    with np.errstate(over="ignore"):
        return int(((marks + np.uint64(1)) * powers).sum(dtype=np.uint64))


def value_of(token_id: int, state: int, card: ModelCard) -> tuple[float, float]:
    """The coordinate or size the fake model decodes with a token."""
    x, y = (state >> 8 & 1023) / 1024, (state >> 20 & 1023) / 1024
    if token_id == card.coord_id:
        return x, 0.0
    return (x, y) if token_id == card.size_id else (0.0, 0.0)


def score_of(state: int, num_top: int, vocab_size: int) -> tuple[float, int, list[int]]:
    """The logprob and rank that the fake model gives a token behind a prefix, and the ids it finds likelier."""
    return (
        -(mix(state) % 4096) / 256,
        1 + mix(state + 1) % 7,
        [(state + k) % vocab_size for k in range(num_top)],
    )


def mark_of(token_id: int, value: tuple[float, float]) -> int:
    """What a position holds in the fake paged memory: the token, and the value it was embedded by."""
    return (token_id | int(value[0] * 1024) << 20 | int(value[1] * 1024) << 32) & _MASK


def image_mark(digest: bytes, offset: int) -> int:
    """What an image position holds."""
    return mix(int.from_bytes(digest[:8], "little") + offset) | 1 << 63


class SimSlot:
    """One working set: host staging, its device copy, outputs on both sides."""

    def __init__(self, shape: StepShape) -> None:
        self.host = Views(np.zeros(shape.num_words, np.int32), shape)
        self.device = Views(np.zeros(shape.num_words, np.int32), shape)
        self.host_masks: I32 = np.zeros((shape.max_rows, shape.mask_words), np.int32)
        self.masks = self.host_masks.copy()
        self.states: list[int] = [0] * shape.max_rows  # the "logits": each sample's prefix hash
        self.bad = [False] * shape.max_rows
        self.scores: list[PromptScores] = []
        self.ids = np.zeros(shape.max_rows, np.int64)
        self.values = np.zeros((shape.max_rows, 2))
        self.host_ids = np.zeros(shape.max_rows, np.int64)
        self.host_bad = [False] * shape.max_rows
        self.host_values = np.zeros((shape.max_rows, 2))
        self.copied: SimEvent | None = None
        self.times = (0.0, 0.0)  # start and end of the compute work
        self.previous_end_s = 0.0


class SimRunner:
    """Runs steps on simulated streams. `exact` reads the whole prefix through the block table each step;
    without it the state is the last token and its position, which is cheap enough for real time."""

    def __init__(
        self,
        card: ModelCard,
        clock: Clock,
        profile: Profile,
        shape: StepShape,
        *,
        exact: bool = True,
        jitter: npt.NDArray[np.float64] | None = None,
    ) -> None:
        self.card = card
        self.shape = shape
        self.num_slots = shape.num_slots
        self.graph_counts = GraphCounts()
        self.profile = profile
        self.exact = exact
        self.timeline = Timeline(clock)
        self.compute = SimStream(self.timeline)
        self.copy = SimStream(self.timeline)
        self.slots = [SimSlot(shape) for _ in range(shape.num_slots)]
        self.memory: U64 = np.zeros(shape.num_pages * shape.page_tokens, np.uint64)
        self.last_ids = np.zeros(shape.max_rows + 1, np.int64)
        self.last_values = np.zeros((shape.max_rows + 1, 2))
        self.nan_at: dict[int, int] = {}  # row → tokens it still samples before its NaN
        self.automata: dict[int, TokenAutomaton | None] = {}  # by row: the device's own state
        self._jitter = jitter
        self._num_steps = 0

    # ------------------------------------------------------------------ Runner

    def launch_forward(self, slot_number: int, plan: StepPlan, progress: Progress) -> None:
        slot = self.slots[slot_number]
        stage_rows(slot.host, plan)
        if plan.chunks:
            stage_chunks(slot.host, plan)
        num_words = used_words(plan, self.shape, len(plan.decode))
        admitted = [(seq.row, _nan_index(seq), _automaton(seq)) for seq in plan.admitted]
        fits = not any([_finds_no_memory(chunk) for chunk in plan.chunks])
        known = _known_marks(plan)
        spans = [(c.start, c.num_tokens, c.is_last) for c in plan.chunks] if fits else []
        num_rows = len(plan.decode)
        scored = [(c.num_scored, c.seq.sampling.num_prompt_logprobs) for c in plan.chunks] if fits else []

        def forward() -> None:
            slot.device.buffer[:num_words] = slot.host.buffer[:num_words]
            for row, nan_index, automaton in admitted:
                self.automata[row] = automaton
                self.nan_at.pop(row, None)
                if nan_index is not None:
                    self.nan_at[row] = nan_index
            self._forward(slot, num_rows, spans, known)
            slot.scores = list(self._scores(slot, spans, scored))

        crops = sum(crops_of(chunk) for chunk in plan.chunks)
        cost_s = self.profile.forward(
            num_rows, sum(c.num_tokens for c in plan.chunks), crops, plan.load.num_keys
        )
        if self._jitter is not None:
            cost_s *= float(self._jitter[self._num_steps % len(self._jitter)])
        self._num_steps += 1
        slot.previous_end_s = self.compute.busy_until_s
        start_s, end_s = self.compute.queue(forward, cost_s)
        slot.times = (start_s, end_s)
        if not fits:
            raise OutOfDeviceMemory("a chunk holds the token that finds no memory")

    def launch_sampling(self, slot_number: int, plan: StepPlan, picks: list[int], *, masked: bool) -> None:
        slot = self.slots[slot_number]
        if masked:

            def upload() -> None:
                slot.masks[:] = slot.host_masks

            self.copy.queue(upload, self.profile.copy_s)
            self.compute.wait(self.copy.record())
        random = [plan.samples[i].sampling.temperature > 0 for i in picks]
        cost_s = self.profile.sample_s * len(picks) / max(1, len(plan.samples))
        _, end_s = self.compute.queue(lambda: self._sample(slot, picks, random, masked), cost_s)
        slot.times = (slot.times[0], end_s)

    def launch_copy(self, slot_number: int, plan: StepPlan) -> None:
        slot = self.slots[slot_number]
        num = len(plan.samples)

        def copy_out() -> None:
            slot.host_ids[:num] = slot.ids[:num]
            slot.host_bad[:num] = slot.bad[:num]
            slot.host_values[:num] = slot.values[:num]

        self.copy.wait(self.compute.record())
        self.copy.queue(copy_out, self.profile.copy_s)
        slot.copied = self.copy.record()

    def mask_rows(self, slot_number: int) -> I32:
        return self.slots[slot_number].host_masks

    def is_done(self, slot_number: int) -> bool:
        copied = self.slots[slot_number].copied
        return copied is not None and copied.query()

    def wait_rows(self, slot_number: int, plan: StepPlan) -> StepResult | None:
        """No sooner than all samples; an exact simulation takes this way so that tests of the loop do."""
        if not self.exact or plan.deferred:
            return None
        return self._read(slot_number, plan, len(plan.decode))

    def wait(self, slot_number: int, plan: StepPlan) -> StepResult:
        return self._read(slot_number, plan, len(plan.samples))

    def _read(self, slot_number: int, plan: StepPlan, num: int) -> StepResult:
        slot = self.slots[slot_number]
        assert slot.copied is not None
        slot.copied.synchronize()
        result = StepResult(slot.host_ids[:num].tolist(), slot.host_bad[:num])
        if any([seq.is_spatial for seq in plan.samples[:num]]):
            result.values = [(x, y) for x, y in slot.host_values[:num].tolist()]
        if plan.num_scored and num == len(plan.samples):
            result.scores = slot.scores
        return result

    def device_times(self, slot_number: int) -> DeviceTimes:
        slot = self.slots[slot_number]
        assert slot.copied is not None
        start_s, end_s = slot.times
        return DeviceTimes(end_s - start_s, start_s - slot.previous_end_s, slot.copied.at_s - end_s)

    # ------------------------------------------------------------------ what the device does

    def _forward(
        self,
        slot: SimSlot,
        num_rows: int,
        spans: list[tuple[int, int, bool]],
        known: dict[tuple[int, int], int],
    ) -> None:
        ints = slot.device.ints
        for i in range(num_rows):
            row, position = int(ints["rows"][i]), int(ints["positions"][i])
            token_id = int(self.last_ids[row])
            value = (0.0, 0.0)
            if ints["spatial"][i]:
                value = (float(self.last_values[row, 0]), float(self.last_values[row, 1]))
            self.memory[ints["write_index"][i]] = mark_of(token_id, value)
            slot.states[i] = self._state(slot.device.tables[i], position + 1, token_id)
        ids, positions, writes = slot.device.chunks
        at, sample = 0, num_rows
        for i, (start, num, is_last) in enumerate(spans):
            for j in range(at, at + num):
                mark = known.get((i, start + j - at))
                self.memory[writes[j]] = mark if mark is not None else mark_of(int(ids[j]), (0.0, 0.0))
                assert positions[j] == start + j - at
            at += num
            if is_last:
                slot.states[sample] = self._state(slot.device.chunk_tables[i], start + num, int(ids[at - 1]))
                sample += 1

    def _scores(
        self, slot: SimSlot, spans: list[tuple[int, int, bool]], scored: list[tuple[int, int]]
    ) -> Iterator[PromptScores]:
        """What the fake model gives prompt tokens: a function of all tokens before each."""
        at = 0
        for i, ((start, num, _), (num_scored, num_top)) in enumerate(zip(spans, scored, strict=True)):
            if num_scored:
                states = [
                    self._state(
                        slot.device.chunk_tables[i], start + j + 1, int(slot.device.chunks[0][at + j])
                    )
                    for j in range(num_scored)
                ]
                found = [score_of(state, num_top, self.card.vocab_size) for state in states]
                yield PromptScores(
                    np.array([logprob for logprob, _, _ in found], np.float32).tobytes(),
                    np.array([rank for _, rank, _ in found], np.int32).tobytes(),
                    np.array([ids for _, _, ids in found], np.int32).tobytes(),
                    np.array([[-float(k) for k in range(num_top)] for _ in found], np.float32).tobytes(),
                )
            at += num

    def _state(self, table: I32, length: int, token_id: int) -> int:
        if not self.exact:
            return mix(token_id * 0x10001 + length)
        page_tokens = self.shape.page_tokens
        position = np.arange(length)
        index = table[position // page_tokens].astype(np.int64) * page_tokens + position % page_tokens
        return prefix_hash(self.memory[index])

    def _sample(self, slot: SimSlot, picks: list[int], random: list[bool], masked: bool) -> None:
        rows = slot.device.ints["sample_rows"]
        draws = slot.device.floats["uniform"]
        everything = list(range(self.card.vocab_size))
        for i, is_random in zip(picks, random, strict=True):
            allowed = everything
            state, row = slot.states[i], int(rows[i])
            automaton = self.automata.get(row)
            words = slot.masks[i]
            if automaton is not None:
                words = words.copy()
                automaton.fill_mask(words)
            if masked or automaton is not None:
                allowed = _ids_of(words, self.card.vocab_size)
            token_id = choose(state, float(draws[i]) if is_random else 0.0, allowed)
            slot.ids[i] = self.last_ids[row] = token_id
            slot.values[i] = self.last_values[row] = value_of(token_id, state, self.card)
            slot.bad[i] = self._is_bad(row)
            if automaton is not None:
                automaton.advance(token_id)

    def _is_bad(self, row: int) -> bool:
        left = self.nan_at.get(row)
        if left is None:
            return False
        self.nan_at[row] = left - 1
        return left == 0


def _automaton(seq: Sequence) -> TokenAutomaton | None:
    """The device's own copy of an admitted sequence's automaton, if its tables are there."""
    if seq.table_place and isinstance(seq.constraint, TokenAutomaton):
        return seq.constraint.fork()
    return None


def _ids_of(words: I32, vocab_size: int) -> list[int]:
    """The ids that a mask allows; its last word may have bits of none."""
    bits = np.unpackbits(words.view(np.uint8), bitorder="little", count=vocab_size)
    return np.flatnonzero(bits).tolist()


def _finds_no_memory(chunk: Chunk) -> bool:
    end = min(
        chunk.start + chunk.num_tokens, chunk.seq.num_prompt
    )  # generated tokens are not part of the prompt
    return OOM_TOKEN in chunk.seq.tokens[chunk.start : end]


def _nan_index(seq: Sequence) -> int | None:
    prompt = seq.tokens[: seq.num_prompt]
    if NAN_TOKEN not in prompt[:-1]:
        return None
    return prompt[prompt.index(NAN_TOKEN) + 1] - seq.num_generated


def _mark_at(picture: Picture, offset: int) -> int:
    """A picture's own mark, as it came encoded or as it is encoded here; below 0 of what stands before it in its block."""
    if picture.features is None or offset < 0:
        return image_mark(picture.digest, offset)
    return int(np.frombuffer(picture.features, np.uint64)[offset])


def _known_marks(plan: StepPlan) -> dict[tuple[int, int], int]:
    """Marks of chunk positions whose embedding is not their token's: pictures, and resumed coordinates."""
    known: dict[tuple[int, int], int] = {}
    for i, chunk in enumerate(plan.chunks):
        seq, end = chunk.seq, chunk.start + chunk.num_tokens
        for picture in seq.pictures:
            for run in picture.runs:
                # All positions of a block depend on the whole picture, also those of a prefix before the picture.
                first = next((a for a, b in seq.blocks if a <= run.position < b), run.position)
                for position in range(max(chunk.start, first), min(end, run.position + run.num_tokens)):
                    known[i, position] = _mark_at(picture, run.offset + position - run.position)
        for index, value in seq.values.items():
            position = seq.num_prompt + index
            if chunk.start <= position < end:
                known[i, position] = mark_of(seq.tokens[position], value)
    return known
