"""Owns the decode state of one request. Pure; decode thread.

Two clocks run in a sequence. *Launched* counters (`num_computed`, `num_sampled`) move when a step is
planned; *committed* state (`tokens`, constraint, finish) moves when the host has read the step's outputs.
In a pipeline the first is ahead of the second by the steps in flight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from shared.errors import ErrorCode, FinishReason
from shared.protocol import Sampling
from worker.constraints.constraint import Constraint

IMAGE_TOKEN = -1
"""Stands in `tokens` for a position whose embedding comes from a picture."""


class Phase(Enum):
    """Where a sequence stands with the scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Picture:
    """One image of a sequence: its two uint8 payloads, its place, and its cache key."""

    position: int  # first expanded position its tokens take
    num_tokens: int
    tiles_h: int
    tiles_w: int
    canvas_height: int
    canvas_width: int
    digest: bytes
    global_crop: bytes
    canvas: bytes

    @property
    def num_crops(self) -> int:
        """Crops the vision encoder runs for it, the global one included."""
        return 1 + self.tiles_h * self.tiles_w


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
    prefix_tokens: int = 0
    task: str = "text"
    constraint: Constraint | None = None
    table_slot: int = (
        0  # where its automaton lives on the device; 0: the host makes its masks, or it has none
    )
    is_adjusted: bool = False  # logits are biased or penalised before sampling; set by __post_init__
    is_spatial: bool = False  # coordinate and size tokens carry values; set by __post_init__
    tenant: str = ""
    priority: int = 0
    deadline_s: float = 0.0  # absolute, 0: none

    phase: Phase = Phase.WAITING
    row: int = -1
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0  # positions whose K and V a launched step writes
    num_known: int = 0  # positions to prefill before decoding: all of `tokens` at (re)admission
    num_sampled: int = 0  # generated tokens, those in flight included
    inflight_refs: int = 0
    is_paced: bool = False  # its masks are slow: built ahead on a thread (worker.loop.masks)
    awaits_mask: bool = False  # paced, and its next mask is not there yet: it sits out
    ready_mask: npt.NDArray[np.int32] | None = None  # the mask built ahead
    preempted: bool = False  # to be released and queued again once out of flight
    preemptions: int = 0
    cached_tokens: int = 0
    values: dict[int, tuple[float, float]] = field(default_factory=dict)  # generated index → decoded value
    page_keys: list[bytes] = field(default_factory=list)  # prefix-cache keys of its full pages

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
        """Some known position has not been launched yet."""
        return self.num_computed < self.num_known

    def __post_init__(self) -> None:
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
