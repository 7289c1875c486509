"""Owns decoding untrusted pictures: a process of its own with bounded memory, reading jobs from stdin.

Started by `gateway.confined.images` as `python -m gateway.confined.image_process <memory bytes>`; it holds no sockets and no
secrets, and is killed when a job takes too long. A job is a `Job` and the body of a data URL; its answer an
`Answer` and pixels.
"""

from __future__ import annotations

import hashlib
import math
from typing import BinaryIO, Final

import msgspec
from PIL import Image

from gateway.confined import data_urls
from gateway.confined.pictures.decode import LARGE_PIXELS, Decoded, decode_for, start
from gateway.confined.pictures.essence import NoPicture, Refused
from shared.confined import read, run_confined, write
from shared.pictures import Box, Drawing, drawings, refusal_of
from shared.protocol import ImageSpec, Sheet

# How much larger than its target a picture stays along each axis: reduced by a JPEG's decoder, and by averages.
_SPARE: Final = 1.5
_SPARE_OF_AVERAGES: Final = 2.0
_FILTERS: Final = {
    name.lower(): Image.Resampling[name] for name in ("LANCZOS", "BICUBIC", "BILINEAR", "NEAREST")
}


class Job(msgspec.Struct, array_like=True):
    """Followed by the body of a data URL."""

    spec: ImageSpec
    max_pixels: int
    min_side: int
    max_bytes: int = 1 << 30
    is_base64: bool = True


class Answer(msgspec.Struct, array_like=True):
    """Followed by the pixels of all sheets, one after another, unless `error` says why there are none."""

    error: str = ""
    too_large: bool = False
    sheets: list[Sheet] = []
    digest: bytes = b""


def unpack(body: bytes, job: Job) -> bytes:
    """The file in the body of a data URL. Raises `Refused`."""
    try:
        data = data_urls.unpack(body, is_base64=job.is_base64)
    except data_urls.NotADataUrl as error:
        raise Refused(str(error)) from None
    if len(data) > job.max_bytes:
        raise Refused(f"a picture's file may have at most {job.max_bytes} bytes", too_large=True)
    return data


def prepare(data: bytes, job: Job) -> tuple[Answer, list[bytes]]:
    """Decode one file and resize it to the sheets that the model wants. Raises `Refused`.

    Every sheet is resized from the whole picture, in as many steps as its drawing has. From a megapixel on, a size that is
    far beyond theirs is averaged away before: pixels are then within 1.5 levels of 255 of that on average, 99 of 100 within 8.
    """

    def enough(width: int, height: int) -> tuple[int, int]:
        wide = high = 1.0
        for drawing in drawings(job.spec, width, height):
            left, top, right, bottom = drawing.box or (0, 0, width, height)
            wide = max(wide, drawing.sizes[0][0] * width / (right - left))
            high = max(high, drawing.sizes[0][1] * height / (bottom - top))
        return math.ceil(_SPARE * wide), math.ceil(_SPARE * high)

    decoded = decode_for(data, max_pixels=job.max_pixels, min_side=job.min_side, wanted=enough)
    refusal = refusal_of(job.spec, decoded.width, decoded.height)
    if refusal:
        raise Refused(refusal)
    made = drawings(job.spec, decoded.width, decoded.height)
    if job.spec.resample not in _FILTERS:
        raise Refused(f"this gateway does not know the filter {job.spec.resample!r}")
    easel = _Easel(decoded, _FILTERS[job.spec.resample])
    frames = [easel.draw(drawing).tobytes() for drawing in made]
    digest = hashlib.sha256()
    for drawing, frame in zip(made, frames, strict=True):
        # Sizes as well: of a picture of one colour the bytes are the same lying and standing.
        digest.update(msgspec.msgpack.encode(drawing.sheet))
        digest.update(frame)
    return Answer(sheets=[drawing.sheet for drawing in made], digest=digest.digest()), frames


class _Easel:
    """One decoded picture, resized again and again; each step once."""

    def __init__(self, decoded: Decoded, resample: Image.Resampling) -> None:
        self._decoded = decoded
        self._filter = resample
        self._gap = _SPARE_OF_AVERAGES if decoded.width * decoded.height >= LARGE_PIXELS else None
        self._made: dict[tuple[object, ...], Image.Image] = {}

    def draw(self, drawing: Drawing) -> Image.Image:
        """The sheet's pixels."""
        image, box = self._part(drawing.box)
        for number, size in enumerate(drawing.sizes, 1):
            key = (drawing.box, *drawing.sizes[:number])
            if key not in self._made:
                self._made[key] = image.resize(size, self._filter, box, self._gap)
            image, box = self._made[key], None
        return image

    def _part(self, box: Box | None) -> tuple[Image.Image, tuple[float, float, float, float] | None]:
        """The picture's pixels, or those of a part of it, and where in the image they lie."""
        decoded = self._decoded
        if box is None:
            return decoded.image, decoded.box
        left, top, right, bottom = decoded.box
        if (right - left, bottom - top) == (decoded.width, decoded.height) and left == top == 0:
            return decoded.image.crop(box), None  # with nothing of its surroundings
        across, down = (right - left) / decoded.width, (bottom - top) / decoded.height
        part = (left + box[0] * across, top + box[1] * down, left + box[2] * across, top + box[3] * down)
        return decoded.image, part


def serve(stdin: BinaryIO, stdout: BinaryIO) -> None:
    """Answer jobs until stdin ends."""
    start()
    decode_job = msgspec.msgpack.Decoder(Job).decode
    while message := read(stdin):
        job, data = decode_job(message[0]), message[1]
        try:
            answer, frames = prepare(unpack(data, job), job)
        except NoPicture as refused:
            spelling = "its base64 undone" if job.is_base64 else "as the data URL does not say ;base64"
            answer, frames = Answer(f"{refused}, {spelling}"), []
        except Refused as refused:
            answer, frames = Answer(str(refused), refused.too_large), []
        except MemoryError:
            answer, frames = Answer("preparing the picture takes more memory than allowed", True), []
        write(stdout, msgspec.msgpack.encode(answer), *frames)


if __name__ == "__main__":
    run_confined(serve)
