"""Owns reading an answer as it streams: what is thought, what is said, and which tools are called. Pure.

Text comes in by pieces of any size; the parts that come out do not depend on how the text was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from gateway.decisions.call_forms import CallReader, JsonCalls, NamedCalls, PythonCalls


@dataclass(frozen=True, slots=True)
class Said:
    """Text for the reader of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """Text of the model's thinking."""

    text: str


@dataclass(frozen=True, slots=True)
class CallOpened:
    """A tool call's name is known; its arguments follow. `index` counts the answer's calls from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A further piece of a call's arguments: JSON text."""

    index: int
    text: str


Part = Said | Thought | CallOpened | CallArguments


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a family writes tool calls: behind one of `opens` (anywhere) or, if `at_start`, from the answer's first character."""

    name: str
    form: Callable[[], CallReader]
    opens: tuple[str, ...] = ()
    closes: tuple[str, ...] = ()
    at_start: bool = False


DIALECTS: Final = {
    dialect.name: dialect
    for dialect in (
        # Hermes, Qwen 2.5 and 3, SmolLM3; and models that are told how by `gateway.api.tools`
        Dialect("tagged", JsonCalls, ("<tool_call>",), ("</tool_call>",)),
        Dialect("mistral", NamedCalls, ("[TOOL_CALLS]",)),
        Dialect("lfm", PythonCalls, ("<|tool_call_start|>",), ("<|tool_call_end|>",)),
        Dialect("granite", JsonCalls, ("<|tool_call|>",), ("<|/tool_call|>",)),  # Phi-4-mini closes them
        Dialect("llama", JsonCalls, ("<|python_tag|>",), at_start=True),
        Dialect("pythonic", PythonCalls, at_start=True),
        Dialect("forced", JsonCalls, at_start=True),  # the answer's grammar allows calls only
    )
}


@dataclass(frozen=True, slots=True)
class ThinkingTags:
    """The marks around a model's thinking."""

    opens: str = "<think>"
    closes: str = "</think>"


class AnswerReader:
    """Reads one answer. `thinks_first`: the prompt has opened the thinking already.

    White space between the parts belongs to none of them: it is held back until it is known what follows. A call that
    does not read as one is said as the text it is.
    """

    def __init__(
        self,
        dialect: Dialect | None = None,
        thinking: ThinkingTags | None = None,
        *,
        thinks_first: bool = False,
    ) -> None:
        self._dialect = dialect
        self._thinking = thinking
        self._pending = ""  # text that may be the beginning of a mark, or white space before one
        self._read: Callable[[bool], list[Part] | None] = (
            self._thought if thinks_first and thinking is not None else self._start
        )
        self._calls: CallReader | None = None
        self._has_begun = False  # something of the part being read was given out
        self._opening = ""  # the mark before calls, until one of them has been read
        self.num_calls = 0

    def feed(self, text: str) -> list[Part]:
        """The parts that this text settles."""
        self._pending += text
        return self._run(is_last=False)

    def close(self) -> list[Part]:
        """The parts still held back, when the answer has ended."""
        return self._run(is_last=True)

    def _run(self, *, is_last: bool) -> list[Part]:
        parts: list[Part] = []
        while (found := self._read(is_last)) is not None:
            parts.extend(found)
        return _joined(parts)

    # ------------------------------------------------------------ states: each reads on, or returns None for more text

    def _start(self, is_last: bool) -> list[Part] | None:
        """Before the first visible character: thinking may open, or the whole answer be calls."""
        text = self._pending.lstrip()
        thinking = self._thinking
        if thinking is not None:
            if text.startswith(thinking.opens):
                self._pending = text[len(thinking.opens) :]
                return self._to(self._thought)
            if not is_last and thinking.opens.startswith(text):
                return None
        if not text and not is_last:
            return None
        return self._to(self._body)

    def _thought(self, is_last: bool) -> list[Part] | None:
        assert self._thinking is not None
        before, mark, after = self._split((self._thinking.closes,), is_last)
        text = self._trimmed(before, ends=bool(mark))
        said: list[Part] = [Thought(text)] if text else []
        if not mark:
            return said or None
        self._pending = after
        return said + self._to(self._body)

    def _body(self, is_last: bool) -> list[Part] | None:
        """At the beginning of what is said: the one place where a call may stand without a mark."""
        if self._dialect is not None and self._dialect.at_start:
            text = self._pending.lstrip()
            if not text and not is_last:
                return None
            if text[:1] in ("[", "{"):
                self._pending, self._opening = text, self._pending[: len(self._pending) - len(text)]
                self._calls = self._dialect.form()
                return self._to(self._in_calls)
        return self._to(self._said)

    def _said(self, is_last: bool) -> list[Part] | None:
        if self._dialect is None:
            text, self._pending = self._trimmed(self._pending), ""
            return [Said(text)] if text else None
        before, mark, after = self._split(self._dialect.opens, is_last)
        text = self._trimmed(before, ends=bool(mark))
        said: list[Part] = [Said(text)] if text else []
        if not mark:
            return said or None
        self._pending = after
        self._opening = before[len(before.rstrip()) :] * self._has_begun + mark
        self._calls = self._dialect.form()
        return said + self._to(self._in_calls)

    def _in_calls(self, is_last: bool) -> list[Part] | None:
        assert self._calls is not None and self._dialect is not None
        outcome = self._calls.feed(self._pending, self._dialect.closes, is_last)
        self._pending = outcome.rest
        parts: list[Part] = []
        for event in outcome.events:
            if event.name is not None:
                self.num_calls += 1
                parts.append(CallOpened(self.num_calls - 1, event.name))
            if event.arguments:
                parts.append(CallArguments(self.num_calls - 1, event.arguments))
            self._opening = ""
        if outcome.is_over:
            if self._opening or outcome.unread:
                parts.append(Said(self._opening + outcome.unread))
            return parts + self._to(self._said)
        return parts or None

    # ------------------------------------------------------------ helpers

    def _to(self, state: Callable[[bool], list[Part] | None]) -> list[Part]:
        self._read, self._has_begun = state, False
        return []

    def _split(self, marks: Sequence[str], is_last: bool) -> tuple[str, str, str]:
        """The pending text before the first mark, that mark, and the text behind it; what may begin a mark stays pending."""
        found = min(
            ((place, -len(mark), mark) for mark in marks if (place := self._pending.find(mark)) >= 0),
            default=None,
        )
        if found is not None:
            place, _, mark = found
            return self._pending[:place], mark, self._pending[place + len(mark) :]
        keep = 0 if is_last else _partial(self._pending, marks)
        before = self._pending[: len(self._pending) - keep]
        kept = self._pending[len(before) :]
        if not is_last:  # white space in front of a possible mark waits as well
            bare = before.rstrip()
            before, kept = bare, before[len(bare) :] + kept
        self._pending = kept
        return before, "", ""

    def _trimmed(self, text: str, *, ends: bool = False) -> str:
        """`text` without the white space at the part's own two ends; a plain answer keeps that at its beginning."""
        if ends:
            text = text.rstrip()
        if not self._has_begun and (self._thinking is not None or self.num_calls):
            text = text.lstrip()
        self._has_begun = self._has_begun or bool(text)
        return text


def _partial(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a mark."""
    longest = max((len(mark) for mark in marks), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return size
    return 0


def _joined(parts: list[Part]) -> list[Part]:
    """Neighbours of one kind as one part."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, Said) and isinstance(last, Said):
            joined[-1] = Said(last.text + part.text)
        elif isinstance(part, Thought) and isinstance(last, Thought):
            joined[-1] = Thought(last.text + part.text)
        elif isinstance(part, CallArguments) and isinstance(last, CallArguments) and part.index == last.index:
            joined[-1] = CallArguments(last.index, last.text + part.text)
        else:
            joined.append(part)
    return joined
