"""Owns reading a Responses body's `input`: items become the messages of a conversation. Pure.

Thinking, text and calls that follow each other are one turn of the assistant's, as chat has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gateway.api.parameters import invalid
from gateway.api.prompts import ContentPart, FunctionCall, ImagePart, ImageUrl, Message, TextPart, ToolCall
from gateway.api.response_bodies import CreateBody, Item, Part
from gateway.generation import RequestError
from shared.errors import ErrorCode

_ROLES: Final = ("user", "assistant", "system", "developer")
_FIELDS: Final = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "name", "output"),
    "reasoning": ("summary", "content"),
}
"""What each type of item has, besides what all have."""
_OWN: Final = ("role", "content", "call_id", "name", "arguments", "output", "summary")
_TEXT: Final = ("input_text", "output_text", "text")


@dataclass(frozen=True, slots=True)
class InputRead:
    """A body's input: its messages in order, and each one's place in the body."""

    messages: tuple[Message, ...]
    places: tuple[str, ...]

    @property
    def question(self) -> str:
        """The last user message."""
        return next((m.text() for m in reversed(self.messages) if m.role == "user"), "").strip()

    @property
    def has_results(self) -> bool:
        """Whether it says what calls gave."""
        return any(message.role == "tool" for message in self.messages)


def read_input(body: CreateBody, max_chars: int) -> InputRead:
    """The messages of `input`. Raises `RequestError` for what Degas does not take."""
    if isinstance(body.input, str):
        asked = InputRead((Message(role="user", content=body.input),), ("input",))
    else:
        asked = read_items(body.input or ())
    size = sum(map(num_chars, asked.messages)) + len(body.instructions or "")
    if size > max_chars:
        message = f"input: {size} characters; at most {max_chars} are accepted"
        raise RequestError(ErrorCode.PAYLOAD_TOO_LARGE, message, param="input")
    return asked


def num_chars(message: Message) -> int:
    """Characters of all that a message says."""
    calls = message.tool_calls or ()
    named = sum(len(call.id or "") + len(call.function.name) for call in calls)
    return (
        len(message.text())
        + len(message.reasoning_content or "")
        + len(message.tool_call_id or "")
        + named
        + sum(len(str(call.function.arguments or "")) for call in calls)
    )


def read_items(items: Sequence[Item]) -> InputRead:
    """What `input` says as a list. Raises `RequestError` naming an item's field."""
    reader = _Reader()
    for index, item in enumerate(items):
        reader.read(item, f"input[{index}]")
    return InputRead(tuple(reader.messages), tuple(reader.places))


class _Reader:
    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.places: list[str] = []

    def read(self, item: Item, where: str) -> None:
        """One more item."""
        fields = _FIELDS.get(item.type)
        if fields is None:
            message = f"{where}.type: items of type {item.type[:40]!r} are not supported"
            raise RequestError(ErrorCode.UNSUPPORTED, message, param=f"{where}.type")
        for name in _OWN:
            if name not in fields and getattr(item, name) is not None:
                raise invalid(f"an item of type {item.type!r} has no such field", f"{where}.{name}")
        match item.type:
            case "function_call":
                self._call(item, where)
            case "function_call_output":
                self._result(item, where)
            case "reasoning":
                self._thinking(item, where)
            case _:
                self._message(item, where)

    def _message(self, item: Item, where: str) -> None:
        role = "user" if item.role is None else item.role
        if role not in _ROLES:
            raise invalid(f"one of {', '.join(_ROLES)} is expected", f"{where}.role")
        content = self._content(item, where)
        turn = self._open_turn() if role == "assistant" else None
        message = Message(role=role, content=content)  # type: ignore[arg-type]  # it was checked
        if turn is not None and _goes_on(turn):
            turn.content = "\n".join(filter(None, (turn.text(), message.text()))) or turn.content
        else:
            self._add(message, where)

    def _content(self, item: Item, where: str) -> str | list[ContentPart]:
        """The text; where there are pictures, the parts one for one."""
        if item.content is None or isinstance(item.content, str):
            return item.content or ""
        text, found = _read_parts(item.content, f"{where}.content")
        if not found:
            return text
        return [
            TextPart(text=part.text or "")
            if part.image_url is None
            else ImagePart(image_url=ImageUrl(url=part.image_url))
            for part in item.content
        ]

    def _call(self, item: Item, where: str) -> None:
        if not item.name:
            raise invalid("the name of the function that was called is needed", f"{where}.name")
        function = FunctionCall(name=item.name, arguments=item.arguments or "{}")
        call = ToolCall(id=_call_id(item, where), type="function", function=function)
        turn = self._open_turn()
        if turn is None:
            self._add(Message(role="assistant", tool_calls=[call]), where)
        else:
            turn.tool_calls = [*(turn.tool_calls or ()), call]
            turn.content = turn.content or None

    def _result(self, item: Item, where: str) -> None:
        call_id = _call_id(item, where)
        if item.output is None:
            raise invalid("what the call gave is needed, as text", f"{where}.output")
        text = item.output
        if not isinstance(text, str):
            text, found = _read_parts(text, f"{where}.output")
            if found:
                param = found[0][1]
                message = f"{param}: pictures in a tool's result are not read here; give them in a message"
                raise RequestError(ErrorCode.UNSUPPORTED, message, param=param)
        self._add(Message(role="tool", content=text, tool_call_id=call_id), where)

    def _thinking(self, item: Item, where: str) -> None:
        if isinstance(item.content, str):
            raise invalid("a list of parts is expected", f"{where}.content")
        own, _ = _read_parts(item.content or (), f"{where}.content", ("reasoning_text",))
        summary, _ = _read_parts(item.summary or (), f"{where}.summary", ("summary_text",))
        text = own or summary
        turn = self._open_turn()
        if not text:
            return  # it may be encrypted, which only the server that made it can read
        if turn is not None and _goes_on(turn):
            turn.reasoning_content = "\n".join(filter(None, (turn.reasoning_content, text)))
        else:
            self._add(Message(role="assistant", content="", reasoning_content=text), where)

    def _open_turn(self) -> Message | None:
        """The last message, if it is the assistant's."""
        last = self.messages[-1] if self.messages else None
        return last if last is not None and last.role == "assistant" else None

    def _add(self, message: Message, where: str) -> None:
        self.messages.append(message)
        self.places.append(where)


def _goes_on(turn: Message) -> bool:
    """Whether what the assistant says next belongs to this turn: it has thought and said nothing yet, or calls."""
    return bool(turn.tool_calls or (turn.reasoning_content and not turn.content))


def _call_id(item: Item, where: str) -> str:
    if not item.call_id:
        raise invalid("the id of the call is needed", f"{where}.call_id")
    return item.call_id


def _read_parts(
    parts: Sequence[Part], where: str, kinds: Sequence[str] = _TEXT
) -> tuple[str, list[tuple[str, str]]]:
    """The text of those parts, and their pictures: each one's URL and its field's name."""
    texts: list[str] = []
    pictures: list[tuple[str, str]] = []
    for index, part in enumerate(parts):
        param = f"{where}[{index}]"
        if part.type in kinds:
            texts.append(part.text or "")
        elif part.type == "input_image" and kinds is _TEXT:
            if part.image_url is None:
                param += ".image_url"
                message = f"{param}: pictures are taken as a data URL in image_url, not by file_id"
                raise RequestError(ErrorCode.UNSUPPORTED, message, param=param)
            pictures.append((part.image_url, f"{param}.image_url"))
        else:
            expected = "input_text or input_image" if kinds is _TEXT else kinds[0]
            param += ".type"
            message = f"{param}: content of type {part.type[:40]!r} is not supported; use {expected}"
            raise RequestError(ErrorCode.UNSUPPORTED, message, param=param)
    return "\n".join(texts), pictures
