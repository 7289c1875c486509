"""Owns Anthropic's form of an answer: a message of blocks, whole or as its events. Gateway's loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from gateway.api.answers import Collected, EventShape
from gateway.api.parameters import Json
from gateway.api.spoken import Reading
from gateway.decisions.answer_parts import CallArguments, CallOpened, Part, Said, Thought
from gateway.errors import anthropic_error
from gateway.generation import Delta, End, GenerateRequest, RequestError, SpatialObject, Usage
from shared.errors import FinishReason

_REASONS: Final = {
    FinishReason.STOP: "end_turn",
    FinishReason.LENGTH: "max_tokens",
    FinishReason.DEADLINE: "max_tokens",
}
_SIGNATURE: Final = "degas"  # clients send it back with the thinking; nothing here depends on it


class MessageAnswer(EventShape):
    """One prepared request: what to submit, and the form of the answer."""

    waiting = b'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(self, request_id: str, request: GenerateRequest, reading: Reading, *, stream: bool) -> None:
        self.requests = [request]
        self.stream = stream
        self._id = f"msg_{request_id}"
        self._reader = reading.reader()
        self._num_prompt = request.num_prompt
        self._num_blocks = 0
        self._open: str | None = None  # the kind of the block that is open

    # ------------------------------------------------------------ the stream, see `transport.sse.Shape`

    def opening(self) -> bytes:
        """The message without content."""
        message = self._message([], None, None, Usage(prompt_tokens=self._num_prompt))
        return _event("message_start", {"message": message}) + self.waiting

    def delta(self, index: int, delta: Delta) -> bytes:
        """The events of one piece of text."""
        return b"".join(map(self._part, self._reader.feed(delta.text)))

    def found(self, index: int, found: SpatialObject) -> bytes:
        """Messages find no objects."""
        return b""

    def end(self, index: int, end: End) -> bytes:
        """The last events."""
        last = b"".join(map(self._part, self._reader.close())) + self._close()
        reason, stopped_by = self._reason(end)
        delta = {"stop_reason": reason, "stop_sequence": stopped_by}
        usage = _usage(end.usage)
        return last + _event("message_delta", {"delta": delta, "usage": usage}) + _event("message_stop", {})

    def closing(self, ends: Sequence[End]) -> bytes:
        """Empty: these streams have no end mark."""
        return b""

    def failure(self, error: RequestError) -> bytes:
        """An error in mid-stream."""
        return b"event: error\ndata: " + msgspec.json.encode(anthropic_error(error)) + b"\n\n"

    def _part(self, part: Part) -> bytes:
        match part:
            case Said(text):
                before = self._block("text", {"type": "text", "text": ""})
                return before + self._piece({"type": "text_delta", "text": text})
            case Thought(text):
                before = self._block("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                return before + self._piece({"type": "thinking_delta", "thinking": text})
            case CallOpened(number, name):
                block = {"type": "tool_use", "id": self._reader.calls[number].id, "name": name, "input": {}}
                return self._close() + self._block("tool_use", block)
            case CallArguments(_, text):
                return self._piece({"type": "input_json_delta", "partial_json": text})

    def _block(self, kind: str, block: Json) -> bytes:
        """Open a block of this kind, unless it is open."""
        if self._open == kind:
            return b""
        before = self._close()
        self._open = kind
        self._num_blocks += 1
        event = {"index": self._num_blocks - 1, "content_block": block}
        return before + _event("content_block_start", event)

    def _piece(self, delta: Json) -> bytes:
        return _event("content_block_delta", {"index": self._num_blocks - 1, "delta": delta})

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        signature = b""
        if self._open == "thinking":
            signature = self._piece({"type": "signature_delta", "signature": _SIGNATURE})
        self._open = None
        return signature + _event("content_block_stop", {"index": self._num_blocks - 1})

    # ------------------------------------------------------------ the whole answer

    def answer(self, choices: Sequence[Collected]) -> Json:
        """The answer of a request that does not stream."""
        (choice,) = choices
        assert choice.end is not None
        spoken = self._reader.whole(choice.text)
        blocks: list[Json] = []
        if spoken.thought:
            blocks.append({"type": "thinking", "thinking": spoken.thought, "signature": _SIGNATURE})
        if spoken.text:
            blocks.append({"type": "text", "text": spoken.text})
        blocks += [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": call.value()}
            for call in spoken.calls
        ]
        reason, stopped_by = self._reason(choice.end)
        return self._message(blocks, reason, stopped_by, choice.end.usage)

    def _message(self, content: list[Json], reason: str | None, stopped_by: str | None, usage: Usage) -> Json:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self.requests[0].model_id,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stopped_by,
            "usage": _usage(usage),
        }

    def _reason(self, end: End) -> tuple[str, str | None]:
        if end.reason is FinishReason.STOP and end.stop_string is not None:
            return "stop_sequence", end.stop_string
        if end.reason is FinishReason.STOP and self._reader.calls:
            return "tool_use", None
        return _REASONS.get(end.reason, "end_turn"), None


def _usage(usage: Usage) -> Json:
    """Anthropic counts the cached part of a prompt apart from the rest."""
    cached = min(usage.cached_tokens, usage.prompt_tokens)
    return {
        "input_tokens": usage.prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.completion_tokens,
    }


def _event(kind: str, fields: Json) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode({"type": kind, **fields}))
