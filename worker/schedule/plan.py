"""Owns the records of a step: its plan, what the host read of it, what its commit gave. Plain data; decode thread."""

from __future__ import annotations

from dataclasses import dataclass, field

from worker.constraints.automaton import TokenTables
from worker.schedule.pace import NO_LOAD, StepLoad
from worker.schedule.sequence import Sequence


@dataclass(slots=True, eq=False)
class Chunk:
    """Part of a sequence's prefill: positions [start, start + num_tokens)."""

    seq: Sequence
    start: int
    num_tokens: int
    is_last: bool  # reaches the last known token, so its last position is sampled
    num_scored: int = 0  # of its leading positions the next token's log-probability is asked for


def crops_of(chunk: Chunk) -> int:
    """The number of crops that the vision encoder runs for a chunk, unless their features came with it or are cached."""
    seq, end = chunk.seq, chunk.start + chunk.num_tokens
    return sum(
        [
            len(picture.units(chunk.start, end, seq.cached_tokens)) * picture.unit_crops
            for picture in seq.pictures
            if picture.features is None and picture.position < end and chunk.start < picture.end
        ]
    )


def holds_picture(chunk: Chunk) -> bool:
    """Whether a picture's features stand in the chunk."""
    end = chunk.start + chunk.num_tokens
    return any(
        run.position < end and chunk.start < run.position + run.num_tokens
        for picture in chunk.seq.pictures
        for run in picture.runs
    )


@dataclass(slots=True, eq=False)
class StepPlan:
    """One step: decode rows first, then prefill chunks; `samples` names the rows that get a token, in order."""

    step: int
    decode: list[Sequence]
    positions: list[int]  # of each decode row's token
    chunks: list[Chunk]
    samples: list[Sequence]
    sample_indexes: list[int]  # index of each sample among its sequence's generated tokens
    deferred: list[int]  # indexes into `samples` of rows that wait for a mask
    admitted: list[Sequence]  # sequences that got their row in this plan
    tables: list[tuple[int, TokenTables]]  # automata to put into their places before the step

    any_adjusted: bool = False  # some sample's logits are biased or penalised
    load: StepLoad = NO_LOAD
    expected_s: float = 0.0  # how long it should take

    @property
    def num_scored(self) -> int:
        """Positions of all chunks whose next token's log-probability is asked for."""
        return sum([chunk.num_scored for chunk in self.chunks])

    @property
    def num_tokens(self) -> int:
        """Flattened tokens of the forward."""
        return len(self.decode) + sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities of the tokens behind some positions of a prompt: packed float32 and int32, as on the wire."""

    logprobs: bytes
    ranks: bytes
    top_ids: bytes = b""
    top_logprobs: bytes = b""

    def behind(self, num: int) -> PromptScores:
        """Without those of the first `num` positions."""
        if not num:
            return self
        top = len(self.top_ids) // max(1, len(self.ranks)) * 4 * num
        return PromptScores(
            self.logprobs[4 * num :], self.ranks[4 * num :], self.top_ids[top:], self.top_logprobs[top:]
        )


@dataclass(slots=True)
class StepResult:
    """What the host read from one step, one entry per row of `plan.samples`."""

    token_ids: list[int]
    bad: list[bool]  # the row's logits held a NaN
    values: list[tuple[float, float]] | None = None  # decoded coordinates or sizes, where any row is spatial
    value_logprobs: list[list[float]] | None = (
        None  # two a row: of the values' bins, where any row asks for them
    )
    logprobs: list[float] | None = None
    top_ids: list[list[int]] | None = None
    top_logprobs: list[list[float]] | None = None
    scores: list[PromptScores] | None = None  # one for each chunk that is scored


@dataclass(slots=True)
class Committed:
    """What a commit gave: tokens to send (parallel lists) and the sequences it finished."""

    rows: list[Sequence] = field(default_factory=list)
    indexes: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)  # index into the step's samples
    finished: list[Sequence] = field(default_factory=list)
    num_zombies: int = 0
    scored: list[tuple[Sequence, int, PromptScores]] = field(
        default_factory=list
    )  # prompt, first token scored


def take_scores(plan: StepPlan, result: StepResult) -> list[tuple[Sequence, int, PromptScores]]:
    """The step's log-probabilities of prompt tokens that were not known before: a prompt that was preempted is computed again."""
    taken = []
    chunks = [chunk for chunk in plan.chunks if chunk.num_scored]
    for chunk, scores in zip(chunks, result.scores or (), strict=True):
        seq = chunk.seq
        num_known = seq.num_scored - chunk.start
        if seq.finish is not None or num_known >= chunk.num_scored:
            continue
        taken.append((seq, seq.num_scored + 1, scores.behind(num_known)))
        seq.num_scored = chunk.start + chunk.num_scored
    return taken
