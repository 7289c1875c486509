"""Owns the decode state of one request, and every way in which its life may go on. Pure; decode thread.

Two clocks run in a sequence. *Launched* counters (`num_computed`, `num_sampled`) move when a step is
planned; *committed* state (`tokens`, constraint, finish) moves when the host has read the step's outputs.
In a pipeline the first is ahead of the second by the steps in flight.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shared.errors import ErrorCode, FinishReason
from shared.pictures import num_crops
from shared.protocol import Sampling, Sheet
from worker.constraints.constraint import Constraint
from worker.constraints.thought_budget import ThoughtBudget
from worker.schedule.life import HOLDING, Life, MaskLife, mask_moved, moved

IMAGE_TOKEN = -1
"""Stands in `tokens` for a position whose embedding comes from a picture."""


class Run(NamedTuple):
    """Consecutive positions that hold features of one picture."""

    position: int  # the first, among all of the sequence's
    num_tokens: int
    offset: int  # of its first feature among the picture's


@dataclass(slots=True, eq=False)
class Picture:
    """One image of a sequence: its sheets with a uint8 payload each, its places, and its cache key.

    Its features come in *units*, each encoded by itself when a chunk first needs it: a crop of `unit_tokens` features, or
    where that is 0 the whole picture.
    """

    runs: tuple[Run, ...]  # in order; at least one
    sheets: Sequence_[Sheet]
    frames: Sequence_[bytes]
    digest: bytes
    unit_tokens: int = 0
    grid: tuple[int, int] = (0, 0)  # rows and columns of its positions, where those have several axes
    loads: int = 0  # what encoding it costs in crops, if that is not their number
    features: bytes | None = None  # of all its positions, if it came encoded; `frames` is then empty
    moment: int = 0  # of a group of a clip's frames, on the time axis behind the first one
    is_continued: bool = False  # such a group, which shares rows and columns with the one before it

    @property
    def page_key(self) -> bytes:
        """What pages with its positions depend on: its pixels, and where it stands in time."""
        if not self.moment and not self.is_continued:
            return self.digest
        return self.digest + self.moment.to_bytes(4, "little") + bytes([self.is_continued])

    @property
    def position(self) -> int:
        """The first position it takes."""
        return self.runs[0].position

    @property
    def end(self) -> int:
        """Behind the last position it takes; text may stand between the runs."""
        return self.runs[-1].position + self.runs[-1].num_tokens

    @property
    def num_crops(self) -> int:
        """Crops the vision encoder runs for it; of a crop of any size, as many as its area counts for."""
        return self.loads or num_crops(self.sheets)

    @property
    def unit_crops(self) -> int:
        """Crops of one unit."""
        return 1 if self.unit_tokens else self.num_crops

    def features_before(self, position: int) -> int:
        """How many of its features stand before this position of the sequence."""
        return sum([max(0, min(position - run.position, run.num_tokens)) for run in self.runs])

    def units(self, start: int, end: int, known: int = -1) -> range:
        """The units of which positions [start, end) hold features. `known` or more: without the one that an earlier chunk
        has begun, unless the sequence itself begins here, with so many positions found in the prefix cache."""
        first, last = self.features_before(start), self.features_before(end)
        if first == last:
            return range(0)
        size = self.unit_tokens or self.features_before(self.end)
        is_begun = known >= 0 and start > known
        return range(-(-first // size) if is_begun else first // size, -(-last // size))

    def place_of(self, unit: int) -> int:
        """The position of a unit's first feature."""
        offset = unit * self.unit_tokens
        run = next(run for run in reversed(self.runs) if run.offset <= offset)
        return run.position + offset - run.offset


Block = tuple[int, int]
"""Positions [first, end) that attend to each other both ways: computed in one chunk, or not at all."""


Value = tuple[float, float]
"""A coordinate, twice or with anything behind it, or (width, height)."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's state in the worker."""

    gateway: bytes
    sequence_id: int
    request_id: str
    tokens: list[int]  # prompt, image positions as IMAGE_TOKEN, then committed tokens
    num_prompt: int
    max_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    arrived_s: float
    pictures: list[Picture] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)  # in order, apart from each other
    rotary: npt.NDArray[np.int32] | None = None  # (axes, num_prompt), where positions are not indexes
    rotary_shift: int = 0  # position less index of what stands behind the prompt
    task: str = "text"
    constraint: Constraint | None = None
    table_place: int = 0  # of its automaton on the device; 0: the host makes its masks, or it has none
    is_adjusted: bool = False  # logits are biased or penalised before sampling; set by __post_init__
    is_spatial: bool = False  # coordinate and size tokens carry values; set by __post_init__
    tenant: str = ""
    priority: int = 0
    deadline_s: float = 0.0  # absolute, 0: none

    life: Life = Life.WAITING
    row: int = -1
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0  # positions whose K and V a launched step writes
    num_known: int = 0  # positions to prefill before decoding: the length of `tokens` at (re)admission
    num_sampled: int = 0  # generated tokens, those in flight included
    inflight_refs: int = 0
    mask: MaskLife = MaskLife.NONE  # of its next token, as far as the host makes it
    ready_mask: npt.NDArray[np.int32] | None = None  # built ahead (worker.loop.masks)
    is_mask_slow: bool = False  # whether the mask behind the ready one is built ahead too
    preemptions: int = 0
    cached_tokens: int = 0
    awaits_pages: bool = (
        False  # of its prompt, which another worker computes; set and cleared by `loop.page_intake`
    )
    given_tokens: int = 0  # positions whose pages came from there
    # Index from the prompt's end on → value: below 0 given with the prompt, else decoded when it was generated.
    values: dict[int, Value] = field(default_factory=dict)
    page_keys: list[bytes] = field(default_factory=list)  # prefix-cache keys of its full pages
    num_scored: int = 0  # prompt positions whose next token's log-probability is committed
    budget: ThoughtBudget | None = None  # its constraint, while that may still force tokens

    finish: FinishReason | None = None
    error: tuple[ErrorCode, str] | None = None
    first_planned_s: float = 0.0
    first_token_s: float = 0.0

    @property
    def num_generated(self) -> int:
        """Committed generated tokens."""
        return len(self.tokens) - self.num_prompt

    @property
    def in_prefill(self) -> bool:
        """Whether some known position has not been launched yet."""
        return self.num_computed < self.num_known

    @property
    def is_scored(self) -> bool:
        """Whether log-probabilities of its prompt are still to be computed."""
        return self.sampling.num_prompt_logprobs >= 0 and self.num_scored < self.num_prompt - 1

    @property
    def holds(self) -> bool:
        """Whether the sequence may have a row and pages."""
        return self.life in HOLDING

    # ------------------------------------------------------------------ its life

    def move_to(self, life: Life) -> None:
        """Change the state. Raises LifeError, and changes nothing, for an illegal move."""
        self.life = moved(self.life, life)

    def end(self, reason: FinishReason, error: tuple[ErrorCode, str] | None = None) -> None:
        """Finish, once."""
        self.move_to(Life.FINISHED)
        self.finish = reason
        self.error = error

    def place_automaton(self, place: int) -> None:
        """The automaton lies on the device (place above 0), or not (place 0): then the host makes the masks."""
        needs_host = self.constraint is not None and not place and self.budget is None
        if needs_host and self.mask is MaskLife.NONE:
            self.mask = mask_moved(self.mask, MaskLife.DUE)
        elif not needs_host and self.mask is not MaskLife.NONE:
            self.mask = mask_moved(self.mask, MaskLife.NONE)
            self.ready_mask = None
        self.table_place = place

    def watch_budget(self, index: int) -> None:
        """The token at `index` is planned: the host masks it only where its thought's budget may end there."""
        assert self.budget is not None
        needs_host = self.budget.may_force(index, self.num_generated)
        if needs_host and self.mask is MaskLife.NONE:
            self.mask = mask_moved(self.mask, MaskLife.DUE)
        elif not needs_host and self.mask is not MaskLife.NONE:
            self.mask = mask_moved(self.mask, MaskLife.NONE)
            self.ready_mask = None
        if self.budget.is_spent:
            self.budget = None if self.mask is MaskLife.NONE else self.budget

    def on_slow_mask(self) -> None:
        """The mask built with its step was slow: the next mask is built ahead, and the sequence sits out until it is ready."""
        self.mask = mask_moved(self.mask, MaskLife.AWAITED)

    def on_mask_ready(self, mask: npt.NDArray[np.int32], *, is_slow: bool) -> None:
        """The mask built ahead is ready. `is_slow`: the mask after it is also built ahead."""
        self.mask = mask_moved(self.mask, MaskLife.READY)
        self.ready_mask = mask
        self.is_mask_slow = is_slow

    def take_ready_mask(self) -> npt.NDArray[np.int32]:
        """The mask built ahead, for the step that is being sampled."""
        ready = self.ready_mask
        self.mask = mask_moved(self.mask, MaskLife.AWAITED if self.is_mask_slow else MaskLife.DUE)
        self.ready_mask = None
        assert ready is not None
        return ready

    def __post_init__(self) -> None:
        if isinstance(self.constraint, ThoughtBudget):
            self.budget = self.constraint
        self.place_automaton(0)
        s = self.sampling
        self.is_spatial = self.task != "text"
        self.is_adjusted = bool(
            s.presence_penalty
            or s.frequency_penalty
            or s.repetition_penalty != 1.0
            or s.logit_bias
            or s.suppress_ids
            or s.min_tokens
        )
