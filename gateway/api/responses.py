"""Owns Responses API requests: their fields, their checks, and what they ask the core for. No sockets; gateway loop.

The same body serves `POST /v1/responses` and `response.create` on the WebSocket. The extension field `degas`
selects Moondream's tasks: `{"task": "detect", "object": "red circle"}`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from gateway.api.conversations import Turn
from gateway.api.response_events import Json, Opening
from gateway.generation import Core, GenerateRequest, PreparedImage, RequestError
from shared.errors import ErrorCode
from shared.protocol import Grammar, ModelCard, Sampling

MAX_PARTS: Final = 256
MAX_TEXT_CHARS: Final = 1 << 20
_LANE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,256}")
_ERROR_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")

Unit = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]


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
    content: str | list[Part] | None = None


class Format(msgspec.Struct):
    """`text.format`: free text, or JSON to a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    schema: Json | None = None


class TextOptions(msgspec.Struct):
    """`text`: the shape of the answer."""

    format: Format | None = None


class DegasOptions(msgspec.Struct, forbid_unknown_fields=True):
    """The extension field `degas`: which of the model's tasks, and its argument."""

    task: Literal["query", "caption", "detect", "point"] = "query"
    length: Literal["short", "normal", "long"] = "normal"
    object: Annotated[str, Meta(max_length=512)] = ""
    max_objects: Annotated[int, Meta(ge=1, le=150)] = 50


class CreateBody(msgspec.Struct, kw_only=True):
    """The fields of a create request that Degas reads; others are accepted and ignored, as the API allows."""

    model: str | None = None
    input: str | list[Item] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Unit | None = None
    top_k: Annotated[int, Meta(ge=0, le=1 << 20)] | None = None
    min_p: Unit | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=10.0)] | None = None
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None = None
    stop: str | list[str] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    text: TextOptions | None = None
    tools: list[Any] | None = None
    background: bool | None = None
    conversation: Any = None
    stream: bool | None = None
    store: bool | None = None
    generate: bool | None = None
    user: str | None = None
    degas: DegasOptions | None = None


class ResponseCreate(CreateBody, tag="response.create", kw_only=True):
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
_decode_event = msgspec.json.Decoder(ClientEvent).decode
_decode_envelope = msgspec.json.Decoder(Envelope).decode


def parse_body(data: bytes) -> CreateBody:
    """Decode a POST body. Raises `RequestError` naming the field at fault."""
    try:
        return _decode_body(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _invalid(error) from error


def parse_event(data: str | bytes) -> ClientEvent:
    """Decode a WebSocket message. Raises `RequestError` naming the field at fault."""
    try:
        event = _decode_event(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _invalid(error) from error
    if isinstance(event, ResponseCreate) and event.stream_id is not None and not lane_name_ok(event.stream_id):
        raise RequestError(
            ErrorCode.INVALID_REQUEST,
            "stream_id must be 1 to 256 ASCII letters, digits, underscores, hyphens or periods",
            param="stream_id",
        )
    return event


def lane_of(data: str | bytes) -> str | None:
    """The lane a malformed message meant, when that much can be read."""
    try:
        stream_id = _decode_envelope(data).stream_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return stream_id if isinstance(stream_id, str) and lane_name_ok(stream_id) else None


def lane_name_ok(stream_id: str) -> bool:
    """Whether a lane may be called this."""
    return _LANE_NAME.fullmatch(stream_id) is not None


def _invalid(error: Exception) -> RequestError:
    message = str(error)
    found = _ERROR_PATH.search(message)
    param = found["path"] or None if found else None
    if found:
        message = message[: found.start()]
    if isinstance(error, RecursionError):
        message = "The JSON is nested too deeply"
    return RequestError(ErrorCode.INVALID_REQUEST, f"{message} (in {param})" if param else message, param=param)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a body asks for in words: texts by role in order, and at most one picture."""

    messages: tuple[tuple[str, str], ...]
    image_url: str | None
    image_param: str

    @property
    def question(self) -> str:
        """The last user message."""
        return next((text for role, text in reversed(self.messages) if role == "user"), "")


def read_input(body: CreateBody) -> Asked:
    """Flatten `input` to texts and a picture. Raises `RequestError` for what Degas does not take."""
    if body.tools:
        raise RequestError(ErrorCode.UNSUPPORTED, "tools are not supported by this endpoint", param="tools")
    if body.background:
        raise RequestError(ErrorCode.UNSUPPORTED, "background responses are not supported", param="background")
    if body.conversation is not None:
        raise RequestError(
            ErrorCode.UNSUPPORTED, "conversations are not stored; use previous_response_id", param="conversation"
        )
    if body.input is None:
        return Asked((), None, "input")
    if isinstance(body.input, str):
        return Asked((("user", body.input),), None, "input")
    messages: list[tuple[str, str]] = []
    pictures: list[tuple[str, str]] = []
    num_parts = 0
    for index, item in enumerate(body.input):
        where = f"input[{index}]"
        if item.type != "message":
            raise RequestError(
                ErrorCode.UNSUPPORTED, f"input items of type {item.type!r} are not supported", param=f"{where}.type"
            )
        if item.role not in ("user", "assistant", "system", "developer"):
            raise RequestError(ErrorCode.INVALID_REQUEST, "role must be user, assistant, system or developer",
                               param=f"{where}.role")  # fmt: skip
        if isinstance(item.content, str):
            messages.append((item.role, item.content))
            continue
        num_parts += len(item.content or ())
        if num_parts > MAX_PARTS:
            raise RequestError(
                ErrorCode.INVALID_REQUEST, f"at most {MAX_PARTS} content parts are taken", param="input"
            )
        messages.append((item.role, _read_parts(item.content or (), f"{where}.content", pictures)))
    if len(pictures) > 1:
        raise RequestError(ErrorCode.UNSUPPORTED, "one picture a request is supported", param=pictures[1][1])
    if sum(len(text) for _, text in messages) > MAX_TEXT_CHARS:
        raise RequestError(ErrorCode.PAYLOAD_TOO_LARGE, f"the text is over {MAX_TEXT_CHARS} characters", param="input")
    image_url, image_param = pictures[0] if pictures else (None, "input")
    return Asked(tuple(messages), image_url, image_param)


def _read_parts(parts: Sequence[Part], where: str, pictures: list[tuple[str, str]]) -> str:
    texts: list[str] = []
    for index, part in enumerate(parts):
        if part.type in ("input_text", "output_text", "text"):
            texts.append(part.text or "")
        elif part.type == "input_image":
            param = f"{where}[{index}].image_url"
            if part.image_url is None:
                raise RequestError(
                    ErrorCode.UNSUPPORTED, "pictures are taken as a data URL in image_url, not by file_id", param=param
                )
            pictures.append((part.image_url, param))
        else:
            raise RequestError(
                ErrorCode.UNSUPPORTED,
                f"content of type {part.type!r} is not supported; use input_text or input_image",
                param=f"{where}[{index}].type",
            )
    return "\n".join(texts)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready to submit, its opening, and the turn it will leave behind (less the answer)."""

    request: GenerateRequest
    opening: Opening
    turn: Turn


async def prepare(
    core: Core,
    body: CreateBody,
    *,
    tenant: str,
    previous: Turn | None = None,
    stream_id: str | None = None,
) -> Prepared:
    """Check a body and build what the core needs. Raises `RequestError`."""
    card = core.card(body.model)
    asked = read_input(body)
    options = body.degas or DegasOptions()
    image = previous.image if previous else None
    if asked.image_url is not None:
        if card.image is None:
            raise RequestError(
                ErrorCode.UNSUPPORTED, f"{card.model_id} takes no pictures", param=asked.image_param
            )
        image = await core.prepare_image(card.model_id, asked.image_url, param=asked.image_param)
    messages = (previous.messages if previous else ()) + asked.messages
    prompt_ids = compose_prompt(core, card, asked, options, messages, body.instructions, has_image=image is not None)
    response_id = "resp_" + secrets.token_hex(16)
    task = options.task if options.task in ("detect", "point") else "text"
    request = GenerateRequest(
        request_id=response_id,
        model_id=card.model_id,
        prompt_ids=prompt_ids,
        max_tokens=body.max_output_tokens or card.default_max_tokens,
        sampling=_sampling(body, card),
        images=[image] if image is not None else [],
        stop=_stop(body),
        stop_ids=list(card.eos_ids),
        task=task,
        max_objects=options.max_objects if task != "text" else 0,
        tenant=tenant,
        grammar=_grammar(body),
    )
    opening = Opening(response_id, card.model_id, task, _echo(body, request), stream_id)
    return Prepared(request, opening, Turn(messages, image))
