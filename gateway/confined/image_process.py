"""Owns decoding untrusted pictures: a process of its own with bounded memory, reading jobs from stdin.

Started by `gateway.confined.images` as `python -m gateway.confined.image_process <memory bytes>`; it holds no sockets and no
secrets, and is killed when a job takes too long. A job is a `Job` and the body of a data URL; its answer an
`Answer` and pixels.
"""

from __future__ import annotations

import hashlib
from typing import BinaryIO

import msgspec
from PIL import Image

from gateway.confined import data_urls
from gateway.confined.pictures.decode import decode, start
from gateway.confined.pictures.essence import NoPicture, Refused
from shared.confined import read, run_confined, write
from shared.protocol import ImageSpec
from shared.tiling import canvas_for


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
    """Decode one file and cut it to what the model wants. Raises `Refused`."""
    image = decode(data, max_pixels=job.max_pixels, min_side=job.min_side)
    spec = job.spec
    tiles_h, tiles_w, height, width = canvas_for(
        image.height,
        image.width,
        crop_size=spec.crop_size,
        patch_size=spec.patch_size,
        margin_patches=spec.margin_patches,
        max_crops=spec.max_crops,
    )
    crop = image.resize((spec.crop_size, spec.crop_size), Image.Resampling.LANCZOS).tobytes()
    if (height, width) == (spec.crop_size, spec.crop_size):
        canvas = crop
    else:
        canvas = image.resize((width, height), Image.Resampling.LANCZOS).tobytes()
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
