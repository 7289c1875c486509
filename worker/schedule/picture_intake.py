"""Owns checking a request's pictures, as pixels or encoded elsewhere, and making `Picture`s of them. Pure; decode thread."""

from __future__ import annotations

from collections.abc import Sequence as Sequence_

from shared.clips import fault_of_input
from shared.errors import ErrorCode
from shared.pictures import (
    check_bounds,
    grid_of,
    num_bytes,
    num_loads,
    num_tokens,
    unit_tokens,
)
from shared.protocol import (
    ELEMENT_BYTES,
    Encode,
    FeatureFormat,
    FreeSize,
    ImageInput,
    ImageSpec,
    ModelCard,
    Submit,
)
from worker.schedule.refusal import Refusal
from worker.schedule.sequence import Picture, Run


def build_picture(message: Encode, frames: Sequence_[bytes], card: ModelCard) -> Picture:
    """The picture of a request for its features alone. Raises `Refusal` naming the field and what would fit."""
    spec = card.image
    if spec is None:
        raise Refusal(ErrorCode.UNSUPPORTED, "this model reads text only", "image")
    if fault := check_bounds(spec, [message.image]):
        raise Refusal(ErrorCode.UNSUPPORTED, fault, "image")
    check_picture(spec, message.image, frames)
    return picture_of(spec, message.image, (Run(0, num_tokens(spec, message.image.sheets), 0),), frames)


def picture_of(
    spec: ImageSpec,
    image: ImageInput,
    runs: tuple[Run, ...],
    frames: Sequence_[bytes],
    *,
    is_encoded: bool = False,
) -> Picture:
    """A picture that was checked. `is_encoded`: its one frame holds features."""
    return Picture(
        runs,
        image.sheets,
        () if is_encoded else frames,
        image.digest,
        unit_tokens=unit_tokens(spec),
        grid=grid_of(spec, image.sheets),
        loads=num_loads(spec, image.sheets),
        features=frames[0] if is_encoded else None,
        moment=image.moment,
        is_continued=image.is_continued,
    )


def check_picture(
    spec: ImageSpec,
    image: ImageInput,
    frames: Sequence_[bytes],
    encoded_as: FeatureFormat | None = None,
) -> None:
    """Raise `Refusal` unless sheets and runs are what the spec makes of a picture, with a frame of the right size for each
    sheet; or one frame with the features of all positions, if it comes encoded."""
    fault = fault_of_input(spec, image)
    wanted = num_tokens(spec, image.sheets)
    sizes = [num_bytes([sheet]) for sheet in image.sheets]
    if encoded_as is not None:
        sizes = [wanted * encoded_as.columns * ELEMENT_BYTES[encoded_as.dtype]]
    if not fault and [len(frame) for frame in frames] != sizes:
        fault = "a picture's frame has the wrong size"
    if not fault and sum(max(0, num) for _, num in image.runs) != wanted:
        fault = f"the runs of a picture have {wanted} positions together"
    if not fault and isinstance(spec.rule, FreeSize) and len(image.runs) != 1:
        fault = "a picture has one run here"
    if fault:
        raise Refusal(ErrorCode.INVALID_REQUEST, fault, "image")


def check_continued(pictures: Sequence_[Picture], context_tokens: int) -> None:
    """Raise `Refusal` unless each group of frames that goes on with a clip stands behind one of the same size, within the context."""
    for before, picture in zip([None, *pictures], pictures, strict=False):
        if picture.moment >= context_tokens:
            text = f"frames of a video lie {picture.moment} positions apart, and the context has {context_tokens}: send frames of a shorter time"
            raise Refusal(ErrorCode.CONTEXT_LENGTH_EXCEEDED, text, "image")
        if not picture.is_continued:
            continue
        if before is None or before.end != picture.position or before.grid != picture.grid:
            text = "a group of frames that goes on with a clip follows one of the same size"
            raise Refusal(ErrorCode.INVALID_REQUEST, text, "image")


def check_encoded(message: Submit, format: FeatureFormat | None) -> None:
    """Raise `Refusal` for encoded pictures that this worker cannot take: it takes those of its own `format` only."""
    if not message.encoded:
        return
    if not all(0 <= number < len(message.images) for number in message.encoded):
        text = f"encoded pictures are among 0 … {len(message.images) - 1}"
        raise Refusal(ErrorCode.INVALID_REQUEST, text, "encoded")
    if format is None:
        text = "this worker takes no encoded pictures; start it with the role decode, or send pixels"
        raise Refusal(ErrorCode.UNSUPPORTED, text, "encoded")
    if message.encoded_as != format:
        text = f"encoded pictures are {_words(message.encoded_as)}, and here {_words(format)}: the same model, dtype and "
        text += "quantize are needed at both"
        raise Refusal(ErrorCode.UNSUPPORTED, text, "encoded_as")


def _words(format: FeatureFormat | None) -> str:
    if format is None:
        return "of no format"
    return f"{format.columns} columns of {format.dtype} by the weights {format.weights[:8]}"
