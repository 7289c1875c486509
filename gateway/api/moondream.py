"""Owns Moondream's own routes: query, caption, detect and point. No sockets; runs on the gateway's loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from gateway.api.answers import Collected, EventShape, metrics_object
from gateway.api.fields import Known
from gateway.api.parameters import (
    MAX_OBJECTS,
    Count,
    Json,
    SamplingFields,
    decode_body,
    invalid,
)
from gateway.api.prompts import Prompt, task_prompt
from gateway.api.requests import CheckedFields, Length, Objects, check_fields, make_requests
from gateway.api.spatial_refs import SpatialRefs, place_refs
from gateway.decisions.grounded import reasoning_object
from gateway.generation import Core, Delta, End, GenerateRequest, RequestError, SpatialObject, ThoughtPart
from shared.errors import ErrorCode

_encode = msgspec.json.encode
Argument = Annotated[str, Meta(min_length=1, max_length=1 << 16)]


class Settings(Known, kw_only=True):
    """`settings` of every route."""

    REFUSED = ("variant",)

    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    max_tokens: Count | None = None
    max_objects: Annotated[int, Meta(ge=1, le=MAX_OBJECTS)] | None = None
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None = None
    variant: str | None = None


class TaskBody(Known, kw_only=True):
    """What the bodies of all routes share."""

    model: str | None = None
    settings: Settings | None = None
    stream: bool | None = None


class QueryBody(TaskBody, kw_only=True):
    """`/v1/query`."""

    question: Argument
    image_url: str | None = None
    reasoning: bool | None = None
    spatial_refs: SpatialRefs | None = None


class CaptionBody(TaskBody, kw_only=True):
    """`/v1/caption`."""

    REFUSED = ("spatial_refs",)

    image_url: str
    length: Literal["short", "normal", "long"] = "normal"
    spatial_refs: Any = None


class ObjectBody(TaskBody, kw_only=True):
    """`/v1/detect` and `/v1/point`."""

    image_url: str
    object: Argument
    logprobs: bool | None = None
    spatial_refs: SpatialRefs | None = None


_decode_query = msgspec.json.Decoder(QueryBody).decode
_decode_caption = msgspec.json.Decoder(CaptionBody).decode
_decode_object = msgspec.json.Decoder(ObjectBody).decode


class Answer(EventShape):
    """One prepared request; `name` is the answer's field: answer, caption, objects or points."""

    def __init__(self, request_id: str, name: str, request: GenerateRequest, stream: bool) -> None:
        self.requests = [request]
        self.stream = stream
        self._request_id = request_id
        self._name = name
        self._texts: list[str] = []
        self._objects: list[SpatialObject] = []
        self._thoughts: list[ThoughtPart] = []
        self._thought_chars = self._piece_start = 0
        self._token_index = 0

    # ------------------------------------------------------------ the stream, see `transport.sse.Shape`

    def opening(self) -> bytes:
        """Nothing comes before the first chunk."""
        return b""

    def delta(self, index: int, delta: Delta) -> bytes:
        """One chunk; of a thought its text and its point."""
        if delta.thought is not None:
            return self._thought_chunk(delta.thought, delta.token_index)
        self._texts.append(delta.text)
        self._token_index = delta.token_index
        text = _encode(delta.text)
        return b'data: {"chunk":%b,"completed":false,"token_index":%d}\n\n' % (text, delta.token_index)

    def _thought_chunk(self, part: ThoughtPart, token_index: int) -> bytes:
        self._thoughts.append(part)
        self._thought_chars += len(part.text)
        start = self._piece_start
        if part.closes:
            self._piece_start = self._thought_chars
        if not part.text and part.point is None:
            return b""
        said: Json = {"text": part.text, "points": []}
        if part.point is not None:  # of what was said since the last mark
            said |= {"points": [list(part.point)], "start_idx": start, "end_idx": self._thought_chars}
        chunk = {"chunk": "", "completed": False, "token_index": token_index, "reasoning": said}
        return b"data: " + _encode(chunk) + b"\n\n"

    def found(self, index: int, found: SpatialObject) -> bytes:
        """One object, in the shape of the whole answer's."""
        self._objects.append(found)
        chunk = {"chunk": "", "completed": False, self._name: [self._shape(found)]}
        return b"data: " + _encode(chunk) + b"\n\n"

    def end(self, index: int, end: End) -> bytes:
        """The chunk with everything."""
        last = {
            "chunk": "",
            "completed": True,
            **self._whole("".join(self._texts), self._objects, end, self._thoughts),
        }
        return b"data: " + _encode(last) + b"\n\n"

    def closing(self, ends: Sequence[End]) -> bytes:
        """Empty: the last chunk said `completed`, and these routes have no end mark."""
        return b""

    # ------------------------------------------------------------ the whole answer

    def answer(self, choices: Sequence[Collected]) -> Json:
        """The answer of a request that does not stream."""
        choice = choices[0]
        assert choice.end is not None
        return self._whole(choice.text, choice.objects, choice.end, choice.thoughts)

    def _whole(
        self, text: str, objects: list[SpatialObject], end: End, thoughts: Sequence[ThoughtPart]
    ) -> Json:
        said: object = text
        if self._name in ("objects", "points"):
            said = [self._shape(found) for found in objects]
        return {
            "request_id": self._request_id,
            self._name: said,
            **({"reasoning": reasoning_object(thoughts)} if self.requests[0].task == "reason" else {}),
            "finish_reason": end.reason.value,
            "metrics": metrics_object(end.usage),
        }

    def _shape(self, found: SpatialObject) -> Json:
        shape: Json = {"x": found.x, "y": found.y} if self._name == "points" else dict(found.box())
        return {**shape, "logprobs": found.scores()} if found.logprobs else shape


async def prepare_query(core: Core, data: bytes, *, request_id: str, tenant: str) -> Answer:
    """`/v1/query`. Raises `RequestError`."""
    body = decode_body(_decode_query, data)
    refuse_setting(body, "max_objects")
    checked = await check_task(core, body, tenant)
    model = checked.model
    refs, values = place_refs(model.card, "query", body.spatial_refs or ())
    if refs and body.image_url is None:
        raise invalid("places are in a picture; give one as image_url", "spatial_refs")
    argument = [*refs, *await model.encode(body.question.strip())]
    suffix = "reasoning_suffix" if body.reasoning else None
    if suffix is not None and "reasoning_close" not in model.card.templates:
        message = f"reasoning: model {model.card.model_id} does not reason before it answers; leave it out"
        raise RequestError(ErrorCode.UNSUPPORTED, message, param="reasoning")
    ids = task_prompt(model.card, "query", argument, suffix=suffix)
    prompt = Prompt(ids, strip_start=True, values=values)
    if body.image_url is not None:
        prompt.images.append(await core.prepare_image(model, body.image_url, param="image_url"))
    task = "reason" if body.reasoning else "text"
    return _answer("answer", checked, body, prompt, request_id, task=task)


async def prepare_caption(core: Core, data: bytes, *, request_id: str, tenant: str) -> Answer:
    """`/v1/caption`. Raises `RequestError`."""
    body = decode_body(_decode_caption, data)
    refuse_setting(body, "max_objects")
    checked = await check_task(core, body, tenant)
    card = checked.model.card
    if f"caption_{body.length}" not in card.templates:
        offered = [name.removeprefix("caption_") for name in card.templates if name.startswith("caption_")]
        can = f"no captions; what it can do is {', '.join(card.capabilities)}"
        message = f"length: model {card.model_id} offers {', '.join(offered) or can}"
        raise RequestError(ErrorCode.UNSUPPORTED, message, param="length")
    ids = task_prompt(card, f"caption_{body.length}")
    image = await core.prepare_image(checked.model, body.image_url, param="image_url")
    return _answer("caption", checked, body, Prompt(ids, [image], strip_start=True), request_id)


async def prepare_detect(core: Core, data: bytes, *, request_id: str, tenant: str) -> Answer:
    """`/v1/detect`. Raises `RequestError`."""
    return await _prepare_spatial(core, data, "detect", "objects", request_id, tenant)


async def prepare_point(core: Core, data: bytes, *, request_id: str, tenant: str) -> Answer:
    """`/v1/point`. Raises `RequestError`."""
    return await _prepare_spatial(core, data, "point", "points", request_id, tenant)


async def _prepare_spatial(
    core: Core, data: bytes, task: str, name: str, request_id: str, tenant: str
) -> Answer:
    body = decode_body(_decode_object, data)
    refuse_setting(body, "max_tokens")
    checked = await check_task(core, body, tenant)
    model = checked.model
    if task != "point" and body.spatial_refs is not None:
        message = (
            f"spatial_refs: they go with /v1/query, /v1/point and /v1/segment, not with {task}; leave it out"
        )
        raise RequestError(ErrorCode.UNSUPPORTED, message, param="spatial_refs")
    refs, values = place_refs(model.card, task, body.spatial_refs or ())
    ids = task_prompt(model.card, task, [*refs, *await model.encode(" " + body.object.strip())])
    image = await core.prepare_image(model, body.image_url, param="image_url")
    max_objects = body.settings.max_objects if body.settings is not None else None
    objects = Objects(task, max_objects, wants_logprobs=bool(body.logprobs))
    return _answer(name, checked, body, Prompt(ids, [image], values=values), request_id, objects)


def refuse_setting(body: TaskBody, name: str) -> None:
    """Raises `RequestError` for a setting that this route has no use for."""
    if body.settings is not None and getattr(body.settings, name) is not None:
        other = (
            "answers are as long as max_objects says"
            if name == "max_tokens"
            else "it goes with detect and point"
        )
        param = f"settings.{name}"
        raise RequestError(ErrorCode.UNSUPPORTED, f"{param} is not used here: {other}", param=param)


async def check_task(core: Core, body: TaskBody, tenant: str) -> CheckedFields:
    """Check the model and the settings, cheapest checks first. Raises `RequestError`."""
    settings = body.settings or Settings()
    fields = SamplingFields(temperature=settings.temperature, top_p=settings.top_p, seed=settings.seed)
    return await check_fields(core, core.model(body.model), fields, tenant=tenant)


def _answer(
    name: str,
    checked: CheckedFields,
    body: TaskBody,
    prompt: Prompt,
    request_id: str,
    objects: Objects | None = None,
    task: str = "text",
) -> Answer:
    # How long a list of coordinates may be follows from `max_objects`.
    asked = body.settings.max_tokens if body.settings is not None and objects is None else None
    length = Length(asked, "settings.max_tokens")
    (request,) = make_requests(checked, request_id, [prompt], length, objects, task=task)
    return Answer(request_id, name, request, bool(body.stream))
