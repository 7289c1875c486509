"""Owns one choice's answer in parts: its thinking, its text and its calls, streamed or whole. Gateway's loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from gateway.api.parameters import Json, invalid
from gateway.api.tools import ToolsAsked, call_id, shown_marks
from gateway.decisions.answer_parts import (
    DIALECTS,
    AnswerReader,
    CallArguments,
    CallOpened,
    Dialect,
    Part,
    Said,
    ThinkingTags,
    Thought,
)
from gateway.generation import ChatFormat, RequestError, ServedModel
from shared.errors import ErrorCode
from shared.protocol import ThinkingBudget


@dataclass(slots=True)
class Call:
    """A tool call as far as it has come. `arguments` is JSON text."""

    id: str
    name: str
    arguments: str = ""

    def value(self) -> Json:
        """The arguments as an object; those of a call that was cut off are none."""
        try:
            found = msgspec.json.decode(self.arguments)
        except (msgspec.DecodeError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


@dataclass(slots=True)
class Spoken:
    """A whole answer."""

    text: str = ""
    thought: str = ""
    calls: list[Call] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Reading:
    """How a request's answers are read. Without a dialect and thinking they are plain text."""

    dialect: Dialect | None = None
    thinking: ThinkingTags | None = None
    thinks_first: bool = False
    is_parallel: bool = True
    shown_ids: tuple[int, ...] = ()
    format: ChatFormat | None = None

    @property
    def is_plain(self) -> bool:
        """Whether an answer's text is passed on as it is."""
        return self.dialect is None and self.thinking is None

    def reader(self) -> SpokenReader:
        """A fresh reader for one choice."""
        return SpokenReader(self)


class SpokenReader:
    """Reads one choice: calls get their ids here, and the second of a request that wants one alone is left out."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._reader = AnswerReader(reading.dialect, reading.thinking, thinks_first=reading.thinks_first)
        self.calls: list[Call] = []

    def feed(self, text: str) -> list[Part]:
        """See `AnswerReader.feed`."""
        return self._kept(self._reader.feed(text))

    def close(self) -> list[Part]:
        """See `AnswerReader.close`."""
        return self._kept(self._reader.close())

    def whole(self, text: str) -> Spoken:
        """The answer in one piece."""
        parts = self.feed(text) + self.close()
        return Spoken(
            "".join(part.text for part in parts if isinstance(part, Said)),
            "".join(part.text for part in parts if isinstance(part, Thought)),
            self.calls,
        )

    def _kept(self, parts: Sequence[Part]) -> list[Part]:
        kept: list[Part] = []
        for part in parts:
            if isinstance(part, CallOpened | CallArguments) and part.index and not self._reading.is_parallel:
                continue
            if isinstance(part, CallOpened):
                self.calls.append(Call(call_id(self._reading.format), part.name))
            elif isinstance(part, CallArguments):
                self.calls[part.index].arguments += part.text
            kept.append(part)
        return kept


def reading_of(model: ServedModel, tools: ToolsAsked | None, *, is_constrained: bool) -> Reading:
    """How the answers to a request are read. A constrained answer is its constraint's, from its first character."""
    format = model.chat_format
    if tools is not None and tools.is_forced:
        return Reading(DIALECTS["forced"], is_parallel=tools.is_parallel, format=format)
    if format is None:
        return Reading()
    dialect = None if tools is None else DIALECTS[format.dialect]
    thinking = None if format.thinking is None or is_constrained else ThinkingTags(*format.thinking)
    marks: list[str] = [] if thinking is None else [thinking.opens, thinking.closes]
    if dialect is not None:
        marks += [*dialect.opens, *dialect.closes, "[ARGS]", "[CALL_ID]"]
    return Reading(
        dialect,
        thinking,
        is_parallel=tools is None or tools.is_parallel,
        shown_ids=tuple(shown_marks(model, marks)),
        format=format,
    )


def thought_budget(
    model: ServedModel, reading: Reading, asked: int | None, param: str
) -> ThinkingBudget | None:
    """What a worker is told of how long a thought may be. Raises `RequestError` for a model where that cannot be kept."""
    if asked is None:
        return None
    format = model.chat_format
    if format is None or format.thinking is None:
        message = f"{param}: model {model.card.model_id} does not think before it answers; leave it out"
        raise RequestError(ErrorCode.UNSUPPORTED, message, param=param)
    if reading.thinking is None:
        return None  # a constrained answer does not think
    opens, closes = model.mark_id(reading.thinking.opens), model.mark_id(reading.thinking.closes)
    if opens is None or closes is None:
        message = (
            f"{param}: the marks around model {model.card.model_id}'s thinking are not tokens of their own, so it is "
            "not counted; bound it with max_tokens"
        )
        raise RequestError(ErrorCode.UNSUPPORTED, message, param=param)
    return ThinkingBudget(asked, [] if reading.thinks_first else [opens], [closes])


def budget_asked(budget: int | None, token_budget: int | None) -> tuple[int | None, str]:
    """What a body's `thinking_budget` or `thinking_token_budget` (vLLM's name for it) says, and which of them says it.

    Raises `RequestError` where both do, and differ.
    """
    if token_budget is None:
        return budget, "thinking_budget"
    if budget not in (None, token_budget):
        raise invalid("give either thinking_budget or thinking_token_budget", "thinking_budget")
    return token_budget, "thinking_token_budget"


def opens_thinking(model: ServedModel, reading: Reading, prompt_ids: Sequence[int]) -> bool:
    """Whether the prompt ends within thinking, as that of models which always think does."""
    if reading.thinking is None:
        return False
    last = "".join(model.tokens.token_text(token_id) for token_id in prompt_ids[-12:])
    return last.rstrip().endswith(reading.thinking.opens)
