"""Owns the shapes of what Moondream's routes answer, for the description at `/openapi.json`. Read, never built: no thread."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from gateway.api.described.answers import Told


class MoondreamMetrics(Told, kw_only=True):
    """Tokens and milliseconds."""

    input_tokens: int
    output_tokens: int
    prefill_time_ms: float
    decode_time_ms: float
    ttft_ms: float


class _MoondreamAnswer(Told, kw_only=True):
    request_id: str
    finish_reason: Literal["stop", "length", "deadline"]
    metrics: MoondreamMetrics


class BinScores(Told, kw_only=True):
    """Natural log-probabilities of the bins that the coordinates, and of a box the sizes, were read from."""

    x: float
    y: float
    width: float | UnsetType = UNSET
    height: float | UnsetType = UNSET


class Box(Told, kw_only=True):
    """Corners in fractions of the picture."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float
    logprobs: BinScores | UnsetType = UNSET


class Point(Told, kw_only=True):
    """A place in fractions of the picture."""

    x: float
    y: float
    logprobs: BinScores | UnsetType = UNSET


class Grounding(Told, kw_only=True):
    """The points (x, y) that the characters [start_idx, end_idx) of a thought speak of, in fractions of the picture."""

    start_idx: int
    end_idx: int
    points: list[list[float]]


class GroundedReasoning(Told, kw_only=True):
    """What the model thought before it answered."""

    text: str
    grounding: list[Grounding]


class ReasoningChunk(Told, kw_only=True):
    """More of a thought: its text, or a point of the piece that is being said. The last event has all, with `grounding`."""

    text: str
    points: list[list[float]] | UnsetType = UNSET
    grounding: list[Grounding] | UnsetType = UNSET


class QueryAnswer(_MoondreamAnswer, kw_only=True):
    """The answer of `/v1/query`."""

    answer: str
    reasoning: GroundedReasoning | UnsetType = UNSET


class CaptionAnswer(_MoondreamAnswer, kw_only=True):
    """The answer of `/v1/caption`."""

    caption: str


class DetectAnswer(_MoondreamAnswer, kw_only=True):
    """The answer of `/v1/detect`."""

    objects: list[Box]


class PointAnswer(_MoondreamAnswer, kw_only=True):
    """The answer of `/v1/point`."""

    points: list[Point]


class SegmentAnswer(_MoondreamAnswer, kw_only=True):
    """The answer of `/v1/segment`: an SVG path in fractions of the box; empty, with a box of null, where nothing was found."""

    path: str
    bbox: Box | None


class SegmentChunk(Told, kw_only=True):
    """The data of one event: the box, a command of the path, or with `completed` true all of it."""

    type: Literal["bbox", "path_delta", "final"]
    bbox: Box | UnsetType | None = UNSET
    chunk: str | UnsetType = UNSET
    completed: bool | UnsetType = UNSET
    token_index: int | UnsetType = UNSET
    path: str | UnsetType = UNSET
    request_id: str | UnsetType = UNSET
    finish_reason: Literal["stop", "length", "deadline"] | UnsetType = UNSET
    metrics: MoondreamMetrics | UnsetType = UNSET


class MoondreamChunk(Told, kw_only=True):
    """The data of one event: a piece of the answer, or with `completed` true all of it, under the whole answer's names."""

    chunk: str
    completed: bool
    token_index: int | UnsetType = UNSET
    request_id: str | UnsetType = UNSET
    finish_reason: Literal["stop", "length", "deadline"] | UnsetType = UNSET
    metrics: MoondreamMetrics | UnsetType = UNSET
    answer: str | UnsetType = UNSET
    reasoning: ReasoningChunk | UnsetType = UNSET
    caption: str | UnsetType = UNSET
    objects: list[Box] | UnsetType = UNSET
    points: list[Point] | UnsetType = UNSET
