"""Owns one request's output: tokens in; text, objects and exactly one end out. Pure; runs on the gateway's loop.

No clock, no sockets, no tokenizer: the detokenizer is injected and the time is an argument. The caller feeds
`on_token` and `on_finish` and passes on what they return. After `end` is set nothing more comes out (I11).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol

from gateway.decisions.grounded import GroundedThought
from gateway.decisions.outlines import Outline
from gateway.generation import Delta, End, PromptScore, RequestError, SpatialObject, TokenInfo, Usage
from shared.errors import ErrorCode, FinishReason
from shared.protocol import Finish, PromptLogprobs, TokenLogprobs, TokenValues


class Detokenizer(Protocol):
    """Turns token ids into text piece by piece; the pieces' concatenation is the decoding of all ids at once."""

    def step(self, token_id: int) -> str:
        """The text this token settles, often its own; "" while it ends inside a character."""

    def flush(self) -> str:
        """What is still held back, with replacement characters for bytes that never became text."""


class Discontinuity(Exception):
    """A token whose index is not the next one: a duplicate when below it, a gap when above."""

    def __init__(self, expected: int, index: int) -> None:
        super().__init__(f"token {index} where {expected} was next")
        self.is_gap = index > expected


class StopMatcher:
    """Finds the first stop string to *complete*, across any split, holding back no more than could still match.

    Of two that complete at the same character, the longer one counts, so more text is withheld. Choosing by
    completion (not by start) makes the outcome independent of how the text was cut into pieces.
    """

    __slots__ = ("_held", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Text that may be shown now, and the stop string if one completed (the matcher is then spent)."""
        pending = self._held + text
        found: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = pending.find(stop)
            if start >= 0 and (found is None or (start + len(stop), start) < found[:2]):
                found = (start + len(stop), start, stop)
        if found is not None:
            self._held = ""
            return pending[: found[1]], found[2]
        keep = self._partial(pending)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep], None

    def flush(self) -> str:
        """The held-back text, once no stop string can complete any more."""
        held, self._held = self._held, ""
        return held

    def _partial(self, text: str) -> int:
        """Length of the longest suffix of `text` that begins some stop string."""
        best = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), best, -1):
                if text.endswith(stop[:length]):
                    best = length
                    break
        return best


class StreamState:
    """One sequence's output so far.

    `num_prompt` counts the prompt's tokens with the pictures', for the usage of a stream that ends here
    before the worker's own count arrives (a stop string, a lost worker).
    """

    __slots__ = (
        "_drop_space",
        "_first_s",
        "_infos",
        "_matcher",
        "_num_prompt",
        "_outline",
        "_pending_ids",
        "_pending_index",
        "_prompt",
        "_started_s",
        "_strip_start",
        "_task",
        "_thought",
        "_values",
        "_want_logprobs",
        "detokenizer",
        "end",
        "last_s",
        "next_index",
    )

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        started_s: float,
        num_prompt: int,
        stops: Sequence[str] = (),
        task: str = "text",
        want_logprobs: bool = False,
        strip_start: bool = False,
        drop_space: bool = False,
        thought: GroundedThought | None = None,
        outline: Outline | None = None,
    ) -> None:
        self.detokenizer = detokenizer
        self._matcher = StopMatcher(stops) if stops else None
        self._task = task
        self._want_logprobs = want_logprobs
        self._strip_start = strip_start
        self._drop_space = drop_space
        self._thought = thought
        self._outline = outline
        self._num_prompt = num_prompt
        self._started_s = started_s
        self._first_s = 0.0
        self._pending_ids: list[int] = []
        self._pending_index = 0
        self._infos: list[TokenInfo] = []
        self._prompt: list[PromptScore] = []
        self._values: list[TokenValues] = []
        self.next_index = 0
        self.last_s = 0.0
        self.end: End | None = None

    @property
    def is_plain(self) -> bool:
        """Whether from now on a token's text is all there is to it.

        The caller may then do `on_token`'s work itself: `next_index`, `last_s`, and the detokenizer's step.
        """
        return (
            self._task == "text"
            and self._matcher is None
            and self._thought is None
            and not (self._want_logprobs or self._strip_start or self._drop_space or self._pending_ids)
            and self.end is None
        )

    # ------------------------------------------------------------ events in

    def on_prompt(self, scores: PromptLogprobs) -> None:
        """Accept log-probabilities of the prompt; they all come before its first token. Raises ValueError for bad ones.

        A repeat, as of a frame that came twice, is passed over; a gap ends the stream.
        """
        num_known = len(self._prompt) + 1
        if self.end is not None or self.next_index or scores.first < num_known:
            return
        if scores.first > num_known:
            self.fail(RequestError(ErrorCode.STREAM_GAP, "log-probabilities were lost on the way"))
            return
        self._prompt += _prompt_scores(scores)

    def on_token(
        self,
        index: int,
        token_id: int,
        now_s: float,
        values: TokenValues | None = None,
        logprobs: TokenLogprobs | None = None,
    ) -> Delta | SpatialObject | None:
        """Accept the next token. May set `end` (a stop string). Raises `Discontinuity` and changes nothing."""
        if index != self.next_index:
            raise Discontinuity(self.next_index, index)
        self.next_index = index + 1
        if index == 0:
            self._first_s = now_s
        self.last_s = now_s
        if self.end is not None:
            return None
        if self._thought is not None:
            return self._on_thought(self._thought, token_id, values)
        if self._outline is not None:
            return self._outline.take(token_id, values.values if values is not None else None, index)
        if self._task != "text":
            return self._on_spatial(values)
        if not self._pending_ids:
            self._pending_index = index
        self._pending_ids.append(token_id)
        if self._want_logprobs:
            self._infos.append(_token_info(token_id, logprobs))
        text = self._visible(self.detokenizer.step(token_id))
        stop: str | None = None
        if self._matcher is not None and text:
            text, stop = self._matcher.feed(text)
        delta = self._take(text) if text else None
        if stop is not None:
            self.end = End(FinishReason.STOP, self._usage(), stop_string=stop)
        return delta

    def on_finish(self, finish: Finish) -> Delta | None:
        """Accept the worker's terminal event; sets `end`. Returns the last text, if any was held back."""
        if self.end is not None:
            return None
        timing = finish.timing
        usage = self._usage(
            finish.prompt_tokens,
            finish.completion_tokens,
            finish.cached_tokens,
            (timing.queue_s, timing.prefill_s, timing.decode_s),
        )
        # The worker counts a stop id but does not send it, so its count may be one above what arrived.
        num_unsent = 1 if finish.reason is FinishReason.STOP else 0
        if (
            finish.completion_tokens > self.next_index + num_unsent
            and finish.reason is not FinishReason.ERROR
        ):
            message = f"{finish.completion_tokens - self.next_index} generated tokens were lost on the way"
            self.end = End(FinishReason.ERROR, usage, RequestError(ErrorCode.STREAM_GAP, message))
            return None
        if finish.reason is FinishReason.ERROR:
            code = finish.code or ErrorCode.INTERNAL
            message = finish.message or f"the worker ended this request: {code.value}"
            self.end = End(FinishReason.ERROR, usage, RequestError(code, message))
            return None
        delta, stop = self._drain()
        reason = FinishReason.STOP if stop is not None else finish.reason
        self.end = End(reason, usage, stop_string=stop)
        return delta

    def fail(self, error: RequestError) -> None:
        """End with an error, unless it has ended."""
        if self.end is None:
            self.end = End(FinishReason.ERROR, self._usage(), error)

    def cancel(self) -> None:
        """End as cancelled, unless it has ended."""
        if self.end is None:
            self.end = End(FinishReason.CANCELLED, self._usage())

    # ------------------------------------------------------------ inside

    def _drain(self) -> tuple[Delta | None, str | None]:
        if self._thought is not None:
            return Delta("", (), self.next_index - 1, thought=self._thought.close()), None
        if self._task != "text":
            return None, None
        text, stop = self._visible(self.detokenizer.flush()), None
        if self._matcher is not None:
            text, stop = self._matcher.feed(text)
            if stop is None:
                text += self._matcher.flush()
        return (self._take(text) if text or self._infos or self._prompt else None), stop

    def _visible(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space = False
            text = text.removeprefix(" ")
        if self._strip_start and text:
            text = text.lstrip()
            self._strip_start = not text
        return text

    def _take(self, text: str) -> Delta:
        infos: list[TokenInfo] | None = None
        if self._want_logprobs:
            infos, self._infos = self._infos, []
        ids = tuple(self._pending_ids)
        self._pending_ids.clear()
        if self._prompt:
            prompt, self._prompt = self._prompt, []
            return Delta(text, ids, self._pending_index, infos, prompt)
        return Delta(text, ids, self._pending_index, infos)

    def _on_thought(
        self, thought: GroundedThought, token_id: int, values: TokenValues | None
    ) -> Delta | None:
        value = _clamp(values.values[0]) if values is not None and values.values else None
        part = thought.take(token_id, value)
        if thought.is_over:
            self._thought = None
        return None if part is None else Delta("", (token_id,), self.next_index - 1, thought=part)

    def _on_spatial(self, values: TokenValues | None) -> SpatialObject | None:
        """x, then y, then for a box its (width, height); an end token carries no values."""
        if values is None or not values.values:
            return None
        self._values.append(values)
        needed = 3 if self._task == "detect" else 2
        if len(self._values) < needed:
            return None
        (x, *_), (y, *_), *rest = (one.values for one in self._values)
        logprobs: tuple[float, ...] = ()
        if all(one.logprobs for one in self._values):
            # Of a coordinate the first is meant; a size has two.
            logprobs = tuple(
                score for i, one in enumerate(self._values) for score in one.logprobs[: 1 if i < 2 else 2]
            )
        self._values = []
        size = rest[0] if rest else [0.0, 0.0]
        width, height = (size[0], size[1]) if len(size) > 1 else (size[0], size[0])
        return SpatialObject(_clamp(x), _clamp(y), _clamp(width), _clamp(height), logprobs)

    def _usage(
        self,
        num_prompt: int | None = None,
        num_completion: int | None = None,
        num_cached: int = 0,
        timing: tuple[float, float, float] | None = None,
    ) -> Usage:
        first_s = self._first_s - self._started_s if self._first_s else 0.0
        if timing is None:  # the worker sent no timing: count the wait for the first token as prefill
            timing = (0.0, first_s, self.last_s - self._first_s)
        return Usage(
            prompt_tokens=self._num_prompt if num_prompt is None else num_prompt,
            completion_tokens=self.next_index if num_completion is None else num_completion,
            cached_tokens=num_cached,
            queue_s=timing[0],
            prefill_s=timing[1],
            decode_s=timing[2],
            time_to_first_token_s=first_s,
        )


def _token_info(token_id: int, logprobs: TokenLogprobs | None) -> TokenInfo:
    if logprobs is None:
        return TokenInfo(token_id, 0.0, [])
    ids = array("i")
    ids.frombytes(logprobs.top_ids)
    return TokenInfo(token_id, logprobs.logprob, list(zip(ids, logprobs.top_logprobs, strict=False)))


def _prompt_scores(scores: PromptLogprobs) -> list[PromptScore]:
    logprobs, ranks, ids, tops = array("f"), array("i"), array("i"), array("f")
    for into, data in (
        (logprobs, scores.logprobs),
        (ranks, scores.ranks),
        (ids, scores.top_ids),
        (tops, scores.top_logprobs),
    ):
        into.frombytes(data)
    if len(logprobs) != len(ranks) or len(ids) != len(tops) or (ranks and len(ids) % len(ranks)):
        raise ValueError("log-probabilities of a prompt that do not fit together")
    num = len(ids) // len(ranks) if ranks else 0
    return [
        PromptScore(
            logprob, rank, list(zip(ids[i * num : (i + 1) * num], tops[i * num : (i + 1) * num], strict=True))
        )
        for i, (logprob, rank) in enumerate(zip(logprobs, ranks, strict=True))
    ]


def _clamp(value: float) -> float:
    """Into [0, 1]; NaN, which compares false with everything, becomes 0."""
    return min(1.0, value) if value > 0.0 else 0.0
