"""Owns `/v1/segment`: the outline of what is named as an SVG path within its box. No sockets; runs on the gateway's loop.

Answer and events are those of Moondream's hosted route, as its Python client reads them. Its paths are refined by a second model
of theirs afterwards; here the last event repeats the path as it was decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from gateway.api.answers import Collected, EventShape, metrics_object
from gateway.api.moondream import Argument, TaskBody, check_task, refuse_setting
from gateway.api.parameters import Json, decode_body
from gateway.api.prompts import Prompt, task_prompt
from gateway.api.requests import Length, make_requests
from gateway.api.spatial_refs import SpatialRefs, place_refs
from gateway.generation import Core, Delta, End, GenerateRequest, SpatialObject

USUAL_TOKENS: Final = 2048
"""Of an outline, where the body says nothing and as many fit: some seven a command."""

_encode = msgspec.json.encode


class SegmentBody(TaskBody, kw_only=True):
    """`/v1/segment`."""

    image_url: str
    object: Argument
    spatial_refs: SpatialRefs | None = None


_decode = msgspec.json.Decoder(SegmentBody).decode


class SegmentAnswer(EventShape):
    """One prepared request."""

    def __init__(self, request_id: str, request: GenerateRequest, stream: bool) -> None:
        self.requests = [request]
        self.stream = stream
        self._request_id = request_id
        self._texts: list[str] = []
        self._boxes: list[SpatialObject] = []

    # ------------------------------------------------------------ the stream, see `transport.sse.Shape`

    def opening(self) -> bytes:
        """Nothing comes before the box."""
        return b""

    def found(self, index: int, found: SpatialObject) -> bytes:
        """The box."""
        self._boxes.append(found)
        return _event({"type": "bbox", "bbox": found.box()})

    def delta(self, index: int, delta: Delta) -> bytes:
        """A command of the path with its numbers."""
        self._texts.append(delta.text)
        said = {"chunk": delta.text, "completed": False, "token_index": delta.token_index}
        return _event({"type": "path_delta", **said})

    def end(self, index: int, end: End) -> bytes:
        """The event with everything."""
        whole = self._whole("".join(self._texts), self._boxes, end)
        return _event({"type": "final", "completed": True, **whole})

    def closing(self, ends: Sequence[End]) -> bytes:
        """Empty: the last event said `completed`."""
        return b""

    # ------------------------------------------------------------ the whole answer

    def answer(self, choices: Sequence[Collected]) -> Json:
        """The answer of a request that does not stream."""
        choice = choices[0]
        assert choice.end is not None
        return self._whole(choice.text, choice.objects, choice.end)

    def _whole(self, path: str, boxes: Sequence[SpatialObject], end: End) -> Json:
        return {
            "request_id": self._request_id,
            "path": path,
            "bbox": dict(boxes[0].box()) if boxes else None,
            "finish_reason": end.reason.value,
            "metrics": metrics_object(end.usage),
        }


async def prepare_segment(core: Core, data: bytes, *, request_id: str, tenant: str) -> SegmentAnswer:
    """`/v1/segment`. Raises `RequestError`."""
    body = decode_body(_decode, data)
    refuse_setting(body, "max_objects")
    checked = await check_task(core, body, tenant)
    model = checked.model
    refs, values = place_refs(model.card, "segment", body.spatial_refs or ())
    # Its name stands there without the space that detect and point put in front of it: so the model was trained.
    ids = task_prompt(model.card, "segment", [*refs, *await model.encode(body.object.strip())])
    image = await core.prepare_image(model, body.image_url, param="image_url")
    asked = body.settings.max_tokens if body.settings is not None else None
    length = Length(asked, "settings.max_tokens", min(USUAL_TOKENS, model.card.context_tokens))
    prompt = Prompt(ids, [image], values=values)
    (request,) = make_requests(checked, request_id, [prompt], length, task="segment")
    return SegmentAnswer(request_id, request, bool(body.stream))


def _event(data: Json) -> bytes:
    return b"data: " + _encode(data) + b"\n\n"
