"""Owns `/api/chat` and `/api/generate`, Ollama's interface: bodies and what they ask for. Gateway's loop.

A body becomes the messages, tools and fields that `/v1/chat/completions` has, and goes the same way from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec
from msgspec import Meta

from gateway.api.fields import Known, check_refused
from gateway.api.ollama_answer import OllamaAnswer
from gateway.api.parameters import (
    Budget,
    Json,
    JsonSchema,
    ResponseFormat,
    SamplingFields,
    Unit,
    decode_body,
    invalid,
    renamed,
)
from gateway.api.prompts import (
    ContentPart,
    FunctionCall,
    ImagePart,
    ImageUrl,
    Message,
    Prompt,
    TextPart,
    ToolCall,
    compose_chat,
    takes_questions,
)
from gateway.api.requests import Length, check_fields, make_requests
from gateway.api.spoken import thought_budget
from gateway.api.tools import Tool, ToolsAsked, read_tools
from gateway.generation import ChatOptions, Core, RequestError, ServedModel
from shared.errors import ErrorCode
from shared.protocol import ThinkingBudget

_encode = msgspec.json.encode
_INT64: Final = 1 << 63
_PARAMS: Final = {
    "max_tokens": "options.num_predict",
    "repetition_penalty": "options.repeat_penalty",
    "response_format.json_schema.schema": "format",
    "response_format": "format",
    "stop": "options.stop",
}
"""This interface's names for fields of `SamplingFields`."""


class Options(Known, kw_only=True):
    """`options`."""

    # How a device is used, which is the server's affair here. A context is the model's, whatever is asked for.
    IGNORED: ClassVar[tuple[str, ...]] = (
        "f16_kv", "logits_all", "low_vram", "main_gpu", "num_batch", "num_ctx", "num_gpu", "num_gqa", "num_keep",
        "num_thread", "numa", "penalize_newline", "use_mlock", "use_mmap", "vocab_only",
    )  # fmt: skip
    REFUSED: ClassVar[tuple[str, ...]] = (
        "mirostat",
        "mirostat_eta",
        "mirostat_tau",
        "repeat_last_n",
        "tfs_z",
        "typical_p",
    )

    num_predict: Annotated[int, Meta(ge=-2, le=(1 << 31) - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    min_p: Unit | None = None
    seed: Annotated[int, Meta(ge=-_INT64, le=_INT64 - 1)] | None = None
    stop: str | list[str] | None = None
    repeat_penalty: Annotated[float, Meta(ge=0.01, le=10.0)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] | None = None
    thinking_budget: Budget | None = (
        None  # not one of Ollama's: a client passes on what it does not know here
    )
    mirostat: Any = None
    mirostat_eta: Any = None
    mirostat_tau: Any = None
    repeat_last_n: Any = None
    tfs_z: Any = None
    typical_p: Any = None
    f16_kv: Any = None
    logits_all: Any = None
    low_vram: Any = None
    main_gpu: Any = None
    num_batch: Any = None
    num_ctx: Any = None
    num_gpu: Any = None
    num_gqa: Any = None
    num_keep: Any = None
    num_thread: Any = None
    numa: Any = None
    penalize_newline: Any = None
    use_mlock: Any = None
    use_mmap: Any = None
    vocab_only: Any = None


class Called(Known, kw_only=True):
    """`function` of a tool call. Arguments are an object here."""

    IGNORED: ClassVar[tuple[str, ...]] = ("index", "description")

    name: str
    arguments: Json | None = None
    index: int | None = None
    description: str | None = None


class CallMade(Known, kw_only=True):
    """A call that an earlier answer made."""

    IGNORED: ClassVar[tuple[str, ...]] = ("id", "type")

    function: Called
    id: str | None = None
    type: str | None = None


class ChatMessage(Known, kw_only=True):
    """One entry of `messages`."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Annotated[list[str], Meta(max_length=64)] | None = None
    tool_calls: Annotated[list[CallMade], Meta(max_length=256)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    name: str | None = None


class _Asked(Known, kw_only=True):
    """What both routes read."""

    IGNORED: ClassVar[tuple[str, ...]] = ("keep_alive",)
    REFUSED: ClassVar[tuple[str, ...]] = ("logprobs", "top_logprobs", "truncate", "shift")

    model: str
    stream: bool | None = None
    format: str | Json | None = None
    options: Options | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    keep_alive: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    truncate: Any = None
    shift: Any = None


class ChatBody(_Asked, kw_only=True):
    """`/api/chat`."""

    messages: Annotated[list[ChatMessage], Meta(max_length=4096)] | None = None
    tools: list[Tool] | None = None


class GenerateBody(_Asked, kw_only=True):
    """`/api/generate`."""

    REFUSED: ClassVar[tuple[str, ...]] = (*_Asked.REFUSED, "suffix", "template", "context")

    prompt: str = ""
    system: str | None = None
    images: Annotated[list[str], Meta(max_length=64)] | None = None
    raw: bool | None = None
    suffix: Any = None
    template: Any = None
    context: Any = None


_decode_chat = msgspec.json.Decoder(ChatBody).decode
_decode_generate = msgspec.json.Decoder(GenerateBody).decode


async def prepare_chat(core: Core, data: bytes, *, request_id: str, tenant: str) -> OllamaAnswer:
    """Check a body and prepare everything that can fail before submitting. Raises `RequestError`."""
    body = decode_body(_decode_chat, data)
    if not body.messages:
        return OllamaAnswer.loaded(core.model(body.model).card.model_id, is_chat=True)
    tools = read_tools(body.tools, None, None)
    return await _prepare(core, body, _messages(body.messages), tools, request_id, tenant, is_chat=True)


async def prepare_generate(core: Core, data: bytes, *, request_id: str, tenant: str) -> OllamaAnswer:
    """Check a body and prepare everything that can fail before submitting. Raises `RequestError`."""
    body = decode_body(_decode_generate, data)
    if not body.prompt and not body.images:
        return OllamaAnswer.loaded(core.model(body.model).card.model_id, is_chat=False)
    if body.raw and body.images:
        raise invalid("a raw prompt has no place for pictures; leave raw out", "images")
    messages = [] if body.system is None else [Message(role="system", content=body.system)]
    messages.append(Message(role="user", content=_content(body.prompt, body.images)))
    return await _prepare(core, body, messages, None, request_id, tenant, is_chat=False)


async def _prepare(
    core: Core,
    body: ChatBody | GenerateBody,
    messages: Sequence[Message],
    tools: ToolsAsked | None,
    request_id: str,
    tenant: str,
    *,
    is_chat: bool,
) -> OllamaAnswer:
    model = core.model(body.model)
    fields = _fields(body)
    try:
        checked = await check_fields(core, model, fields, tenant=tenant, tools=tools)
        if isinstance(body, GenerateBody) and body.raw:
            prompt = Prompt([*model.start_ids, *await model.encode(body.prompt, parse_special=True)])
        else:
            prompt = await compose_chat(
                core,
                model,
                messages,
                _options(body, model),
                tools=tools,
                is_constrained=checked.grammar is not None,
            )
        length = Length(fields.max_tokens, "max_tokens", default=_until_it_ends(body, model, prompt))
        budget = body.options.thinking_budget if body.options is not None else None
        thinking = _thinking(model, prompt, body, budget)
        (request,) = make_requests(checked, request_id, [prompt], length, thinking=thinking)
    except RequestError as error:
        raise _named(error, is_chat=is_chat) from None
    wants_stream = body.stream is not False
    return OllamaAnswer(request, prompt.reading, stream=wants_stream, is_chat=is_chat)


def _thinking(
    model: ServedModel, prompt: Prompt, body: ChatBody | GenerateBody, budget: int | None
) -> ThinkingBudget | None:
    param = "options.thinking_budget"
    if budget is not None and isinstance(body, GenerateBody) and body.raw:
        raise invalid("a raw prompt's answer is text to the letter, thinking and all; leave it out", param)
    return thought_budget(model, prompt.reading, budget, param)


def _until_it_ends(body: _Asked, model: ServedModel, prompt: Prompt) -> int | None:
    """−1 and −2 of `num_predict`: as long as there is room."""
    asked = body.options.num_predict if body.options is not None else None
    return model.room(prompt.num_tokens) if asked is not None and asked < 0 else None


def _fields(body: _Asked) -> SamplingFields:
    options = body.options or Options()
    check_refused(options, "options")
    predict = options.num_predict
    if predict == 0:
        raise invalid("at least 1; −1 for as long as there is room", "options.num_predict")
    wanted: ResponseFormat | None = None
    if isinstance(body.format, dict):
        wanted = ResponseFormat(type="json_schema", json_schema=JsonSchema(schema=body.format))
    elif body.format == "json":
        wanted = ResponseFormat(type="json_object")
    elif body.format:
        raise invalid('"json" or a JSON schema', "format")
    return SamplingFields(
        max_tokens=predict if predict is not None and predict > 0 else None,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=options.seed,
        stop=options.stop,
        repetition_penalty=options.repeat_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        response_format=wanted,
    )


def _options(body: _Asked, model: ServedModel) -> ChatOptions | None:
    format = model.chat_format
    if body.think is None or (body.think is False and (format is None or format.thinking is None)):
        return None
    if takes_questions(model.card) or format is None or format.thinking is None:
        message = f"think: model {model.card.model_id} does not think before it answers; leave it out"
        raise RequestError(ErrorCode.UNSUPPORTED, message, param="think")
    effort = {"reasoning_effort": body.think} if isinstance(body.think, str) else {}
    return ChatOptions(variables={"enable_thinking": bool(body.think), **effort})


def _messages(given: Sequence[ChatMessage]) -> list[Message]:
    """The conversation as `/v1/chat/completions` has it. Calls have no ids here, where some templates need them."""
    messages: list[Message] = []
    waiting: list[str] = []  # ids of calls whose results have not come
    num_calls = 0
    for message in given:
        calls: list[ToolCall] = []
        for call in message.tool_calls or ():
            function = FunctionCall(
                name=call.function.name, arguments=_encode(call.function.arguments or {}).decode()
            )
            calls.append(ToolCall(id=f"call{num_calls:05}", type="function", function=function))
            num_calls += 1
        waiting += [call.id for call in calls if call.id is not None]
        is_result = message.role == "tool"
        messages.append(
            Message(
                role=message.role,
                content=_content(message.content or "", message.images),
                name=message.tool_name or message.name if is_result else message.name,
                reasoning_content=message.thinking or None,
                tool_calls=calls or None,
                tool_call_id=waiting.pop(0) if is_result and waiting else None,
            )
        )
    return messages


def _content(text: str, images: Sequence[str] | None) -> str | list[ContentPart]:
    if not images:
        return text
    urls = [image if image[:5].lower() == "data:" else f"data:;base64,{image}" for image in images]
    pictures: list[ContentPart] = [ImagePart(image_url=ImageUrl(url=url)) for url in urls]
    return [*pictures, TextPart(text=text)]


def _named(error: RequestError, *, is_chat: bool) -> RequestError:
    """The error under this interface's names of the fields."""
    if error.param is None:
        return error
    own = _PARAMS.get(error.param)
    if own is None and error.param.startswith("messages["):
        place, _, rest = error.param.partition("]")
        is_picture = "image_url" in rest
        own = f"{place}].images" if is_chat and is_picture else "images" if is_picture else None
    return error if own is None else renamed(error, own)
