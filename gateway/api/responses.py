"""Owns Responses API requests: their fields, their checks, and what they ask the core for. No sockets; gateway's loop.

The same body serves `POST /v1/responses` and `response.create` on the WebSocket. The extension field `degas`
selects Moondream's tasks: `{"task": "detect", "object": "red circle"}`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from gateway.api.conversations import Conversations, Turn
from gateway.api.parameters import (
    MAX_TOP_LOGPROBS,
    Count,
    SamplingFields,
    decode_body,
    invalid,
    refuse,
    samplings,
    stop_ids,
    stops,
    token_budget,
)
from gateway.api.prompts import Message, Prompt, compose_chat, task_prompt
from gateway.api.response_events import Json
from gateway.api.response_stream import Opening
from gateway.api.structured import Wanted, grammar, schema_grammar
from gateway.generation import GenerateRequest, RequestError
from gateway.service import Service
from shared.errors import ErrorCode
from shared.protocol import Grammar, ModelCard

MAX_ITEMS: Final = 4096
MAX_PARTS: Final = 256
TOKENS_PER_OBJECT: Final = {"detect": 3, "point": 2}
LOGPROBS_INCLUDE: Final = "message.output_text.logprobs"

_LANE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,256}", re.ASCII)
_ROLES: Final = ("user", "assistant", "system", "developer")
_REFUSED: Final = (
    "tools",
    "background",
    "conversation",
    "prompt",
    "moderation",
    "context_management",
    "access_programs",
    "image",
)
_INSTEAD: Final = {"max_tokens": "max_output_tokens", "response_format": "text.format"}


class Part(msgspec.Struct):
    """One piece of a message's content."""

    type: str
    text: str | None = None
    image_url: str | None = None
    file_id: str | None = None


class Item(msgspec.Struct):
    """One input item; a message unless `type` says otherwise."""

    type: str = "message"
    role: str = "user"
    content: str | Annotated[list[Part], Meta(max_length=MAX_PARTS)] | None = None


class Format(msgspec.Struct):
    """`text.format`: free text, or JSON to a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    schema: Json | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct):
    """`text`: the shape of the answer."""

    format: Format | None = None


class DegasOptions(msgspec.Struct, forbid_unknown_fields=True):
    """The extension field `degas`: which of the model's tasks, and its argument."""

    task: Literal["query", "caption", "detect", "point"] = "query"
    length: Literal["short", "normal", "long"] = "normal"
    object: Annotated[str, Meta(max_length=512)] = ""
    max_objects: Annotated[int, Meta(ge=1, le=150)] = 50


class CreateBody(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """The fields of a create request."""

    input: str | Annotated[list[Item], Meta(max_length=MAX_ITEMS)] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Count | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: list[str] | None = None
    text: TextOptions | None = None
    generate: bool | None = None
    degas: DegasOptions | None = None
    # accepted: they change nothing about the answer here
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | None = None
    truncation: str | None = None
    parallel_tool_calls: bool | None = None
    tool_choice: Any = None
    max_tool_calls: int | None = None
    reasoning: Any = None
    prompt_cache_options: Any = None
    # refused when they ask for something
    tools: Any = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    moderation: Any = None
    context_management: Any = None
    access_programs: Any = None
    image: Any = None


class ResponseCreate(CreateBody, tag="response.create", kw_only=True, forbid_unknown_fields=True):
    """WebSocket: start a response on a lane."""

    stream_id: str | None = None


class ResponseCancel(msgspec.Struct, tag="response.cancel"):
    """WebSocket: stop one response by its id, or all of a lane's. What has already finished is left alone."""

    response_id: str | None = None
    stream_id: str | None = None


class ResponseSteer(msgspec.Struct, tag="response.steer"):
    """WebSocket: known to the API, refused here."""

    previous_response_id: str | None = None


class Authenticate(msgspec.Struct, tag="degas.authenticate"):
    """WebSocket: the key as first message, for browsers, which cannot set headers."""

    api_key: Annotated[str, Meta(max_length=1024)]


ClientEvent = ResponseCreate | ResponseCancel | ResponseSteer | Authenticate


class Envelope(msgspec.Struct):
    """As much of a malformed message as is needed to answer on the right lane."""

    type: Any = None
    stream_id: Any = None


_decode_body = msgspec.json.Decoder(CreateBody).decode
_decode_event: Callable[[bytes], ClientEvent] = msgspec.json.Decoder(ClientEvent).decode
_decode_envelope = msgspec.json.Decoder(Envelope).decode


def parse_body(data: bytes) -> CreateBody:
    """Decode a POST body. Raises `RequestError` naming the field at fault."""
    return decode_body(_decode_body, data)


def parse_event(data: str) -> ClientEvent:
    """Decode a WebSocket message. Raises `RequestError` naming the field at fault."""
    event = decode_body(_decode_event, data.encode(errors="surrogatepass"))
    stream_id = getattr(event, "stream_id", None)
    if stream_id is not None and not lane_name_ok(stream_id):
        allowed = "1 to 256 ASCII letters, digits, underscores, hyphens or periods"
        raise RequestError(ErrorCode.INVALID_REQUEST, f"stream_id is {allowed}", param="stream_id")
    return event


def lane_of(data: str) -> str | None:
    """The lane a malformed message meant, when that much can be read."""
    try:
        stream_id = _decode_envelope(data).stream_id
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    return stream_id if isinstance(stream_id, str) and lane_name_ok(stream_id) else None


def lane_name_ok(stream_id: str) -> bool:
    """Whether a lane may be called this."""
    return _LANE_NAME.fullmatch(stream_id) is not None


@dataclass(frozen=True, slots=True)
class Asked:
    """What a body asks for in words: texts by role in order, and at most one picture."""

    messages: tuple[tuple[str, str], ...]
    image_url: str | None = None
    image_param: str = "input"

    @property
    def question(self) -> str:
        """The last user message."""
        return next((text for role, text in reversed(self.messages) if role == "user"), "").strip()


def read_input(body: CreateBody, max_chars: int) -> Asked:
    """Flatten `input` to texts and a picture. Raises `RequestError` for what Degas does not take."""
    if isinstance(body.input, str):
        asked = Asked((("user", body.input),))
    else:
        asked = _read_items(body.input or ())
    size = sum(len(text) for _, text in asked.messages) + len(body.instructions or "")
    if size > max_chars:
        message = f"input: {size} characters; at most {max_chars} are accepted"
        raise RequestError(ErrorCode.PAYLOAD_TOO_LARGE, message, param="input")
    return asked


def _read_items(items: Sequence[Item]) -> Asked:
    messages: list[tuple[str, str]] = []
    pictures: list[tuple[str, str]] = []
    for index, item in enumerate(items):
        where = f"input[{index}]"
        if item.type != "message":
            message = f"items of type {item.type[:40]!r} are not supported"
            raise RequestError(ErrorCode.UNSUPPORTED, f"{where}: {message}", param=f"{where}.type")
        if item.role not in _ROLES:
            raise invalid(f"one of {', '.join(_ROLES)} is expected", f"{where}.role")
        if isinstance(item.content, str):
            messages.append((item.role, item.content))
        else:
            messages.append((item.role, _read_parts(item.content or (), f"{where}.content", pictures)))
    if len(pictures) > 1:
        raise RequestError(ErrorCode.UNSUPPORTED, "one picture a request is supported", param=pictures[1][1])
    return Asked(tuple(messages), *(pictures[0] if pictures else (None, "input")))


def _read_parts(parts: Sequence[Part], where: str, pictures: list[tuple[str, str]]) -> str:
    texts: list[str] = []
    for index, part in enumerate(parts):
        param = f"{where}[{index}]"
        if part.type in ("input_text", "output_text", "text"):
            texts.append(part.text or "")
        elif part.type == "input_image":
            if part.image_url is None:
                message = "pictures are taken as a data URL in image_url, not by file_id"
                raise RequestError(ErrorCode.UNSUPPORTED, message, param=f"{param}.image_url")
            pictures.append((part.image_url, f"{param}.image_url"))
        else:
            message = (
                f"{param}: content of type {part.type[:40]!r} is not supported; use input_text or input_image"
            )
            raise RequestError(ErrorCode.UNSUPPORTED, message, param=f"{param}.type")
    return "\n".join(texts)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready to submit, its opening, and the turn it will leave behind (less the answer)."""

    request: GenerateRequest
    opening: Opening
    turn: Turn


async def prepare(
    core: Service,
    body: CreateBody,
    *,
    tenant: str,
    previous: Turn | None = None,
    stream_id: str | None = None,
) -> Prepared:
    """Check a body and prepare everything that can fail before submitting. Raises `RequestError`."""
    refuse(body, _REFUSED)
    for name, instead in _INSTEAD.items():
        if getattr(body, name) is not None:
            raise RequestError(ErrorCode.UNSUPPORTED, f"{name} is called {instead} here", param=name)
    if body.n not in (None, 1):
        raise invalid("one answer a response", "n")
    card = core.card(body.model)
    options = body.degas or DegasOptions()
    asked = read_input(body, core.config.max_prompt_chars)
    wants_logprobs = body.top_logprobs is not None or LOGPROBS_INCLUDE in (body.include or ())
    sampling = samplings(body, card, (body.top_logprobs or 0) if wants_logprobs else -1, 1)[0]
    stop, form = stops(body.stop), _format(body.text)
    core.check_capacity(card.model_id, tenant)
    constraint = await grammar(core, body, form)
    messages = (previous.messages if previous else ()) + asked.messages
    prompt = await _compose(core, card, asked, options, messages, body.instructions)
    image = previous.image if previous else None
    if asked.image_url is not None:
        image = await core.prepare_image(card.model_id, asked.image_url, param=asked.image_param)
    if image is None and options.task != "query":
        raise invalid(f"{options.task} needs a picture: an input_image with a data URL", "input")
    images = [] if image is None else [image]
    room = core.room(card.model_id, len(prompt.ids), len(images))
    response_id = "resp_" + secrets.token_hex(16)
    task = options.task if options.task in TOKENS_PER_OBJECT else "text"
    if task == "text":
        max_tokens = token_budget(body.max_output_tokens, card, room, "max_output_tokens")
    else:
        max_tokens = min(options.max_objects * TOKENS_PER_OBJECT[task] + 1, room)
    request = GenerateRequest(
        request_id=response_id,
        model_id=card.model_id,
        prompt_ids=prompt.ids,
        max_tokens=max_tokens,
        sampling=sampling,
        images=images,
        stop=stop,
        stop_ids=stop_ids(body, card),
        task=task,
        max_objects=options.max_objects if task != "text" else 0,
        tenant=tenant,
        priority=body.priority or 0,
        grammar=constraint,
    )
    opening = Opening(response_id, card.model_id, task, _echo(body, request), stream_id)
    return Prepared(request, opening, Turn(messages, image))


async def _compose(
    core: Service,
    card: ModelCard,
    asked: Asked,
    options: DegasOptions,
    messages: tuple[tuple[str, str], ...],
    instructions: str | None,
) -> Prompt:
    """The prompt's ids. Moondream is asked the last user turn; models with a chat template get all of them."""
    if options.task == "caption":
        return Prompt(task_prompt(card, f"caption_{options.length}"))
    if options.task in ("detect", "point"):
        name = options.object.strip()
        if not name:
            raise invalid(f"{options.task} needs the name of an object", "degas.object")
        return Prompt(task_prompt(card, options.task, await core.encode_async(card.model_id, " " + name)))
    if not asked.question:
        raise invalid("a user message with text is needed", "input")
    if card.family == "moondream" or "query_prefix" in card.templates:
        return Prompt(task_prompt(card, "query", await core.encode_async(card.model_id, asked.question)))
    if asked.image_url is not None:
        raise RequestError(
            ErrorCode.UNSUPPORTED, f"model {card.model_id} takes no pictures", param=asked.image_param
        )
    turns = [Message(role, text) for role, text in messages]  # type: ignore[arg-type]  # roles were checked
    if instructions:
        turns.insert(0, Message("system", instructions))
    return await compose_chat(core, card, turns, max_chars=core.config.max_prompt_chars)


def _format(text: TextOptions | None) -> Wanted | None:
    wanted = text.format if text is not None else None
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Grammar("json_object", "{}"), "text.format"
    if wanted.schema is None:
        raise invalid("json_schema needs a schema", "text.format.schema")
    return schema_grammar(wanted.schema, "text.format.schema", strict=wanted.strict)


def _echo(body: CreateBody, request: GenerateRequest) -> Json:
    """The request's own fields as every response object repeats them."""
    wanted = body.text.format if body.text is not None else None
    return {
        "instructions": body.instructions,
        "max_output_tokens": request.max_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": bool(body.parallel_tool_calls),
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": None, "summary": None},
        "store": body.store is not False,
        "temperature": request.sampling.temperature,
        "text": {"format": {"type": "text"} if wanted is None else msgspec.to_builtins(wanted)},
        "tool_choice": "none",
        "tools": [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": request.sampling.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def recall(response_id: str | None, tenant: str, *stores: Conversations) -> Turn | None:
    """The turn that `previous_response_id` names. Raises `RequestError` when it is not held here any more."""
    if response_id is None:
        return None
    for store in stores:
        turn = store.recall(tenant, response_id)
        if turn is not None:
            return turn
    message = (
        "this response is not held here any more; send the whole input again without previous_response_id"
    )
    raise RequestError(ErrorCode.NOT_FOUND, message, param="previous_response_id")
