"""Owns what API answers have in common: waiting for whole choices, usage, finish reasons, log-probabilities.

Runs on the gateway's loop. No sockets.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Callable, Sequence

from gateway.api.parameters import Json
from gateway.errors import error_body
from gateway.generation import (
    Delta,
    End,
    GenerateRequest,
    Listener,
    PromptScore,
    RequestError,
    RunningStream,
    SpatialObject,
    ThoughtPart,
    TokenInfo,
    TokenTexts,
    Usage,
)
from shared.errors import FinishReason


class EventShape:
    """What streamed answers have in common, as server-sent events have it; see `transport.sse.Shape`."""

    media_type: str = "text/event-stream; charset=utf-8"
    waiting: bytes = b": waiting\n\n"  # a comment, which clients pass over

    def around(self, index: int) -> tuple[bytes, bytes] | None:
        """See `transport.sse.Shape`: a shape whose deltas are a text between equal bytes says which."""
        return None

    def failure(self, error: RequestError) -> bytes:
        """An error in mid-stream."""
        return b"data: " + error_body(error) + b"\n\n"


class Collected:
    """One choice, whole: all its text, objects and log-probabilities, and its end."""

    def __init__(self, on_done: Callable[[], None]) -> None:
        self._on_done = on_done
        self._texts: list[str] = []
        self.on_text = self._texts.append  # see `TextListener`
        self.objects: list[SpatialObject] = []
        self.infos: list[TokenInfo] = []
        self.prompt: list[PromptScore] = []
        self.thoughts: list[ThoughtPart] = []
        self.end: End | None = None

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._texts)

    def on_delta(self, delta: Delta) -> None:
        """See `Listener`."""
        self._texts.append(delta.text)
        if delta.thought is not None:
            self.thoughts.append(delta.thought)
        if delta.logprobs:
            self.infos.extend(delta.logprobs)
        if delta.prompt is not None:
            self.prompt = delta.prompt

    def on_object(self, found: SpatialObject) -> None:
        """See `Listener`."""
        self.objects.append(found)

    def on_end(self, end: End) -> None:
        """See `Listener`."""
        self.end = end
        self._on_done()


async def collect(
    submit: Callable[[GenerateRequest, Listener], RunningStream], asked: Sequence[GenerateRequest]
) -> list[Collected]:
    """Submit all choices and wait for their ends. Raises the first `RequestError`; cancels when cancelled."""
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    choices: list[Collected] = []

    def on_done() -> None:
        ends = [choice.end for choice in choices]
        if not done.done() and (None not in ends or any(end is not None and end.error for end in ends)):
            done.set_result(None)

    running: list[RunningStream] = []
    try:
        choices.extend(Collected(on_done) for _ in asked)
        for one, choice in zip(asked, choices, strict=True):
            running.append(submit(one, choice))
        await done
    finally:
        for stream in running:
            stream.cancel()
    for choice in choices:
        if choice.end is not None and choice.end.error is not None:
            raise choice.end.error
    return choices


def usage_object(ends: Sequence[End]) -> Json:
    """OpenAI's `usage` over all choices: the shared prompt counts once."""
    usages = [end.usage for end in ends]
    prompt = max((usage.prompt_tokens for usage in usages), default=0)
    completion = sum(usage.completion_tokens for usage in usages)
    cached = min(prompt, max((usage.cached_tokens for usage in usages), default=0))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def metrics_object(usage: Usage) -> Json:
    """Moondream's `metrics`: tokens and milliseconds."""
    return {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "prefill_time_ms": round(usage.prefill_s * 1000, 3),
        "decode_time_ms": round(usage.decode_s * 1000, 3),
        "ttft_ms": round(usage.time_to_first_token_s * 1000, 3),
    }


def chat_logprobs(infos: Sequence[TokenInfo], tokens: TokenTexts) -> Json:
    """The chat form: one entry a token, with its bytes."""
    return {"content": [token_logprobs(info, tokens) for info in infos], "refusal": None}


def token_logprobs(info: TokenInfo, tokens: TokenTexts) -> Json:
    """One token and the most likely ones in its place, in the form of the chat and responses interfaces."""
    top = [_scored(token_id, logprob, tokens) for token_id, logprob in info.top]
    return {**_scored(info.token_id, info.logprob, tokens), "top_logprobs": top}


def _scored(token_id: int, logprob: float, tokens: TokenTexts) -> Json:
    raw = tokens.token_bytes(token_id)
    return {"token": raw.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(raw)}


class Spelling:
    """Gives the text of each token of one answer, as the texts join to the answer, and counts characters."""

    __slots__ = ("_decode", "_tokens", "offset")

    def __init__(self, tokens: TokenTexts, offset: int = 0) -> None:
        self.offset = offset  # characters before the next token
        self._tokens = tokens
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def step(self, token_id: int) -> tuple[str, int]:
        """The text that the token adds, and the offset where it begins. A character of several tokens comes with its last."""
        start = self.offset
        if not self._tokens.is_shown(token_id):
            return self._tokens.token_text(token_id), start
        text = self._decode(self._tokens.token_bytes(token_id))
        self.offset += len(text)
        return text, start

    def alone(self, token_id: int) -> str:
        """A token's text by itself."""
        return self._tokens.token_text(token_id)


def finite(logprob: float) -> float:
    """A log-probability as JSON, which has no infinities: −9999 stands for an impossible token, as at OpenAI."""
    return logprob if logprob > -9999.0 else -9999.0


def finish_reason(end: End | None) -> str:
    """OpenAI's name for how a choice ended; a deadline keeps its own."""
    return "stop" if end is None or end.reason is FinishReason.CANCELLED else end.reason.value
