"""Owns Moondream's own routes: query, caption, detect and point. No sockets; runs on the gateway's loop."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from gateway.api.answers import Collected, metrics_object
from gateway.api.parameters import (
    DEFAULT_MAX_OBJECTS,
    MAX_OBJECTS,
    TOKENS_PER_OBJECT,
    Count,
    Json,
    decode_body,
    refuse,
    token_budget,
)
from gateway.api.prompts import task_prompt
from gateway.core.service import Service
from gateway.generation import Delta, End, GenerateRequest, PreparedImage, RequestError, SpatialObject
from shared.errors import ErrorCode
from shared.protocol import ModelCard, Sampling

_encode = msgspec.json.encode
Argument = Annotated[str, Meta(min_length=1, max_length=1 << 16)]


class Settings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`settings` of every route."""

    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    max_tokens: Count | None = None
    max_objects: Annotated[int, Meta(ge=1, le=MAX_OBJECTS)] | None = None
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None = None
    variant: str | None = None


class _Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    settings: Settings | None = None
    stream: bool | None = None
    spatial_refs: Any = None


class QueryBody(_Body, kw_only=True):
    """`/v1/query`."""

    question: Argument
    image_url: str | None = None
    reasoning: bool | None = None


class CaptionBody(_Body, kw_only=True):
    """`/v1/caption`."""

    image_url: str
    length: Literal["short", "normal", "long"] = "normal"


class ObjectBody(_Body, kw_only=True):
    """`/v1/detect` and `/v1/point`."""

    image_url: str
    object: Argument


_decode_query = msgspec.json.Decoder(QueryBody).decode
_decode_caption = msgspec.json.Decoder(CaptionBody).decode
_decode_object = msgspec.json.Decoder(ObjectBody).decode


class Answer:
    """One prepared request; `name` is the answer's field: answer, caption, objects or points."""

    def __init__(self, request_id: str, name: str, asked: GenerateRequest, stream: bool) -> None:
        self.asked = [asked]
        self.stream = stream
        self._request_id = request_id
        self._name = name
        self._texts: list[str] = []
        self._objects: list[SpatialObject] = []
        self._token_index = 0

    # ------------------------------------------------------------ the stream, see `transport.sse.Shape`

    def opening(self) -> bytes:
        """Nothing comes before the first chunk."""
        return b""

    def delta(self, index: int, delta: Delta) -> bytes:
        """One chunk."""
        self._texts.append(delta.text)
        self._token_index = delta.token_index
        text = _encode(delta.text)
        return b'data: {"chunk":%b,"completed":false,"token_index":%d}\n\n' % (text, delta.token_index)

    def found(self, index: int, found: SpatialObject) -> bytes:
        """One object, in the shape of the whole answer's."""
        self._objects.append(found)
        chunk = {"chunk": "", "completed": False, self._name: [self._shape(found)]}
        return b"data: " + _encode(chunk) + b"\n\n"

    def end(self, index: int, end: End) -> bytes:
        """The chunk with everything."""
        last = {"chunk": "", "completed": True, **self._whole("".join(self._texts), self._objects, end)}
        return b"data: " + _encode(last) + b"\n\n"

    def closing(self, ends: Sequence[End]) -> bytes:
        """The last chunk said `completed`; there is no end mark."""
        return b""

    # ------------------------------------------------------------ the whole answer

    def answer(self, choices: Sequence[Collected]) -> Json:
        """The answer of a request that does not stream."""
        choice = choices[0]
        assert choice.end is not None
        return self._whole(choice.text, choice.objects, choice.end)

    def _whole(self, text: str, objects: list[SpatialObject], end: End) -> Json:
        said: object = text
        if self._name in ("objects", "points"):
            said = [self._shape(found) for found in objects]
        return {
            "request_id": self._request_id,
            self._name: said,
            "finish_reason": end.reason.value,
            "metrics": metrics_object(end.usage),
        }

    def _shape(self, found: SpatialObject) -> Json:
        return {"x": found.x, "y": found.y} if self._name == "points" else dict(found.box())


async def prepare_query(core: Service, data: bytes, *, request_id: str, tenant: str) -> Answer:
    """`/v1/query`. Raises `RequestError`."""
    body = decode_body(_decode_query, data)
    if body.reasoning:
        raise RequestError(
            ErrorCode.UNSUPPORTED, "reasoning is not supported by this server", param="reasoning"
        )
    card = _card(core, body, tenant)
    ids = task_prompt(card, "query", await core.encode_async(card.model_id, body.question.strip()))
    image = None
    if body.image_url is not None:
        image = await core.prepare_image(card.model_id, body.image_url, param="image_url")
    asked = _text_request(core, card, body, ids, image)
    return _answer("answer", asked, body, request_id, tenant)


async def prepare_caption(core: Service, data: bytes, *, request_id: str, tenant: str) -> Answer:
    """`/v1/caption`. Raises `RequestError`."""
    body = decode_body(_decode_caption, data)
    card = _card(core, body, tenant)
    if f"caption_{body.length}" not in card.templates:
        offered = [name.removeprefix("caption_") for name in card.templates if name.startswith("caption_")]
        message = f"length: model {card.model_id} offers {', '.join(offered) or 'no captions'}"
        raise RequestError(ErrorCode.UNSUPPORTED, message, param="length")
    ids = task_prompt(card, f"caption_{body.length}")
    image = await core.prepare_image(card.model_id, body.image_url, param="image_url")
    return _answer("caption", _text_request(core, card, body, ids, image), body, request_id, tenant)


async def prepare_detect(core: Service, data: bytes, *, request_id: str, tenant: str) -> Answer:
    """`/v1/detect`. Raises `RequestError`."""
    return await _prepare_spatial(core, data, "detect", "objects", request_id, tenant)


async def prepare_point(core: Service, data: bytes, *, request_id: str, tenant: str) -> Answer:
    """`/v1/point`. Raises `RequestError`."""
    return await _prepare_spatial(core, data, "point", "points", request_id, tenant)


async def _prepare_spatial(
    core: Service, data: bytes, task: str, name: str, request_id: str, tenant: str
) -> Answer:
    body = decode_body(_decode_object, data)
    card = _card(core, body, tenant)
    settings = body.settings or Settings()
    argument = await core.encode_async(card.model_id, " " + body.object.strip())
    ids = task_prompt(card, task, argument)
    image = await core.prepare_image(card.model_id, body.image_url, param="image_url")
    per_object = TOKENS_PER_OBJECT[task]
    room = core.room(card.model_id, len(ids), 1)
    num_objects = settings.max_objects or DEFAULT_MAX_OBJECTS
    if settings.max_objects is None:
        num_objects = max(1, min(num_objects, (room - 1) // per_object))
    asked = GenerateRequest(
        request_id=request_id,
        model_id=card.model_id,
        prompt_ids=ids,
        max_tokens=num_objects * per_object + 1,
        sampling=Sampling(),
        images=[image],
        stop_ids=list(card.eos_ids),
        task=task,
        max_objects=num_objects,
    )
    return _answer(name, asked, body, request_id, tenant)


def _card(core: Service, body: _Body, tenant: str) -> ModelCard:
    """The model, once everything cheap to refuse is refused."""
    refuse(body, ("spatial_refs",))
    if body.settings is not None and body.settings.variant is not None:
        message = "settings.variant is not supported by this server"
        raise RequestError(ErrorCode.UNSUPPORTED, message, param="settings.variant")
    card = core.card(body.model)
    core.check_capacity(card.model_id, tenant)
    return card


def _text_request(
    core: Service, card: ModelCard, body: _Body, ids: list[int], image: PreparedImage | None
) -> GenerateRequest:
    settings = body.settings or Settings()
    images = [image] if image is not None else []
    room = core.room(card.model_id, len(ids), len(images))
    return GenerateRequest(
        request_id="",
        model_id=card.model_id,
        prompt_ids=ids,
        max_tokens=token_budget(settings.max_tokens, card, room, "settings.max_tokens"),
        sampling=Sampling(
            temperature=card.default_temperature if settings.temperature is None else settings.temperature,
            top_k=card.default_top_k,
            top_p=card.default_top_p if settings.top_p is None else settings.top_p,
            seed=secrets.randbits(63) if settings.seed is None else settings.seed,
            suppress_ids=list(card.suppress_ids),
        ),
        images=images,
        stop_ids=list(card.eos_ids),
        strip_start=True,
    )


def _answer(name: str, asked: GenerateRequest, body: _Body, request_id: str, tenant: str) -> Answer:
    asked = replace(asked, request_id=request_id, tenant=tenant)
    return Answer(request_id, name, asked, bool(body.stream))
