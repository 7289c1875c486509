"""Owns decoding untrusted pictures: a process of its own with bounded memory, reading jobs from stdin.

Started by `gateway.confined.images` as `python -m gateway.confined.image_process <memory bytes>`; it holds no sockets and no
secrets, and is killed when a job takes too long. A job is a `Job` and the picture's file in base64; its answer an
`Answer` and pixels.
"""

from __future__ import annotations

import base64
import hashlib
import io
from typing import BinaryIO, Final

import msgspec
from PIL import Image, ImageOps, UnidentifiedImageError

from shared.confined import read, run_confined, write
from shared.protocol import ImageSpec
from shared.tiling import canvas_for

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class Job(msgspec.Struct, array_like=True):
    """Followed by the picture's file in base64."""

    spec: ImageSpec
    max_pixels: int
    min_side: int


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


class Refused(Exception):
    """A picture that is not decoded; the message is for its sender."""

    def __init__(self, message: str, *, too_large: bool = False) -> None:
        super().__init__(message)
        self.too_large = too_large


def unpack(data: bytes) -> bytes:
    """The file behind its base64. Raises `Refused`."""
    try:
        return base64.b64decode(data, validate=True)
    except ValueError:
        raise Refused("the data URL is not base64") from None


def prepare(data: bytes, job: Job) -> tuple[Answer, bytes, bytes]:
    """Decode one file and cut it to what the model wants. Raises `Refused`."""
    image = _decode(data, job)
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


def _decode(data: bytes, job: Job) -> Image.Image:
    """Decode the file after checking its size and frames by the header, before any pixel is decoded."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise Refused(f"the data is no picture in one of the formats {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise Refused(f"a picture may have at most {job.max_pixels} pixels", too_large=True) from None
    except Exception as error:
        raise Refused(f"the picture's header cannot be read ({type(error).__name__})") from None
    width, height = image.size
    if width * height > job.max_pixels:
        message = f"the picture is {width}×{height}; at most {job.max_pixels} pixels are accepted"
        raise Refused(message, too_large=True)
    if min(width, height) < job.min_side:
        raise Refused(f"the picture is {width}×{height}; each side must have at least {job.min_side} pixels")
    try:
        if getattr(image, "is_animated", False):
            raise Refused("animated pictures are not accepted; send a single frame")
        image.load()
        image = ImageOps.exif_transpose(image) or image
        if image.has_transparency_data:  # pixels under full transparency hold noise: put the picture on white
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Refused:
        raise
    except MemoryError:
        raise Refused("decoding the picture takes more memory than allowed", too_large=True) from None
    except Exception as error:  # a broken file can raise nearly anything from a decoder
        raise Refused(f"the picture is damaged and cannot be decoded ({type(error).__name__})") from None


def serve(stdin: BinaryIO, stdout: BinaryIO) -> None:
    """Answer jobs until stdin ends."""
    Image.MAX_IMAGE_PIXELS = None  # `_decode` judges the size itself, exactly
    Image.preinit()
    Image.init()
    decode_job = msgspec.msgpack.Decoder(Job).decode
    while message := read(stdin):
        job, data = decode_job(message[0]), message[1]
        try:
            answer, crop, canvas = prepare(unpack(data), job)
        except Refused as refused:
            answer, crop, canvas = Answer(str(refused), refused.too_large), b"", b""
        except MemoryError:
            answer = Answer("preparing the picture takes more memory than allowed", True)
            crop = canvas = b""
        write(stdout, msgspec.msgpack.encode(answer), crop, canvas)


if __name__ == "__main__":
    run_confined(serve)
