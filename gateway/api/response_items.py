"""Owns the items of one response's output: each one's events and its form, from its opening to its end. Gateway's loop."""

from __future__ import annotations

from typing import Any, Final, Protocol

import msgspec

from gateway.api.parameters import Json
from gateway.api.response_events import (
    ArgumentsDelta,
    ArgumentsDone,
    Event,
    ItemAdded,
    ItemDone,
    PartAdded,
    PartDone,
    TextDone,
    ThoughtDelta,
    ThoughtDone,
    item_id,
)
from gateway.api.spoken import Call

_encode = msgspec.json.encode
_CUT_OFF: Final = "incomplete"


class Say(Protocol):
    """Sends an event of this kind with these fields; its number and its lane are added."""

    def __call__(self, kind: type[Event], /, **fields: Any) -> None: ...


class OutputItem:
    """One item. `status` is `in_progress` until it is closed."""

    KIND: str

    def __init__(self, say: Say, response_id: str, output_index: int) -> None:
        self.status = "in_progress"
        self.id = item_id(response_id, self.KIND, output_index)
        self._say = say
        self._index = output_index

    def open(self) -> None:
        """The events that announce it."""
        self._say(ItemAdded, item=self.shape(), output_index=self._index)

    def close(self, status: str) -> None:
        """The events that end it; `status` is `completed` or `incomplete`."""
        self._finish()
        self.status = status
        self._say(ItemDone, item=self.shape(), output_index=self._index)

    def shape(self) -> Json:
        """The item as it stands."""
        raise NotImplementedError

    def ended(self) -> Json:
        """The item in a response that has ended, which may have failed while it was open."""
        return {**self.shape(), "status": _CUT_OFF if self.status == "in_progress" else self.status}

    def _finish(self) -> None:
        raise NotImplementedError


class _TextItem(OutputItem):
    """An item with one part, which is text."""

    def __init__(self, say: Say, response_id: str, output_index: int) -> None:
        super().__init__(say, response_id, output_index)
        self.texts: list[str] = []
        self._has_part = False
        self._place: Json = {"item_id": self.id, "output_index": output_index, "content_index": 0}

    def open(self) -> None:
        """See `OutputItem.open`."""
        super().open()
        self._has_part = True
        self._say(PartAdded, part=self._part(), **self._place)

    def shape(self) -> Json:
        """See `OutputItem.shape`."""
        content = [self._part()] if self._has_part else []
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "status": self.status,
            "content": content,
        }

    def _finish(self) -> None:
        self._say_done("".join(self.texts))
        self._say(PartDone, part=self._part(), **self._place)

    def _say_done(self, text: str) -> None:
        raise NotImplementedError

    def _part(self) -> Json:
        raise NotImplementedError


class MessageItem(_TextItem):
    """Text for the reader of the answer. `ResponseStream` sends its deltas; `delta_middle` stands between number and text."""

    KIND = "msg"

    def __init__(self, say: Say, response_id: str, output_index: int, lane: Json) -> None:
        super().__init__(say, response_id, output_index)
        self.logprobs: list[Json] = []
        self.place = self._place
        self.delta_middle = b"," + _encode({**lane, **self._place})[1:-1] + b',"delta":'

    def _say_done(self, text: str) -> None:
        self._say(TextDone, text=text, logprobs=self.logprobs, **self._place)

    def _part(self) -> Json:
        text = "".join(self.texts)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs}


class ThoughtItem(_TextItem):
    """The model's thinking."""

    KIND = "rs"

    def add(self, text: str) -> None:
        """More of it."""
        self.texts.append(text)
        self._say(ThoughtDelta, delta=text, **self._place)

    def shape(self) -> Json:
        """See `OutputItem.shape`."""
        content = [self._part()] if self._has_part else []
        return {"id": self.id, "type": "reasoning", "summary": [], "status": self.status, "content": content}

    def _say_done(self, text: str) -> None:
        self._say(ThoughtDone, text=text, **self._place)

    def _part(self) -> Json:
        return {"type": "reasoning_text", "text": "".join(self.texts)}


class CallItem(OutputItem):
    """A tool call. `call` is the reader's own record, which grows while the call is read."""

    KIND = "fc"

    def __init__(self, say: Say, response_id: str, output_index: int, call: Call) -> None:
        super().__init__(say, response_id, output_index)
        self._call = call
        self._arguments = ""  # as far as they were sent: the reader may be further by some pieces

    def add(self, text: str) -> None:
        """More of its arguments."""
        self._arguments += text
        self._say(ArgumentsDelta, item_id=self.id, output_index=self._index, delta=text)

    def close(self, status: str) -> None:
        """See `OutputItem.close`. Whole arguments make a whole call, wherever the answer was cut off."""
        super().close("completed" if _is_json(self._arguments) else _CUT_OFF)

    def shape(self) -> Json:
        """See `OutputItem.shape`."""
        return {
            "id": self.id,
            "type": "function_call",
            "status": self.status,
            "call_id": self._call.id,
            "name": self._call.name,
            "arguments": self._arguments,
        }

    def _finish(self) -> None:
        place = {"item_id": self.id, "output_index": self._index}
        self._say(ArgumentsDone, arguments=self._arguments, **place)


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True
