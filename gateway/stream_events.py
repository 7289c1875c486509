"""Owns what a request gets back, and who hears it: text, objects, the one end, and writing without the listener.

Data and protocols; everything here runs on the gateway's loop. The core calls a `Listener` from the ZeroMQ drain,
so a listener writes straight to its transport and never blocks or awaits: a queue and a task a stream would double
the cost of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from shared.errors import ErrorCode, FinishReason


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
class TokenInfo:
    """One generated token with its log-probability, when asked for. `top`: (token id, logprob), most likely first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class PromptScore:
    """One prompt token's log-probability given all before it; rank 1: the most likely. `top` as `TokenInfo`'s."""

    logprob: float
    rank: int
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class ThoughtPart:
    """What one token adds to a thought: text, a point (x, y) of the piece that is being said, or the end of that piece."""

    text: str = ""
    point: tuple[float, float] | None = None
    closes: bool = False


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that may be shown now: whole characters, no part of a stop string. `token_index` from 0.

    The first delta has the prompt's scores, where they were asked for: from its second token on.
    """

    text: str
    token_ids: tuple[int, ...]
    token_index: int
    logprobs: list[TokenInfo] | None = None
    prompt: list[PromptScore] | None = None
    thought: ThoughtPart | None = None  # of a request that reasons first; `text` is empty then


@dataclass(frozen=True, slots=True)
class SpatialObject:
    """A point (`width` and `height` 0) or box in fractions of the picture, clamped to [0, 1].

    `logprobs`, where asked for: natural log-probabilities of the bins of x, y and a box's width and height, in this order.
    """

    x: float
    y: float
    width: float = 0.0
    height: float = 0.0
    logprobs: tuple[float, ...] = ()

    def scores(self) -> dict[str, float]:
        """The log-probabilities by name."""
        return dict(zip(("x", "y", "width", "height"), self.logprobs, strict=False))

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
    """Hears a stream's events in order, on the loop. Its exceptions are caught and counted, and cancel the stream.

    One that needs a delta's text alone is a `TextListener`.
    """

    def on_delta(self, delta: Delta) -> None:
        """New text."""

    def on_object(self, found: SpatialObject) -> None:
        """One more object of a detect or point request; of a segment request the box, before any of the path."""

    def on_end(self, end: End) -> None:
        """The stream is over; nothing follows."""


class TextListener(Listener, Protocol):
    """From its second delta on it hears, of a stream without stop strings and log-probabilities, one `on_text` a token."""

    def on_text(self, text: str) -> None:
        """New text: what `on_delta` would be told with more words."""


class Framing(Enum):
    """How an event is framed on its connection."""

    CHUNK = "chunk"  # of an HTTP/1.1 body
    TEXT_FRAME = "text_frame"  # a WebSocket's message


@dataclass(frozen=True, slots=True)
class TextForm:
    """All that is needed to write a stream's tokens to its client without its listener.

    An event is the first part, the number of the event if they have any, the second, the text in JSON, the third.
    """

    descriptor: int  # of the connection's socket
    framing: Framing
    parts: tuple[bytes, bytes, bytes]
    number: int | None  # of the last event
    keeps_text: bool  # the listener is to be told what was said
    is_closing: Callable[[], bool]  # the descriptor is the connection's no more, or soon will not be
    # Bytes of others that wait in the transport, where others write too; they must leave first.
    others_wait: Callable[[], int] | None = None


class Carrier(Protocol):
    """Who writes a stream's tokens in its listener's place."""

    def come_home(self) -> None:
        """Give the stream back to its listener. Idempotent."""

    def written_bytes(self) -> int:
        """What was written since the stream was taken on."""


class LendingListener(TextListener, Protocol):
    """One whose tokens may be written without it, from `lend` on and until `take_back`."""

    def form(self) -> TextForm | None:
        """How its tokens are written; None while it must do that itself."""

    def lend(self, carrier: Carrier) -> None:
        """From now on `carrier` writes. Before anybody else writes to the connection the stream is to come home."""

    def take_back(self, number: int, text: str, written_bytes: int) -> None:
        """It writes itself again: the number of the last event, what was said, if that was to be told, and how many bytes."""

    def give(self, rest: bytes) -> None:
        """Write the rest of an event, of which the client did not take all."""


class RunningStream(Protocol):
    """Handle to a submitted request."""

    request_id: str

    def cancel(self) -> None:
        """Stop it in the worker at once. Idempotent. `on_end` is called with CANCELLED unless already ended."""
