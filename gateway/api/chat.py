"""Owns `/v1/chat/completions`: its body, its answer and its stream. No sockets; runs on the gateway's loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from gateway.api.answers import Collected, Json, chat_logprobs, usage_object
from gateway.api.parameters import (
    MAX_TOP_LOGPROBS,
    Count,
    SamplingFields,
    choice_count,
    decode_body,
    invalid,
    refuse,
    samplings,
    stop_ids,
    stops,
    token_budget,
)
from gateway.api.prompts import Message, compose_chat
from gateway.api.structured import grammar
from gateway.errors import error_body
from gateway.generation import Delta, End, GenerateRequest, RequestError, SpatialObject
from gateway.service import Service
from gateway.tokens import ModelTokens
from shared.errors import FinishReason

_REFUSED: Final = (
    "tools",
    "functions",
    "function_call",
    "audio",
    "web_search_options",
    "chat_template",
    "chat_template_kwargs",
)
_FINISH: Final = {FinishReason.CANCELLED: "stop"}

_encode = msgspec.json.encode


class ChatBody(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """The request's JSON."""

    messages: Annotated[list[Message], Meta(max_length=4096)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    prediction: Any = None
    verbosity: str | None = None
    reasoning_effort: str | None = None
    reasoning: bool | None = None
    # refused when they ask for something
    tools: Any = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    web_search_options: Any = None
    chat_template: Any = None
    chat_template_kwargs: Any = None


_decode = msgspec.json.Decoder(ChatBody).decode


class Chat:
    """One parsed and prepared request: what to submit, and how to say the answer."""

    def __init__(
        self, request_id: str, body: ChatBody, asked: list[GenerateRequest], tokens: ModelTokens
    ) -> None:
        self.asked = asked
        self.stream = bool(body.stream)
        self._tokens = tokens
        self._id = f"chatcmpl-{request_id}"
        self._created = int(time.time())
        self._model = asked[0].model_id
        self._want_logprobs = bool(body.logprobs)
        options = body.stream_options
        self._want_usage = self.stream and options is not None and bool(options.include_usage)
        usage = b',"usage":null' if self._want_usage else b""
        head = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
        }
        self._head = b"data: " + _encode(head)[:-1]
        self._tail = b"]" + usage + b"}\n\n"
        # The hot path only joins bytes: everything around the text is made once.
        self._before = [
            self._head + b',"choices":[{"index":%d,"delta":{"content":' % i for i in range(len(asked))
        ]
        self._after = b'},"logprobs":null,"finish_reason":null}' + self._tail

    # ------------------------------------------------------------ the stream, see `transport.sse.Shape`

    def opening(self) -> bytes:
        """The role of every choice."""
        delta = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        return b"".join(
            self._head + b',"choices":[{"index":%d,%b' % (i, delta) + self._tail
            for i in range(len(self.asked))
        )

    def delta(self, index: int, delta: Delta) -> bytes:
        """One chunk."""
        text = _encode(delta.text)
        if not delta.logprobs:
            return self._before[index] + text + self._after
        logprobs = _encode(chat_logprobs(delta.logprobs, self._tokens))
        return b'%b%b},"logprobs":%b,"finish_reason":null}%b' % (
            self._before[index],
            text,
            logprobs,
            self._tail,
        )

    def found(self, index: int, found: SpatialObject) -> bytes:
        """Chat finds no objects."""
        return b""

    def end(self, index: int, end: End) -> bytes:
        """The chunk with the finish reason."""
        reason = _encode(finish_reason(end))
        choice = b',"choices":[{"index":%d,"delta":{},"logprobs":null,"finish_reason":%b}' % (index, reason)
        return self._head + choice + self._tail

    def closing(self, ends: Sequence[End]) -> bytes:
        """Usage, if asked for, and the end mark."""
        if not self._want_usage:
            return b"data: [DONE]\n\n"
        usage = _encode(usage_object(ends))
        return self._head + b',"choices":[],"usage":' + usage + b"}\n\ndata: [DONE]\n\n"

    def error(self, error: RequestError) -> bytes:
        """An error in mid-stream."""
        return b"data: " + error_body(error) + b"\n\n"

    # ------------------------------------------------------------ the whole answer

    def answer(self, choices: Sequence[Collected]) -> Json:
        """The answer of a request that does not stream."""
        ends = [choice.end for choice in choices if choice.end is not None]
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": chat_logprobs(choice.infos, self._tokens) if self._want_logprobs else None,
                    "finish_reason": finish_reason(choice.end),
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage_object(ends),
        }


def finish_reason(end: End | None) -> str:
    """OpenAI's name for how a choice ended; a deadline keeps its own."""
    if end is None:
        return "stop"
    return _FINISH.get(end.reason, end.reason.value)


async def prepare(core: Service, data: bytes, *, request_id: str, tenant: str) -> Chat:
    """Check a body and prepare everything that can fail before submitting. Raises `RequestError`."""
    body = decode_body(_decode, data)
    refuse(body, _REFUSED)
    if body.reasoning:
        raise invalid("reasoning is offered by /v1/query only", "reasoning")
    if body.tool_choice not in (None, "none", "auto"):
        raise invalid("there are no tools to choose from", "tool_choice")
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("needs logprobs to be true", "top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise invalid("give either max_tokens or max_completion_tokens", "max_tokens")
    card = core.card(body.model)
    count = choice_count(body, core.config.max_n)
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else -1
    sampled = samplings(body, card, num_logprobs, count)
    stop = stops(body.stop)
    core.check_capacity(card.model_id, tenant, count)
    constraint = await grammar(core, body)
    prompt = await compose_chat(core, card, body.messages, max_chars=core.config.max_prompt_chars)
    given = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    param = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    room = core.room(card.model_id, len(prompt.ids), len(prompt.images))
    max_tokens = token_budget(given, card, room, param, body.min_tokens)
    asked = [
        GenerateRequest(
            request_id=request_id if count == 1 else f"{request_id}-{index}",
            model_id=card.model_id,
            prompt_ids=prompt.ids,
            max_tokens=max_tokens,
            sampling=sampling,
            images=prompt.images,
            stop=stop,
            stop_ids=stop_ids(body, card),
            tenant=tenant,
            priority=body.priority or 0,
            grammar=constraint,
            ignore_eos=bool(body.ignore_eos),
            strip_start=prompt.strip_start,
        )
        for index, sampling in enumerate(sampled)
    ]
    return Chat(request_id, body, asked, core.tokens(card.model_id))
