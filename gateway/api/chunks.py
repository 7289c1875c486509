"""Owns what is the same around every chunk of an OpenAI answer: its head, its usage, its end mark. Gateway's loop."""

from __future__ import annotations

import functools
import time
from typing import Final

import msgspec

from gateway.api.parameters import Json, SamplingFields

_encode = msgspec.json.encode
END_MARK: Final = b"data: [DONE]\n\n"


class ChunkFrame:
    """One answer's frame. `head` opens a chunk up to its `choices`, `tail` follows the last choice."""

    def __init__(self, answer_id: str, kind: str, model_id: str, body: SamplingFields) -> None:
        self._fields: Json = {
            "id": answer_id,
            "object": kind,
            "created": int(time.time()),  # the interface's own field: Unix time, decides nothing
            "model": model_id,
        }
        options = body.stream_options
        self._wants_usage = bool(body.stream) and options is not None and bool(options.include_usage)
        self.tail = b"]" + (b',"usage":null' if self._wants_usage else b"") + b"}\n\n"

    @functools.cached_property
    def head(self) -> bytes:
        """What a chunk begins with; whole answers need none."""
        return b"data: " + _encode(self._fields)[:-1]

    def closing(self, usage: Json) -> bytes:
        """Usage in a chunk without choices, if it was asked for, and the end mark."""
        if not self._wants_usage:
            return END_MARK
        return self.head + b',"choices":[],"usage":' + _encode(usage) + b"}\n\n" + END_MARK

    def whole(self, kind: str, choices: list[Json], usage: Json) -> Json:
        """The answer in one piece, whose `object` may have another name."""
        return {**self._fields, "object": kind, "choices": choices, "usage": usage}
