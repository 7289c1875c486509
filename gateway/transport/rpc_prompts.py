"""Owns the prompt of a gRPC `GenerateRequest`: token ids or text, and the pictures in it. Runs on the gateway's loop; no sockets.

`text` is a question and goes through the model's own template where it has one (Moondream); to any other model it is the prompt
to the letter. Token ids are taken as they are. Pictures are `data:` URLs in `media_refs`, in the order in which the prompt has
their places: a model whose chat template writes a placeholder for each needs one of those for every picture, in either form of
prompt (the schema's "unexpanded placeholder anchor").
"""

from __future__ import annotations

from collections.abc import Sequence

from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from gateway.api.parameters import invalid, renamed
from gateway.api.pictures import expansions, place_pictures, prepare_pictures, takes_several
from gateway.api.prompts import Prompt, takes_questions
from gateway.api.query_turns import QueryTurn, compose_turns
from gateway.generation import Core, PreparedImage, RequestError, ServedModel, no_pictures
from shared.errors import ErrorCode

_IDS = "tokenized.input_ids"


async def read_prompt(core: Core, model: ServedModel, request: pb.GenerateRequest) -> Prompt:
    """Raises `RequestError` naming the field at fault."""
    pictures = _pictures(request)
    if request.WhichOneof("input") == "tokenized":
        return await _of_ids(core, model, _ids(model, request), pictures)
    text = request.text
    if not text.strip():
        raise RequestError(ErrorCode.INVALID_REQUEST, "neither tokenized nor text was given", param="text")
    if len(text) > core.config.max_prompt_chars:
        message = f"text is longer than {core.config.max_prompt_chars} characters"
        raise RequestError(ErrorCode.PAYLOAD_TOO_LARGE, message, param="text")
    if takes_questions(model.card):
        ids, images = await compose_turns(core, model, [QueryTurn("user", text, len(pictures))], pictures)
        return Prompt(ids, images)
    return await _of_text(core, model, text, pictures)


def _ids(model: ServedModel, request: pb.GenerateRequest) -> list[int]:
    ids = list(request.tokenized.input_ids)
    if not ids:
        raise RequestError(ErrorCode.INVALID_REQUEST, "no token ids were given", param=_IDS)
    if max(ids) >= model.card.vocab_size:
        message = f"token ids are between 0 and {model.card.vocab_size - 1}"
        raise RequestError(ErrorCode.INVALID_REQUEST, message, param=_IDS)
    return ids


def _pictures(request: pb.GenerateRequest) -> list[tuple[str, str]]:
    """The URL and the field's name of each picture."""
    found = []
    for index, item in enumerate(request.media_refs.items):
        if item.modality not in (common_pb2.IMAGE, common_pb2.MODALITY_UNSPECIFIED):
            param = f"media_refs.items[{index}].modality"
            raise RequestError(ErrorCode.UNSUPPORTED, "only pictures are supported", param=param)
        found.append((item.url, f"media_refs.items[{index}].url"))
    return found


async def _of_ids(
    core: Core, model: ServedModel, ids: list[int], pictures: Sequence[tuple[str, str]]
) -> Prompt:
    card = model.card
    if not pictures:
        return Prompt(ids)
    if card.image is None:
        raise no_pictures(card, pictures[-1][1])
    if takes_several(card):
        return await _with_anchors(core, model, ids, pictures)
    if len(pictures) > 1:
        message = f"model {card.model_id} has no mark for a picture's place among token ids; send the question as text"
        raise RequestError(ErrorCode.UNSUPPORTED, message, param="media_refs.items[1]")
    if card.bos_id is not None and ids[0] != card.bos_id:
        message = f"the prompt of a picture starts with {card.bos_id}, the picture follows it"
        raise RequestError(ErrorCode.INVALID_REQUEST, message, param=_IDS)
    (url, param) = pictures[0]
    return Prompt(ids, [await core.prepare_image(model, url, param=param)])


async def _with_anchors(
    core: Core, model: ServedModel, ids: list[int], pictures: Sequence[tuple[str, str]]
) -> Prompt:
    """Each picture's placeholder among the ids becomes what the model was trained on."""
    spec = model.card.image
    assert spec is not None
    anchor = await model.encode(spec.layout.placeholder, parse_special=True)
    pieces = _split(ids, anchor)
    _check_places(model, len(pieces) - 1, len(pictures), _IDS)
    images = await prepare_pictures(core, model, pictures)
    written: list[int] = list(pieces[0])
    for text, piece in zip(expansions(model.card, images), pieces[1:], strict=True):
        written += await model.encode(text, parse_special=True)
        written += piece
    return _placed(model, written, images, _IDS)


async def _of_text(core: Core, model: ServedModel, text: str, pictures: Sequence[tuple[str, str]]) -> Prompt:
    """As in `/v1/completions`: the text to the letter, with special tokens' names in it as those tokens."""
    images: list[PreparedImage] = []
    if pictures:
        card = model.card
        if card.image is None or not takes_several(card):
            raise no_pictures(card, pictures[-1][1])
        pieces = text.split(card.image.layout.placeholder)
        _check_places(model, len(pieces) - 1, len(pictures), "text")
        images = await prepare_pictures(core, model, pictures)
        # Before tokenising, since marks and line ends may join with the text around them.
        shown = [*expansions(card, images), ""]
        text = "".join(piece + own for piece, own in zip(pieces, shown, strict=True))
    ids = [*model.start_ids, *await model.encode(text, parse_special=True)]
    return _placed(model, ids, images, "text")


def _check_places(model: ServedModel, num_places: int, num_pictures: int, param: str) -> None:
    if num_places != num_pictures:
        spec = model.card.image
        assert spec is not None
        message = (
            f"{num_pictures} pictures and {num_places} places for them: each has one {spec.layout.placeholder} in the prompt, "
            "in the order of media_refs"
        )
        raise invalid(message, param)


def _placed(model: ServedModel, ids: list[int], images: Sequence[PreparedImage], param: str) -> Prompt:
    try:
        kept, placed = place_pictures(model, ids, images)
    except RequestError as error:
        raise renamed(error, param) from None
    return Prompt(kept, placed)


def _split(ids: Sequence[int], mark: Sequence[int]) -> list[list[int]]:
    """Ids between occurrences of `mark`; at least one piece."""
    pieces: list[list[int]] = [[]]
    at = 0
    while at < len(ids):
        if mark and list(ids[at : at + len(mark)]) == list(mark):
            pieces.append([])
            at += len(mark)
        else:
            pieces[-1].append(ids[at])
            at += 1
    return pieces
