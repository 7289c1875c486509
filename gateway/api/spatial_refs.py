"""Owns places in a picture that a question is about: points and boxes as ids and values of a prompt. Pure; gateway's loop.

As Moondream's code has it (`moondream/torch/region.py`, `encode_spatial_refs`): a point is two coordinates, a box the two of its
centre and a size, between the task's prefix and its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta

from gateway.api.parameters import invalid
from gateway.generation import RequestError
from shared.errors import ErrorCode
from shared.protocol import ModelCard, PromptValue

MAX_REFS = 100

Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
SpatialRef = Annotated[list[Fraction], Meta(min_length=2, max_length=4)]
SpatialRefs = Annotated[list[SpatialRef], Meta(max_length=MAX_REFS)]


def place_refs(
    card: ModelCard, task: str, refs: Sequence[Sequence[float]]
) -> tuple[list[int], list[PromptValue]]:
    """Points [x, y] and boxes [x_min, y_min, x_max, y_max] in fractions of the picture → the ids that stand for them behind the
    task's prefix, and their values at their places among the prompt's ids.

    Raises `RequestError` naming the one at fault, or UNSUPPORTED where the model has no region encoder.
    """
    if not refs:
        return [], []
    if "point" not in card.capabilities:
        message = f"spatial_refs: model {card.model_id} reads no places in a picture; leave it out"
        raise RequestError(ErrorCode.UNSUPPORTED, message, param="spatial_refs")
    spelled: list[tuple[int, list[float]]] = []
    for index, ref in enumerate(refs):
        x, y, *size = _centred(ref, f"spatial_refs[{index}]")
        spelled += [(card.coord_id, [x]), (card.coord_id, [y])]
        if size:
            spelled.append((card.size_id, size))
    first = (card.bos_id is not None) + len(card.templates.get(f"{task}_prefix", ()))
    ids = [token_id for token_id, _ in spelled]
    return ids, [PromptValue(first + place, values) for place, (_, values) in enumerate(spelled)]


def _centred(ref: Sequence[float], param: str) -> list[float]:
    if len(ref) == 2:
        return list(ref)
    if len(ref) != 4:
        raise invalid("a point has two numbers, x and y, and a box four: x_min, y_min, x_max, y_max", param)
    x_min, y_min, x_max, y_max = ref
    if x_min > x_max or y_min > y_max:
        raise invalid("a box is x_min, y_min, x_max, y_max, and no maximum lies below its minimum", param)
    return [(x_min + x_max) / 2, (y_min + y_max) / 2, x_max - x_min, y_max - y_min]
