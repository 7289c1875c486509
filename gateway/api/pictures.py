"""Owns the pictures of a conversation: prepared all at once, and put into the prompt. No sockets; gateway's loop.

A chat template writes a placeholder for each picture, in the order of the messages' parts. The text that the model was
trained on takes its place before tokenising, and every run of positions is bound to its picture after that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import msgspec

from gateway.generation import Core, PreparedImage, RequestError, ServedModel, Shown
from shared.errors import ErrorCode
from shared.pictures import check_bounds, expansion, take_runs
from shared.protocol import ModelCard


def takes_several(card: ModelCard) -> bool:
    """Whether the model's chat template has places for pictures, so that a conversation may have several."""
    return card.image is not None and bool(card.image.layout.placeholder)


async def prepare_pictures(
    core: Core, model: ServedModel, pictures: Sequence[tuple[str, str]]
) -> list[PreparedImage]:
    """Each (URL, its field's name), decoded and resized side by side, in order.

    Raises `RequestError` of the first that is refused, or UNSUPPORTED and PAYLOAD_TOO_LARGE naming the model's bound.
    """
    spec = model.card.image
    assert spec is not None
    if len(pictures) > spec.max_images:
        message = (
            f"{len(pictures)} pictures; model {model.card.model_id} takes at most {spec.max_images} a request"
        )
        raise RequestError(ErrorCode.UNSUPPORTED, message, param=pictures[spec.max_images][1])
    prepared = await asyncio.gather(
        *(core.prepare_image(model, url, param=param) for url, param in pictures), return_exceptions=True
    )
    images: list[PreparedImage] = []
    for one in prepared:
        if isinstance(one, BaseException):
            raise one
        images.append(one)
    fault = check_bounds(spec, [image.spec for image in images])
    if fault:
        raise RequestError(ErrorCode.PAYLOAD_TOO_LARGE, fault, param=pictures[-1][1])
    return images


def placed_before(image: PreparedImage, index: int) -> PreparedImage:
    """The picture with all its positions in one run before this index of the prompt's ids."""
    return replace(image, spec=msgspec.structs.replace(image.spec, runs=[(index, image.num_tokens)]))


def shown_of(card: ModelCard, image: PreparedImage) -> Shown:
    """What stands for a picture in the prompt's text, and the placeholder in whose place."""
    assert card.image is not None
    return Shown(card.image.layout.placeholder, expansion(card.image, image.spec.sheets))


def expansions(card: ModelCard, images: Sequence[PreparedImage]) -> list[str]:
    """What stands for each picture in the prompt's text."""
    if card.image is None:
        return []
    return [expansion(card.image, image.spec.sheets) for image in images]


def place_pictures(
    model: ServedModel, ids: list[int], images: Sequence[PreparedImage]
) -> tuple[list[int], list[PreparedImage]]:
    """Ids that were rendered with `expansions` → the ids without the pictures' positions, and the pictures with theirs.

    Raises `RequestError` INVALID_REQUEST if the prompt has not exactly the places that the pictures need.
    """
    if not images:
        return ids, []
    spec = model.card.image
    assert spec is not None
    run_id = model.special_id(spec.layout.run)
    if run_id is None:
        message = f"the tokenizer of {model.card.model_id} has no special token {spec.layout.run!r}, so it takes no pictures"
        raise RequestError(ErrorCode.UNSUPPORTED, message, param="messages")
    try:
        kept, runs = take_runs(spec, ids, run_id, [image.spec.sheets for image in images])
    except ValueError as error:
        raise RequestError(ErrorCode.INVALID_REQUEST, str(error), param="messages") from None
    placed = [
        replace(image, spec=msgspec.structs.replace(image.spec, runs=own))
        for image, own in zip(images, runs, strict=True)
    ]
    return kept, placed
