"""Owns `/v1/chat/completions`: its body, its answer and its stream. No sockets; runs on the gateway's loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from gateway.api.answers import Collected, chat_logprobs, finish_reason, usage_object
from gateway.api.chunks import ChunkFrame
from gateway.api.parameters import (
    MAX_TOP_LOGPROBS,
    Count,
    Json,
    SamplingFields,
    choice_count,
    decode_body,
    invalid,
    refuse,
)
from gateway.api.prompts import Message, compose_chat
from gateway.api.requests import Length, check_fields, make_requests
from gateway.generation import ChatOptions, Core, Delta, End, GenerateRequest, RequestError, SpatialObject
from shared.errors import ErrorCode

_REFUSED: Final = (
    "tools",
    "functions",
    "function_call",
    "audio",
    "web_search_options",
)

_OWN_VARIABLES: Final = frozenset(
    ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template")
)
"""Names that `chat_template_kwargs` may not set: the body has fields of its own for them, or they are refused."""
_MAX_VARIABLES_BYTES: Final = 16 << 10

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
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Json | None = None
    chat_template: str | None = None  # the name of one of the model's
    # refused when they ask for something
    tools: Any = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    web_search_options: Any = None


_decode = msgspec.json.Decoder(ChatBody).decode


class Chat:
    """One prepared request: the requests to submit, and the form of the answer."""

    def __init__(self, request_id: str, body: ChatBody, requests: list[GenerateRequest]) -> None:
        self.requests = requests
        self.stream = bool(body.stream)
        self._tokens = requests[0].model.tokens
        self._want_logprobs = bool(body.logprobs)
        self._frame = ChunkFrame(
            f"chatcmpl-{request_id}", "chat.completion.chunk", requests[0].model_id, body
        )
        self._head, self._tail = self._frame.head, self._frame.tail
        # Made once, so that each token only joins bytes.
        self._before = [
            self._head + b',"choices":[{"index":%d,"delta":{"content":' % i for i in range(len(requests))
        ]
        self._after = b'},"logprobs":null,"finish_reason":null}' + self._tail

    # ------------------------------------------------------------ the stream, see `transport.sse.Shape`

    def opening(self) -> bytes:
        """The role of every choice."""
        delta = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        return b"".join(
            self._head + b',"choices":[{"index":%d,%b' % (i, delta) + self._tail
            for i in range(len(self.requests))
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
        return self._frame.closing(usage_object(ends))

    # ------------------------------------------------------------ the whole answer

    def answer(self, choices: Sequence[Collected]) -> Json:
        """The answer of a request that does not stream."""
        said = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": chat_logprobs(choice.infos, self._tokens) if self._want_logprobs else None,
                "finish_reason": finish_reason(choice.end),
            }
            for index, choice in enumerate(choices)
        ]
        ends = [choice.end for choice in choices if choice.end is not None]
        return self._frame.whole("chat.completion", said, usage_object(ends))


async def prepare(core: Core, data: bytes, *, request_id: str, tenant: str) -> Chat:
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
    options = _chat_options(body)
    model = core.model(body.model)
    count = choice_count(body, core.config.max_n)
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else -1
    checked = await check_fields(core, model, body, tenant=tenant, num_logprobs=num_logprobs, count=count)
    prompt = await compose_chat(core, model, body.messages, options)
    if body.max_completion_tokens is not None:
        length = Length(body.max_completion_tokens, "max_completion_tokens")
    else:
        length = Length(body.max_tokens, "max_tokens")
    return Chat(request_id, body, make_requests(checked, request_id, [prompt], length))


def _chat_options(body: ChatBody) -> ChatOptions | None:
    """The body's options for rendering the conversation; None where it has none. Raises `RequestError`."""
    prefixed = [index for index, message in enumerate(body.messages) if message.prefix]
    last = len(body.messages) - 1
    for index in prefixed:
        if index != last or body.messages[index].role != "assistant":
            param = f"messages[{index}].prefix"
            raise invalid("only a last message of the assistant can be gone on with", param)
    if prefixed and body.continue_final_message is False:
        raise invalid("the last message has prefix set; leave one of them out", "continue_final_message")
    continues = bool(prefixed or body.continue_final_message)
    if continues and body.add_generation_prompt:
        message = "an answer either goes on with the last message or opens a turn of its own; leave one out"
        raise invalid(message, "add_generation_prompt")
    variables = body.chat_template_kwargs or {}
    _check_variables(variables)
    opens = not continues if body.add_generation_prompt is None else body.add_generation_prompt
    if opens and not variables and body.chat_template is None:
        return None
    return ChatOptions(opens, continues, variables, body.chat_template)


def _check_variables(variables: Json) -> None:
    size = len(_encode(variables))
    if size > _MAX_VARIABLES_BYTES:
        raise invalid(f"{size} bytes; at most {_MAX_VARIABLES_BYTES} are accepted", "chat_template_kwargs")
    for name in variables:
        param = f"chat_template_kwargs.{name[:100]}"
        if name in _OWN_VARIABLES:
            raise RequestError(
                ErrorCode.UNSUPPORTED, f"{param}: this is not a variable of the template's own", param=param
            )
        if not name.isidentifier() or name.startswith("_"):
            raise invalid("a template's variables are words without a leading underscore", param)
