"""Owns what Ollama's clients ask about models: `/api/tags`, `/api/ps`, `/api/show`, `/api/version`. Gateway's loop."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import msgspec

from gateway.api.fields import Known
from gateway.api.parameters import Json, decode_body
from gateway.generation import Core, RequestError, ServedModel
from shared.errors import ErrorCode

INTERFACE: Final = "0.12.6"
"""The version of Ollama whose interface this follows: clients ask for it to find out what they may send."""

REFUSED: Final = (
    "pull",
    "push",
    "create",
    "copy",
    "delete",
    "blobs/{digest}",
    "embed",
    "embeddings",
)
"""Routes that manage or embed."""


class ShowBody(Known, kw_only=True):
    """`/api/show`."""

    IGNORED = ("verbose", "options", "system", "template")

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None
    options: Json | None = None
    system: str | None = None
    template: str | None = None


_decode_show = msgspec.json.Decoder(ShowBody).decode


def version() -> Json:
    """`/api/version`."""
    return {"version": INTERFACE}


def tags(core: Core) -> Json:
    """`/api/tags`: what is served."""
    return {"models": [_entry(model) for model in core.models()]}


def running(core: Core) -> Json:
    """`/api/ps`: the same models, since all that are served are loaded."""
    forever = datetime.max.replace(tzinfo=UTC).isoformat()
    return {"models": [{**_entry(model), "expires_at": forever, "size_vram": 0} for model in core.models()]}


async def show(core: Core, data: bytes) -> Json:
    """`/api/show`. Raises `RequestError`."""
    body = decode_body(_decode_show, data)
    model = core.model(body.model or body.name)
    card, family = model.card, model.card.family
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": _details(model),
        "model_info": {
            "general.architecture": family,
            "general.basename": card.model_id,
            f"{family}.context_length": card.context_tokens,
            f"{family}.vocab_size": card.vocab_size,
        },
        "capabilities": capabilities(model),
        "modified_at": _created(model),
    }


def refusal(what: str) -> RequestError:
    """For a route that manages models."""
    name = what.partition("/")[0]
    if name.startswith("embed"):
        return RequestError(ErrorCode.UNSUPPORTED, f"/api/{name}: no model here makes embeddings")
    message = f"/api/{name}: models are not managed over HTTP here; the operator starts `degas serve MODEL`"
    return RequestError(ErrorCode.UNSUPPORTED, message)


def capabilities(model: ServedModel) -> list[str]:
    """In Ollama's words."""
    format = model.chat_format
    found = ["completion"]
    if model.card.image is not None:
        found.append("vision")
    if format is not None:
        found.append("tools")
        if format.thinking is not None:
            found.append("thinking")
    return found


def _entry(model: ServedModel) -> Json:
    card = model.card
    return {
        "name": card.model_id,
        "model": card.model_id,
        "modified_at": _created(model),
        "size": card.weight_bytes,  # as the worker holds them; the file's may differ
        "digest": "",
        "details": _details(model),
    }


def _details(model: ServedModel) -> Json:
    family = model.card.family
    return {
        "parent_model": "",
        "format": "",
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": "",
    }


def _created(model: ServedModel) -> str:
    return datetime.fromtimestamp(model.card.created, UTC).isoformat()
