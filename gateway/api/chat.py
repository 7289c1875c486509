"""Owns `/v1/chat/completions`: its body, its answer and its stream. No sockets; runs on the gateway's loop."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from gateway.api.answers import Collected, EventShape, chat_logprobs, finish_reason, usage_object
from gateway.api.chunks import ChunkFrame
from gateway.api.clips import MediaFacts, ProcessorAsked, settle_times
from gateway.api.parameters import (
    MAX_TOP_LOGPROBS,
    Budget,
    Count,
    Effort,
    Json,
    SamplingFields,
    Verbosity,
    choice_count,
    decode_body,
    invalid,
)
from gateway.api.prompts import Message, clips_of, compose_chat, effort_variables
from gateway.api.requests import Length, check_fields, make_requests, unscored
from gateway.api.scored import NumScores, check_scores, prompt_logprobs
from gateway.api.spoken import Reading, SpokenReader, budget_asked, thought_budget
from gateway.api.tools import MAX_TOOLS, Tool, read_tools
from gateway.decisions.answer_parts import CallArguments, CallOpened, Part, Said, Thought
from gateway.generation import (
    ChatOptions,
    Core,
    Delta,
    End,
    GenerateRequest,
    RequestError,
    SpatialObject,
    TokenInfo,
)
from shared.errors import ErrorCode

_OWN_VARIABLES: Final = frozenset(
    ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template")
)
"""Names that `chat_template_kwargs` may not set: the body has fields of its own for them, or they are refused."""
_MAX_VARIABLES_BYTES: Final = 16 << 10

_encode = msgspec.json.encode


class ChatBody(SamplingFields, kw_only=True):
    """The request's JSON."""

    REFUSED = (
        "functions",
        "function_call",
        "audio",
        "web_search_options",
        "moderation",
    )
    # No served model has a say in its answer's length; a prediction only saves time.
    IGNORED = (*SamplingFields.IGNORED, "prediction", "verbosity")

    messages: Annotated[list[Message], Meta(max_length=4096)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    prediction: Any = None
    verbosity: Verbosity | None = None
    reasoning_effort: Effort | None = None
    reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Json | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    enable_thinking: bool | None = None
    thinking_budget: Budget | None = None
    thinking_token_budget: Budget | None = None  # vLLM's name for it
    prompt_logprobs: NumScores | None = None
    media_io_kwargs: MediaFacts | None = None
    mm_processor_kwargs: ProcessorAsked | None = None
    chat_template: str | None = None  # the name of one of the model's
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    web_search_options: Any = None
    moderation: Any = None


_decode = msgspec.json.Decoder(ChatBody).decode


class Chat(EventShape):
    """One prepared request: the requests to submit, and the form of the answer."""

    def __init__(
        self, request_id: str, body: ChatBody, requests: list[GenerateRequest], reading: Reading | None = None
    ) -> None:
        self.requests = requests
        self._reading = reading or Reading()
        self._choices = None if self._reading.is_plain else [_Choice(self._reading) for _ in requests]
        self.stream = bool(body.stream)
        self._tokens = requests[0].model.tokens
        self._want_logprobs = bool(body.logprobs)
        self._num_prompt_top = body.prompt_logprobs
        self._frame = ChunkFrame(
            f"chatcmpl-{request_id}", "chat.completion.chunk", requests[0].model_id, body
        )
        self._tail = self._frame.tail

    # Made once, so that each token only joins bytes, and for streams only.

    @functools.cached_property
    def _head(self) -> bytes:
        return self._frame.head

    @functools.cached_property
    def _before(self) -> list[bytes]:
        return [
            self._head + b',"choices":[{"index":%d,"delta":{"content":' % i for i in range(len(self.requests))
        ]

    @functools.cached_property
    def _after(self) -> bytes:
        return b'},"logprobs":null,"finish_reason":null}' + self._tail

    # ------------------------------------------------------------ the stream, see `transport.sse.Shape`

    def opening(self) -> bytes:
        """The role of every choice."""
        delta = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        return b"".join(
            self._head + b',"choices":[{"index":%d,%b' % (i, delta) + self._tail
            for i in range(len(self.requests))
        )

    def delta(self, index: int, delta: Delta) -> bytes:
        """One chunk; where the answer is read in parts, one for each part."""
        if self._choices is not None:
            choice = self._choices[index]
            choice.infos.extend(delta.logprobs or ())
            return self._parts(index, choice, choice.reader.feed(delta.text))
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

    def around(self, index: int) -> tuple[bytes, bytes] | None:
        """A chunk is its text and what never changes, unless it is read in parts."""
        return None if self._choices is not None else (self._before[index], self._after)

    def found(self, index: int, found: SpatialObject) -> bytes:
        """Chat finds no objects."""
        return b""

    def end(self, index: int, end: End) -> bytes:
        """The chunk with the finish reason."""
        last, calls = b"", False
        if self._choices is not None:
            spoken = self._choices[index]
            last = self._parts(index, spoken, spoken.reader.close())
            calls = bool(spoken.reader.calls)
        reason = _encode(_finish(end, calls))
        choice = b',"choices":[{"index":%d,"delta":{},"logprobs":null,"finish_reason":%b}' % (index, reason)
        return last + self._head + choice + self._tail

    def _parts(self, index: int, choice: _Choice, parts: Sequence[Part]) -> bytes:
        """A chunk for each part; the first one has the log-probabilities of the tokens since the last chunk."""
        chunks = []
        for part in parts:
            logprobs = chat_logprobs(choice.infos, self._tokens) if choice.infos else None
            choice.infos.clear()
            said = {
                "index": index,
                "delta": _delta_of(part, choice.reader),
                "logprobs": logprobs,
                "finish_reason": None,
            }
            chunks.append(self._head + b',"choices":[' + _encode(said) + self._tail)
        return b"".join(chunks)

    def closing(self, ends: Sequence[End]) -> bytes:
        """Usage, if asked for, and the end mark."""
        return self._frame.closing(usage_object(ends))

    # ------------------------------------------------------------ the whole answer

    def answer(self, choices: Sequence[Collected]) -> Json:
        """The answer of a request that does not stream."""
        said = [
            {
                "index": index,
                "message": message,
                "logprobs": chat_logprobs(choice.infos, self._tokens) if self._want_logprobs else None,
                "finish_reason": _finish(choice.end, "tool_calls" in message),
            }
            for index, (choice, message) in enumerate((one, self._message(one)) for one in choices)
        ]
        ends = [choice.end for choice in choices if choice.end is not None]
        whole = self._frame.whole("chat.completion", said, usage_object(ends))
        if self._num_prompt_top is not None:
            ids, scores = self.requests[0].prompt_ids, choices[0].prompt
            whole["prompt_logprobs"] = prompt_logprobs(ids, scores, self._num_prompt_top, self._tokens)
        return whole

    def _message(self, choice: Collected) -> Json:
        message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
        if self._reading.is_plain:
            return message
        spoken = self._reading.reader().whole(choice.text)
        message["content"] = spoken.text or (None if spoken.calls else "")
        if spoken.thought:
            message["reasoning_content"] = spoken.thought
        if spoken.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in spoken.calls
            ]
        return message


class _Choice:
    """One choice of a stream that is read in parts: its reader, and log-probabilities not written yet."""

    __slots__ = ("infos", "reader")

    def __init__(self, reading: Reading) -> None:
        self.reader = reading.reader()
        self.infos: list[TokenInfo] = []


def _delta_of(part: Part, reader: SpokenReader) -> Json:
    match part:
        case Said(text):
            return {"content": text}
        case Thought(text):
            return {"reasoning_content": text}
        case CallOpened(index, name):
            call = {
                "index": index,
                "id": reader.calls[index].id,
                "type": "function",
                "function": {"name": name, "arguments": ""},
            }
            return {"tool_calls": [call]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _finish(end: End | None, has_calls: bool) -> str:
    """OpenAI's reason: an answer that ended of itself after calls waits for their results."""
    reason = finish_reason(end)
    return "tool_calls" if has_calls and reason == "stop" else reason


async def prepare(core: Core, data: bytes, *, request_id: str, tenant: str) -> Chat:
    """Check a body and prepare everything that can fail before submitting. Raises `RequestError`."""
    body = decode_body(_decode, data)
    if body.reasoning:
        raise invalid("reasoning is offered by /v1/query only", "reasoning")
    tools = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("needs logprobs to be true", "top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise invalid("give either max_tokens or max_completion_tokens", "max_tokens")
    if body.prompt_logprobs is not None and body.stream:
        raise invalid("come with whole answers; leave stream out", "prompt_logprobs")
    settle_times(clips_of(body.messages), body.media_io_kwargs, body.mm_processor_kwargs)
    budget, param = budget_asked(body.thinking_budget, body.thinking_token_budget)
    model = core.model(body.model)
    options = _chat_options(body, thinks=bool(model.template_names))
    count = choice_count(body, core.config.max_n)
    checked = await check_fields(
        core,
        model,
        body,
        tenant=tenant,
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else -1,
        num_prompt_logprobs=-1 if body.prompt_logprobs is None else body.prompt_logprobs,
        count=count,
        tools=tools,
    )
    is_constrained = checked.grammar is not None
    prompt = await compose_chat(
        core, model, body.messages, options, tools=tools, is_constrained=is_constrained
    )
    if body.max_completion_tokens is not None:
        length = Length(body.max_completion_tokens, "max_completion_tokens")
    else:
        length = Length(body.max_tokens, "max_tokens")
    if body.prompt_logprobs is not None:
        check_scores([prompt], body.prompt_logprobs, 1, "prompt_logprobs")
    thinking = thought_budget(model, prompt.reading, budget, param)
    requests = make_requests(checked, request_id, [prompt], length, thinking=thinking)
    return Chat(request_id, body, [requests[0], *map(unscored, requests[1:])], prompt.reading)


def _chat_options(body: ChatBody, *, thinks: bool) -> ChatOptions | None:
    """The body's options for rendering the conversation; None where it has none. Raises `RequestError`.

    `thinks`: the model has a template, which may read how much to think; without one there is nothing to say it to.
    """
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
    variables = dict(body.chat_template_kwargs or {})
    _check_variables(variables)
    if thinks:
        variables = {**effort_variables(body.reasoning_effort), **variables}
    if body.enable_thinking is not None:
        variables["enable_thinking"] = body.enable_thinking
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
