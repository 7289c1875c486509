"""Owns the seam between interfaces (api, transport) and the streaming core: what is asked, what comes back.

Data and protocols; everything here runs on the gateway's loop. The core calls a `Listener` directly
from the ZeroMQ drain, so a listener writes straight to its transport and never blocks or awaits: a queue
and a task per stream would double the cost of a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from shared.errors import ErrorCode, FinishReason
from shared.protocol import Grammar, ImageInput, ModelCard, Sampling


class RequestError(Exception):
    """A request that is refused, or that failed: `gateway.errors` maps `code` to each transport's status.

    `param` names the field at fault; the message names a safe value where there is one.
    """

    def __init__(
        self, code: ErrorCode, message: str, *, param: str | None = None, retry_after_s: float = 0.0
    ):
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """A decoded, resized picture: the wire's description of it and its two uint8 payloads."""

    spec: ImageInput
    global_crop: bytes
    canvas: bytes


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to generate, fully validated and tokenised. `n` > 1 is several of these."""

    request_id: str
    model_id: str
    prompt_ids: list[int]
    max_tokens: int
    sampling: Sampling
    images: list[PreparedImage] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)
    stop_ids: list[int] = field(default_factory=list)
    task: str = "text"  # text | detect | point
    max_objects: int = 0
    tenant: str = ""
    priority: int = 0
    deadline_s: float = 0.0
    grammar: Grammar | None = None
    echo_special: bool = False
    ignore_eos: bool = False  # run to max_tokens whatever the model says, as benchmarks do
    strip_start: bool = False  # drop white space before the first visible character


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One generated token with its log-probability, when asked for. `top`: (token id, logprob), most likely first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that may be shown now: whole characters, no part of a stop string. `token_index` from 0."""

    text: str
    token_ids: tuple[int, ...]
    token_index: int
    logprobs: list[TokenInfo] | None = None


@dataclass(frozen=True, slots=True)
class SpatialObject:
    """A point (`width` and `height` 0) or box in fractions of the picture, clamped to [0, 1]."""

    x: float
    y: float
    width: float = 0.0
    height: float = 0.0

    def box(self) -> dict[str, float]:
        """The box's corners under Moondream's names."""
        return {
            "x_min": max(0.0, self.x - self.width / 2),
            "y_min": max(0.0, self.y - self.height / 2),
            "x_max": min(1.0, self.x + self.width / 2),
            "y_max": min(1.0, self.y + self.height / 2),
        }


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted, and seconds spent."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    time_to_first_token_s: float = 0.0


@dataclass(frozen=True, slots=True)
class End:
    """The one terminal event. `error` is set when `reason` is ERROR."""

    reason: FinishReason
    usage: Usage
    error: RequestError | None = None
    stop_string: str | None = None


class Listener(Protocol):
    """Told of a stream's events in order, on the loop. Exceptions are caught, counted and cancel the stream."""

    def on_delta(self, delta: Delta) -> None:
        """New text."""

    def on_object(self, found: SpatialObject) -> None:
        """One more object of a detect or point request."""

    def on_end(self, end: End) -> None:
        """The stream is over; nothing follows."""


class RunningStream(Protocol):
    """Handle to a submitted request."""

    request_id: str

    def cancel(self) -> None:
        """Stop it in the worker at once. Idempotent. `on_end` is called with CANCELLED unless already ended."""


class Core(Protocol):
    """The streaming core as interfaces see it (implemented by `gateway.core.service.Service`)."""

    def card(self, model_id: str | None) -> ModelCard:
        """The model's card; None is the default model. Raises `RequestError` MODEL_NOT_FOUND or LOADING."""

    def cards(self) -> list[ModelCard]:
        """Every model served now."""

    async def encode_async(self, model_id: str, text: str, *, markup: bool = False) -> list[int]:
        """Tokenise without special tokens, off the loop when the text is long; `markup`: a rendered template."""

    def decode(self, model_id: str, token_ids: list[int]) -> str:
        """Detokenise, special tokens left out."""

    async def render_chat_async(
        self, model_id: str, messages: list[dict[str, object]], tools: list[object] | None
    ) -> str:
        """Apply the model's chat template, off the loop and within a deadline. Raises `RequestError`."""

    async def prepare_image(self, model_id: str, data_url: str, *, param: str) -> PreparedImage:
        """Decode and resize off the loop, in a limited process. Raises `RequestError`."""

    def submit(self, request: GenerateRequest, listener: Listener) -> RunningStream:
        """Admit and send to a worker. Raises `RequestError` (QUEUE_FULL, LOADING, CONTEXT_LENGTH_EXCEEDED, …)."""
