"""Owns the forms in which models write tool calls: JSON objects, a name before JSON, and Python calls. Pure.

A reader gets text by pieces and gives calls' names and arguments as they settle; arguments are JSON text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from keyword import kwlist
from typing import Any, Final, Protocol

_ARGUMENTS: Final = ("arguments", "parameters", "input")
_MAX_CALL_CHARS: Final = 1 << 20  # a call that is longer and still has no name is text


@dataclass(frozen=True, slots=True)
class CallEvent:
    """A call's name, once, when a call opens; and a piece of its arguments."""

    name: str | None
    arguments: str = ""


@dataclass(slots=True)
class Outcome:
    """What a piece of text settled. `rest` was not read: it comes again with the next piece, or is read by others."""

    events: list[CallEvent] = field(default_factory=list)
    rest: str = ""
    is_over: bool = False  # no calls follow
    unread: str = ""  # with `is_over`: text that turned out to be no call


class CallReader(Protocol):
    """Reads the calls behind one mark."""

    def feed(self, text: str, closes: Sequence[str], is_last: bool) -> Outcome:
        """`text` is what `rest` left last time and what is new. `closes` end the calls, between two of them."""


class JsonCalls:
    """`{"name": …, "arguments": {…}}`, one or several, with or without a list around them.

    `parameters` or `input` may stand for `arguments`, and the call may be in a `function` object as at OpenAI. The
    arguments are given as they come; where they come before the name, they wait for it.
    """

    def __init__(self) -> None:
        self._object: _JsonCall | None = None
        self._num_lists = 0
        self._skipped = ""  # what stood before the first call
        self._num_calls = 0

    def feed(self, text: str, closes: Sequence[str], is_last: bool) -> Outcome:
        """See `CallReader`."""
        outcome = Outcome()
        place = 0
        while place < len(text):
            if self._object is not None:
                place = self._object.read(text, place, outcome.events)
                if self._object.is_whole and self._object.is_given:
                    self._object = None
                    self._num_calls += 1
                elif self._object.is_whole or self._object.is_hopeless:
                    return self._over(outcome, text[place:])
            elif text[place] == "{":
                self._object = _JsonCall()
            elif self._goes_on(text[place]):
                place += 1
            elif self._num_calls == 0:
                return self._over(outcome, text[place:])
            else:
                return _between_calls(outcome, text[place:], closes, is_last)
        return self._over(outcome, "") if is_last else outcome

    def _goes_on(self, char: str) -> bool:
        """Whether a call may follow this character."""
        if char in "[]":
            if self._num_lists != "[]".index(char):
                return False
            self._num_lists += 1
        elif not char.isspace() and char not in ",;":
            return False
        if self._num_calls == 0:
            self._skipped += char
        return True

    def _over(self, outcome: Outcome, rest: str) -> Outcome:
        outcome.is_over, outcome.rest = True, rest
        has_call = self._num_calls or (self._object is not None and self._object.is_given)
        if not has_call:
            outcome.unread = self._skipped
        if self._object is not None and not self._object.is_given:
            outcome.unread += self._object.text
        return outcome


class _JsonCall:
    """One object, character by character."""

    def __init__(self) -> None:
        self.text = ""
        self.is_whole = False
        self.is_given = False  # its name was given out
        self._depth = 0
        self._in_string = self._is_escaped = False
        self._string_start = 0
        self._key: str | None = None
        self._is_value = False
        self._name: str | None = None
        self._start: int | None = None  # of the arguments
        self._end: int | None = None
        self._given = 0

    @property
    def is_hopeless(self) -> bool:
        """Whether so much has come without a name that this is no call."""
        return not self.is_given and len(self.text) > _MAX_CALL_CHARS

    def read(self, text: str, place: int, events: list[CallEvent]) -> int:
        """Read `text` from `place` to the object's end or the text's; returns where it stopped."""
        begin = len(self.text)
        self.text += text[place:]
        for at in range(begin, len(self.text)):
            self._step(self.text[at], at)
            if self._depth == 0:
                self.is_whole = True
                self.text = self.text[: at + 1]
                break
        self._give(events)
        return place + len(self.text) - begin

    def _step(self, char: str, at: int) -> None:
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = True
            elif char == '"':
                self._in_string = False
                if self._depth == 1:
                    self._settle(_loads(self.text[self._string_start : at + 1]))
        elif char == '"':
            self._in_string, self._string_start = True, at
        elif char in "{[":
            self._depth += 1
            if self._depth == 2 and char == "{" and self._is_value and self._key in _ARGUMENTS:
                self._start = at if self._start is None else self._start
        elif char in "}]":
            self._depth -= 1
            if self._depth == 1 and self._start is not None and self._end is None:
                self._end = at + 1
        elif self._depth == 1 and char == ":":
            self._is_value = True
        elif self._depth == 1 and char == ",":
            self._is_value, self._key = False, None

    def _settle(self, value: Any) -> None:
        """A string at the object's own level has ended."""
        if not isinstance(value, str):
            return
        if not self._is_value:
            self._key = value
        elif self._key == "name":
            self._name = value

    def _give(self, events: list[CallEvent]) -> None:
        if self.is_whole and (not self.is_given and (self._name is None or self._start is None)):
            self._give_whole(events)
            return
        if self._name is None or self._start is None:
            return
        end = len(self.text) if self._end is None else self._end
        start = max(self._start, self._given)
        if not self.is_given:
            self.is_given = True
            events.append(CallEvent(self._name, self.text[start:end]))
        elif end > start:
            events.append(CallEvent(None, self.text[start:end]))
        self._given = end

    def _give_whole(self, events: list[CallEvent]) -> None:
        """Another layout, read when it is whole: no arguments, arguments as text, or the call in `function`."""
        whole = _loads(self.text)
        call = whole.get("function") if isinstance(whole, dict) and "name" not in whole else whole
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return
        arguments: Any = next((call[name] for name in _ARGUMENTS if name in call), {})
        if isinstance(arguments, str):
            arguments = _loads(arguments) if arguments.strip() else {}
        if arguments is None:
            arguments = {}
        if isinstance(arguments, dict):
            self.is_given = True
            events.append(CallEvent(call["name"], json.dumps(arguments, ensure_ascii=False)))


class NamedCalls:
    """Mistral's: a list of JSON calls, or, in newer models, `name[ARGS]{…}` with or without `[CALL_ID]id` before it."""

    def __init__(self) -> None:
        self._json: JsonCalls | None = None
        self._arguments: _Brackets | None = None

    def feed(self, text: str, closes: Sequence[str], is_last: bool) -> Outcome:
        """See `CallReader`."""
        if self._json is None and self._arguments is None:
            bare = text.lstrip()
            if not bare:
                return Outcome(rest="" if is_last else text, is_over=is_last, unread=text if is_last else "")
            if bare[0] in "[{":
                self._json = JsonCalls()
            else:
                head, brace, rest = bare.partition("{")
                if not brace:
                    is_text = is_last or len(bare) > _MAX_CALL_CHARS or "\n" in bare
                    if is_text:
                        return Outcome(is_over=True, unread=text)
                    return Outcome(rest=text)
                name = head.partition("[ARGS]")[0].partition("[CALL_ID]")[0].strip()
                if not name:
                    return Outcome(is_over=True, unread=text)
                self._arguments = _Brackets('"')
                outcome = self._read_arguments(brace + rest, is_last)
                outcome.events.insert(0, CallEvent(name))
                return outcome
        if self._json is not None:
            return self._json.feed(text, closes, is_last)
        return self._read_arguments(text, is_last)

    def _read_arguments(self, text: str, is_last: bool) -> Outcome:
        assert self._arguments is not None
        end = self._arguments.end(text)
        if end is None:
            return Outcome([CallEvent(None, text)] if text else [], is_over=is_last)
        return Outcome([CallEvent(None, text[:end])], rest=text[end:], is_over=True)


class PythonCalls:
    """`[get_weather(city="Oslo", days=2), …]`: read as Python's own syntax, with literals as arguments."""

    def __init__(self) -> None:
        self._brackets = _Brackets("\"'")
        self._text = ""
        self._json: JsonCalls | None = None
        self._is_read = False

    def feed(self, text: str, closes: Sequence[str], is_last: bool) -> Outcome:
        """See `CallReader`."""
        if self._json is None and not self._text and not self._is_read:
            text = text.lstrip()
            if text.startswith("{"):  # some write JSON behind the same mark
                self._json = JsonCalls()
            elif text and not text.startswith("["):
                return Outcome(is_over=True, unread=text)
        if self._json is not None:
            return self._json.feed(text, closes, is_last)
        outcome = Outcome()
        if not self._is_read:
            end = self._brackets.end(text)
            self._text += text[:end]
            if end is None:
                return Outcome(is_over=is_last, unread=self._text if is_last else "")
            text = text[end:]
            calls = _python_calls(self._text)
            if calls is None:
                return Outcome(rest=text, is_over=True, unread=self._text)
            outcome.events, self._is_read = calls, True
        if not closes:
            outcome.rest, outcome.is_over = text, True
            return outcome
        return _between_calls(outcome, text.lstrip(), closes, is_last)


class _Brackets:
    """Finds where a text's first bracket closes, over pieces; brackets in strings do not count."""

    def __init__(self, quotes: str) -> None:
        self._quotes = quotes
        self._depth = 0
        self._quote = ""
        self._is_escaped = False

    def end(self, text: str) -> int | None:
        """The index behind the closing bracket, or None if it is not in this piece."""
        for at, char in enumerate(text):
            if self._quote:
                if self._is_escaped:
                    self._is_escaped = False
                elif char == "\\":
                    self._is_escaped = True
                elif char == self._quote:
                    self._quote = ""
            elif char in self._quotes:
                self._quote = char
            elif char in "[{(":
                self._depth += 1
            elif char in ")}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
        return None


def _between_calls(outcome: Outcome, text: str, closes: Sequence[str], is_last: bool) -> Outcome:
    """The calls are over at a closing mark, which is dropped, and at any other text, which is not."""
    outcome.is_over = True
    for close in closes:
        if text.startswith(close):
            outcome.rest = text[len(close) :]
            return outcome
    if not is_last and any(close.startswith(text) for close in closes):
        outcome.is_over = False
    outcome.rest = text
    return outcome


_MARK: Final = "_keyword_argument_"
_NAMED_LIKE_KEYWORD: Final = re.compile(
    r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|(?<=[(,])(\s*)({})(?=\s*=)""".format("|".join(kwlist)), re.DOTALL
)


def _marked(text: str) -> str:
    """The text with a mark before arguments that Python would take for its keywords. What stands in quotes is passed over."""
    return _NAMED_LIKE_KEYWORD.sub(
        lambda found: found[0] if found[2] is None else f"{found[1]}{_MARK}{found[2]}", text
    )


def _python_calls(text: str) -> list[CallEvent] | None:
    """Every call of a list of calls, or None for anything else. A schema may name an argument as Python names a keyword."""
    try:
        listed = ast.parse(_marked(text.strip()), mode="eval").body
        if not isinstance(listed, ast.List) or not listed.elts:
            return None
        events = []
        for call in listed.elts:
            if not isinstance(call, ast.Call) or call.args:
                return None
            arguments: dict[str | None, Any] = {
                keyword.arg and keyword.arg.removeprefix(_MARK): ast.literal_eval(keyword.value)
                for keyword in call.keywords
            }
            if None in arguments:
                return None
            events.append(CallEvent(ast.unparse(call.func), json.dumps(arguments, ensure_ascii=False)))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
    return events


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
