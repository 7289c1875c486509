"""Owns `/v1/models`: which models answer here. No sockets; runs on the gateway's loop."""

from __future__ import annotations

from gateway.api.parameters import Json
from gateway.generation import Core, ServedModel


def list_models(core: Core) -> Json:
    """OpenAI's list; extra fields say what a model can do."""
    return {"object": "list", "data": [model_object(model) for model in core.models()]}


def model_object(model: ServedModel) -> Json:
    """One entry."""
    card = model.card
    return {
        "id": card.model_id,
        "object": "model",
        "created": card.created,
        "owned_by": card.owned_by,
        "family": card.family,
        "description": card.description,
        "context_tokens": card.context_tokens,
        "capabilities": card.capabilities,
        "takes_images": card.image is not None,
        "max_images": card.image.max_images if card.image is not None else 0,
        "max_frames": card.image.clip.max_frames
        if card.image is not None and card.image.clip is not None
        else 0,
        "thinking": _thinking(model),
        "chat_templates": model.template_names,
        "defaults": {
            "temperature": card.default_temperature,
            "top_p": card.default_top_p,
            "top_k": card.default_top_k,
            "max_tokens": card.default_max_tokens,
        },
    }


def _thinking(model: ServedModel) -> str:
    """Whether the model thinks before it answers: never, always, or as it is asked to."""
    if "reasoning_close" in model.card.templates:
        return "optional"
    habits = model.chat_format
    if habits is None or habits.thinking is None:
        return "none"
    return "optional" if habits.can_skip_thinking else "always"
