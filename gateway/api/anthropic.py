"""Owns `/v1/messages` and `/v1/messages/count_tokens`, Anthropic's interface: bodies and what they ask for. Gateway's loop.

A body becomes the messages, tools and fields that `/v1/chat/completions` has, and goes the same way from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from gateway.api.anthropic_answer import MessageAnswer
from gateway.api.fields import Known
from gateway.api.parameters import Count, Json, SamplingFields, Unit, decode_body, invalid, renamed
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
)
from gateway.api.requests import Length, check_fields, make_requests
from gateway.api.spoken import thought_budget
from gateway.api.tools import ToolsAsked, read_tools, tool_of
from gateway.generation import ChatOptions, Core, RequestError, ServedModel
from shared.errors import ErrorCode

_encode = msgspec.json.encode


class Text(Known, kw_only=True, tag_field="type", tag="text"):
    """A block of text."""

    IGNORED: ClassVar[tuple[str, ...]] = ("cache_control", "citations")

    text: str
    cache_control: Any = None
    citations: Any = None


class Base64Source(Known, kw_only=True, tag_field="type", tag="base64"):
    """A picture in the body."""

    media_type: str
    data: str


class UrlSource(Known, kw_only=True, tag_field="type", tag="url"):
    """A picture's URL: a data URL is read, any other is refused."""

    url: str


class Image(Known, kw_only=True, tag_field="type", tag="image"):
    """A picture."""

    IGNORED: ClassVar[tuple[str, ...]] = ("cache_control",)

    source: Base64Source | UrlSource
    cache_control: Any = None

    def url(self) -> str:
        """The picture as a data URL."""
        source = self.source
        return (
            source.url if isinstance(source, UrlSource) else f"data:{source.media_type};base64,{source.data}"
        )


class ToolUse(Known, kw_only=True, tag_field="type", tag="tool_use"):
    """A call that an earlier answer made."""

    IGNORED: ClassVar[tuple[str, ...]] = ("cache_control", "caller")

    id: str
    name: str
    input: Json
    cache_control: Any = None
    caller: Any = None


class ToolResult(Known, kw_only=True, tag_field="type", tag="tool_result"):
    """What a call gave."""

    IGNORED: ClassVar[tuple[str, ...]] = ("cache_control",)

    tool_use_id: str
    content: str | list[Text | Image] | None = None
    is_error: bool | None = None
    cache_control: Any = None


class Thinking(Known, kw_only=True, tag_field="type", tag="thinking"):
    """An earlier answer's thinking. The signature is Anthropic's; here it is made up and not looked at."""

    IGNORED: ClassVar[tuple[str, ...]] = ("signature",)

    thinking: str
    signature: str | None = None


class RedactedThinking(Known, kw_only=True, tag_field="type", tag="redacted_thinking"):
    """Thinking that only Anthropic can read."""

    REFUSED: ClassVar[tuple[str, ...]] = ("data",)

    data: Any = None


Block = Text | Image | ToolUse | ToolResult | Thinking | RedactedThinking
Blocks = Annotated[list[Block], Meta(max_length=512)]


class Turn(Known, kw_only=True):
    """One entry of `messages`."""

    role: Literal["user", "assistant"]
    content: str | Blocks


class CustomTool(Known, kw_only=True):
    """One entry of `tools`."""

    IGNORED: ClassVar[tuple[str, ...]] = ("cache_control", "eager_input_streaming", "type")
    REFUSED: ClassVar[tuple[str, ...]] = ("defer_loading", "allowed_callers", "input_examples")

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    input_schema: Json
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: Any = None
    eager_input_streaming: Any = None
    defer_loading: Any = None
    allowed_callers: Any = None
    input_examples: Any = None


class ToolChoice(Known, kw_only=True):
    """`tool_choice`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingAsked(Known, kw_only=True):
    """`thinking`."""

    IGNORED: ClassVar[tuple[str, ...]] = ("display",)

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Meta(ge=1)] | None = None
    display: Any = None


class Metadata(Known, kw_only=True):
    """`metadata`."""

    IGNORED: ClassVar[tuple[str, ...]] = ("user_id",)

    user_id: str | None = None


class _Conversation(Known, kw_only=True):
    """What both routes read."""

    IGNORED: ClassVar[tuple[str, ...]] = ("cache_control",)
    REFUSED: ClassVar[tuple[str, ...]] = ("container", "context_management", "mcp_servers", "output_config")

    model: str
    messages: Annotated[list[Turn], Meta(min_length=1, max_length=4096)]
    system: str | list[Text] | None = None
    tools: list[CustomTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingAsked | None = None
    cache_control: Any = None
    container: Any = None
    context_management: Any = None
    mcp_servers: Any = None
    output_config: Any = None


class CountBody(_Conversation, kw_only=True):
    """`/v1/messages/count_tokens`."""


class MessagesBody(_Conversation, kw_only=True):
    """`/v1/messages`."""

    IGNORED: ClassVar[tuple[str, ...]] = (*_Conversation.IGNORED, "service_tier", "inference_geo")

    max_tokens: Count
    metadata: Metadata | None = None
    service_tier: str | None = None
    inference_geo: str | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Unit | None = None
    top_k: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None


_decode_count = msgspec.json.Decoder(CountBody).decode
_decode_messages = msgspec.json.Decoder(MessagesBody).decode


async def prepare(core: Core, data: bytes, *, request_id: str, tenant: str) -> MessageAnswer:
    """Check a body and prepare everything that can fail before submitting. Raises `RequestError`."""
    body = decode_body(_decode_messages, data)
    model = core.model(body.model)
    tools = _tools(body)
    fields = SamplingFields(
        stream=body.stream,
        max_tokens=body.max_tokens,
        stop=body.stop_sequences,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
    )
    try:
        checked = await check_fields(core, model, fields, tenant=tenant, tools=tools)
    except RequestError as error:
        raise renamed(error, "stop_sequences" if error.param == "stop" else error.param or "") from None
    prompt = await _prompt(core, model, body, tools)
    thinking = body.thinking
    asked = thinking.budget_tokens if thinking is not None and thinking.type == "enabled" else None
    budget = thought_budget(model, prompt.reading, asked, "thinking.budget_tokens")
    length = Length(body.max_tokens, "max_tokens")
    (request,) = make_requests(checked, request_id, [prompt], length, thinking=budget)
    return MessageAnswer(request_id, request, prompt.reading, stream=bool(body.stream))


async def count_tokens(core: Core, data: bytes) -> Json:
    """How many tokens a body's prompt has, its pictures' included. Raises `RequestError`."""
    body = decode_body(_decode_count, data)
    model = core.model(body.model)
    prompt = await _prompt(core, model, body, _tools(body))
    return {"input_tokens": prompt.num_tokens}


async def _prompt(core: Core, model: ServedModel, body: _Conversation, tools: ToolsAsked | None) -> Prompt:
    messages = list(_messages(body))
    places = [place for place, _ in messages]
    options = _options(body, model)
    try:
        return await compose_chat(core, model, [message for _, message in messages], options, tools=tools)
    except RequestError as error:
        raise renamed(error, _place_of(error.param or "", places)) from None


def _options(body: _Conversation, model: ServedModel) -> ChatOptions | None:
    """Whether the model thinks, and whether a last turn of the assistant's is gone on with, as Anthropic does."""
    continues = body.messages[-1].role == "assistant"
    thinks = body.thinking is not None and body.thinking.type != "disabled"
    format = model.chat_format
    variables: Json = {}
    if format is not None and format.can_skip_thinking:
        variables["enable_thinking"] = thinks
    elif body.thinking is not None and body.thinking.type == "enabled" and not (format and format.thinking):
        message = f"thinking: model {model.card.model_id} does not think before it answers; leave it out"
        raise RequestError(ErrorCode.UNSUPPORTED, message, param="thinking")
    if not continues and not variables:
        return None
    return ChatOptions(not continues, continues, variables)


def _tools(body: _Conversation) -> ToolsAsked | None:
    offered = [
        tool_of(tool.name, tool.description, tool.input_schema, strict=tool.strict)
        for tool in body.tools or ()
    ]
    asked = body.tool_choice
    if asked is not None and (asked.type == "tool") != (asked.name is not None):
        raise invalid('a name goes with the type "tool", and only with it', "tool_choice.name")
    choice: Any = None
    if asked is not None:
        named = {"type": "function", "function": {"name": asked.name}}
        choice = {"auto": "auto", "any": "required", "none": "none", "tool": named}[asked.type]
    return read_tools(offered, choice, not (asked is not None and asked.disable_parallel_tool_use))


def _messages(body: _Conversation) -> Iterator[tuple[str, Message]]:
    """The conversation as `/v1/chat/completions` has it, each message with its place in this body."""
    if body.system is not None:
        system = body.system if isinstance(body.system, str) else "\n\n".join(t.text for t in body.system)
        yield "system", Message(role="system", content=system)
    for index, turn in enumerate(body.messages):
        place = f"messages[{index}]"
        if isinstance(turn.content, str):
            yield place, Message(role=turn.role, content=turn.content)
        elif turn.role == "assistant":
            yield place, _assistant(turn.content, place)
        else:
            yield from _user(turn.content, place)


def _assistant(blocks: Sequence[Block], place: str) -> Message:
    texts, thoughts = [], []
    calls: list[ToolCall] = []
    for number, block in enumerate(blocks):
        match block:
            case Text(text=text):
                texts.append(text)
            case Thinking(thinking=text):
                thoughts.append(text)
            case RedactedThinking():
                pass
            case ToolUse():
                arguments = _encode(block.input).decode()
                function = FunctionCall(name=block.name, arguments=arguments)
                calls.append(ToolCall(id=block.id, type="function", function=function))
            case _:
                raise invalid("an assistant's turn has no such block", f"{place}.content[{number}]")
    return Message(
        role="assistant",
        content="".join(texts) or (None if calls else ""),
        tool_calls=calls or None,
        reasoning_content="\n".join(thoughts) or None,
    )


def _user(blocks: Sequence[Block], place: str) -> Iterator[tuple[str, Message]]:
    parts: list[ContentPart] = []
    for number, block in enumerate(blocks):
        match block:
            case Text(text=text):
                parts.append(TextPart(text=text))
            case Image():
                parts.append(ImagePart(image_url=ImageUrl(url=block.url())))
            case ToolResult():
                yield place, _result(block, f"{place}.content[{number}]")
            case _:
                raise invalid("a user's turn has no such block", f"{place}.content[{number}]")
    if parts:
        only_text = all(isinstance(part, TextPart) for part in parts)
        content = "\n".join(part.text for part in parts if isinstance(part, TextPart)) if only_text else parts
        yield place, Message(role="user", content=content)


def _result(block: ToolResult, place: str) -> Message:
    content = block.content or ""
    if not isinstance(content, str):
        if any(isinstance(part, Image) for part in content):
            message = (
                f"{place}.content: pictures in a tool's result are not read here; give them in a message"
            )
            raise RequestError(ErrorCode.UNSUPPORTED, message, param=f"{place}.content")
        content = "\n".join(part.text for part in content if isinstance(part, Text))
    if block.is_error:
        content = f"Error: {content}"
    return Message(role="tool", content=content, tool_call_id=block.tool_use_id)


def _place_of(param: str, places: Sequence[str]) -> str:
    """A field's name in this body for its name in the conversation made of it."""
    if not param.startswith("messages["):
        return param
    number, _, rest = param[len("messages[") :].partition("]")
    return places[int(number)] + rest.replace(".image_url.url", ".source") if number.isdigit() else param
