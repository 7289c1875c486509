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
from shared.protocol import ImageSpec
from shared.tiling import Canvas, canvas_for

# How much larger than its target a picture stays along each axis: reduced by a JPEG's decoder, and by averages.
_SPARE: Final = 1.5
_SPARE_OF_AVERAGES: Final = 2.0


class Job(msgspec.Struct, array_like=True):
    """Followed by the body of a data URL."""

    spec: ImageSpec
    max_pixels: int
    min_side: int
    max_bytes: int = 1 << 30
    is_base64: bool = True


class Answer(msgspec.Struct, array_like=True):
    """Followed by the global crop and the canvas, unless `error` says why there are none."""

    error: str = ""
    too_large: bool = False
    global_bytes: int = 0
    tiles_h: int = 0
    tiles_w: int = 0
    canvas_height: int = 0
    canvas_width: int = 0
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


def prepare(data: bytes, job: Job) -> tuple[Answer, bytes, bytes]:
    """Decode one file and cut it to what the model wants. Raises `Refused`.

    Both pictures are Lanczos of the whole one. From a megapixel on, a size that is far beyond theirs is averaged away
    before: pixels are then within 1.5 levels of 255 of that on average, 99 of 100 within 8.
    """
    spec = job.spec

    def canvas_of(width: int, height: int) -> Canvas:
        return canvas_for(
            height,
            width,
            crop_size=spec.crop_size,
            patch_size=spec.patch_size,
            margin_patches=spec.margin_patches,
            max_crops=spec.max_crops,
        )

    def enough(width: int, height: int) -> tuple[int, int]:
        canvas = canvas_of(width, height)
        wide, high = max(canvas.width, spec.crop_size), max(canvas.height, spec.crop_size)
        return math.ceil(_SPARE * wide), math.ceil(_SPARE * high)

    decoded = decode_for(data, max_pixels=job.max_pixels, min_side=job.min_side, wanted=enough)
    tiles_h, tiles_w, height, width = canvas_of(decoded.width, decoded.height)
    crop = _resize(decoded, spec.crop_size, spec.crop_size)
    canvas = crop if (height, width) == (spec.crop_size, spec.crop_size) else _resize(decoded, width, height)
    digest = hashlib.sha256(crop)
    digest.update(canvas)
    answer = Answer(
        global_bytes=len(crop),
        tiles_h=tiles_h,
        tiles_w=tiles_w,
        canvas_height=height,
        canvas_width=width,
        digest=digest.digest(),
    )
    return answer, crop, canvas


def _resize(decoded: Decoded, width: int, height: int) -> bytes:
    gap = _SPARE_OF_AVERAGES if decoded.width * decoded.height >= LARGE_PIXELS else None
    image = decoded.image
    return image.resize((width, height), Image.Resampling.LANCZOS, decoded.box, gap).tobytes()


def serve(stdin: BinaryIO, stdout: BinaryIO) -> None:
    """Answer jobs until stdin ends."""
    start()
    decode_job = msgspec.msgpack.Decoder(Job).decode
    while message := read(stdin):
        job, data = decode_job(message[0]), message[1]
        try:
            answer, crop, canvas = prepare(unpack(data, job), job)
        except NoPicture as refused:
            spelling = "its base64 undone" if job.is_base64 else "as the data URL does not say ;base64"
            answer, crop, canvas = Answer(f"{refused}, {spelling}"), b"", b""
        except Refused as refused:
            answer, crop, canvas = Answer(str(refused), refused.too_large), b"", b""
        except MemoryError:
            answer = Answer("preparing the picture takes more memory than allowed", True)
            crop = canvas = b""
        write(stdout, msgspec.msgpack.encode(answer), crop, canvas)


if __name__ == "__main__":
    run_confined(serve)
