"""Owns Ollama's form of an answer: lines of JSON, streamed or one. Gateway's loop."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

import msgspec

from gateway.api.answers import Collected, EventShape
from gateway.api.parameters import Json
from gateway.api.spoken import Call, Reading
from gateway.decisions.answer_parts import Part, Said, Thought
from gateway.errors import ollama_error
from gateway.generation import Delta, End, GenerateRequest, RequestError, SpatialObject, Usage
from shared.errors import FinishReason

_NS: Final = 1_000_000_000


class OllamaAnswer(EventShape):
    """One prepared request: what to submit, and the form of the answer. A body without a prompt submits nothing."""

    media_type = "application/x-ndjson"

    def __init__(
        self,
        request: GenerateRequest | None,
        reading: Reading,
        *,
        stream: bool,
        is_chat: bool,
        model: str = "",
    ) -> None:
        self.requests = [] if request is None else [request]
        self.stream = stream
        self._model = model if request is None else request.model_id
        self._is_chat = is_chat
        self._reader = reading.reader()
        self._num_told = 0  # calls that are out
        self.waiting = self._line(self._said(""), is_done=False)

    @classmethod
    def loaded(cls, model: str, *, is_chat: bool) -> OllamaAnswer:
        """The answer to a body without a prompt, which asks that the model be loaded: it is."""
        return cls(None, Reading(), stream=False, is_chat=is_chat, model=model)

    # ------------------------------------------------------------ the stream, see `transport.sse.Shape`

    def opening(self) -> bytes:
        """Nothing comes before the first line."""
        return b""

    def delta(self, index: int, delta: Delta) -> bytes:
        """One line, or none while nothing is settled."""
        return self._parts(self._reader.feed(delta.text), is_last=False)

    def found(self, index: int, found: SpatialObject) -> bytes:
        """These routes find no objects."""
        return b""

    def end(self, index: int, end: End) -> bytes:
        """What was held back, and the line with the figures."""
        last = self._parts(self._reader.close(), is_last=True)
        return last + self._line(self._said(""), is_done=True, more=_figures(end))

    def closing(self, ends: Sequence[End]) -> bytes:
        """Empty: the last line said `done`."""
        return b""

    def failure(self, error: RequestError) -> bytes:
        """An error in mid-stream."""
        return msgspec.json.encode(ollama_error(error)) + b"\n"

    def _parts(self, parts: Sequence[Part], *, is_last: bool) -> bytes:
        lines = []
        for part in parts:
            if isinstance(part, Said):
                lines.append(self._line(self._said(part.text), is_done=False))
            elif isinstance(part, Thought):
                lines.append(self._line(self._said("", thinking=part.text), is_done=False))
        # A call is told when it is whole: when another has begun, or the answer has ended.
        whole = self._reader.calls[self._num_told : None if is_last else -1]
        self._num_told += len(whole)
        lines += [self._line(self._said("", calls=[call]), is_done=False) for call in whole]
        return b"".join(lines)

    # ------------------------------------------------------------ the whole answer

    def answer(self, choices: Sequence[Collected]) -> Json:
        """The answer of a request that does not stream."""
        if not choices:
            return self._fields(self._said(""), is_done=True, more={"done_reason": "load"})
        (choice,) = choices
        assert choice.end is not None
        spoken = self._reader.whole(choice.text)
        said = self._said(spoken.text, thinking=spoken.thought, calls=spoken.calls)
        return self._fields(said, is_done=True, more=_figures(choice.end))

    def _said(self, text: str, *, thinking: str = "", calls: Sequence[Call] = ()) -> Json:
        thought = {"thinking": thinking} if thinking else {}
        if not self._is_chat:
            return {"response": text, **thought}
        message: Json = {"role": "assistant", "content": text, **thought}
        if calls:
            message["tool_calls"] = [
                {"id": call.id, "function": {"name": call.name, "arguments": call.value()}} for call in calls
            ]
        return {"message": message}

    def _line(self, said: Json, *, is_done: bool, more: Json | None = None) -> bytes:
        return msgspec.json.encode(self._fields(said, is_done=is_done, more=more)) + b"\n"

    def _fields(self, said: Json, *, is_done: bool, more: Json | None = None) -> Json:
        # The interface's own field, a date; it decides nothing.
        created = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        return {"model": self._model, "created_at": created, **said, "done": is_done, **(more or {})}


def _figures(end: End) -> Json:
    """Tokens and nanoseconds."""
    usage: Usage = end.usage
    total_s = usage.queue_s + usage.prefill_s + usage.decode_s
    return {
        "done_reason": "length" if end.reason in (FinishReason.LENGTH, FinishReason.DEADLINE) else "stop",
        "total_duration": round(total_s * _NS),
        "load_duration": 0,
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": round(usage.prefill_s * _NS),
        "eval_count": usage.completion_tokens,
        "eval_duration": round(usage.decode_s * _NS),
    }
