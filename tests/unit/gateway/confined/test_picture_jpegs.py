"""JPEGs: kinds, metadata in any state, orientation, profiles, and files that lack their end."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image

from gateway.confined.pictures.decode import decode
from gateway.confined.pictures.essence import Refused
from gateway.confined.pictures.profiles import coded_profile
from tests.unit.gateway.confined import picture_files as files
from tests.unit.gateway.confined.picture_files import Pixels, encoded, segment

SCENE = files.scene()
XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation='6'/></x:xmpmeta>"
MPF = segment(
    0xE2,
    b"MPF\0II*\0\x08\0\0\0\x03\0" + b"\0\xb0\x07\0\x04\0\0\0" + b"0100" + b"\x01\xb0\x04\0\1\0\0\0\2\0\0\0",
)
HARMLESS = (
    segment(0xE1, XMP),
    MPF,
    segment(0xE2, b"ICC_PROFILE\0\x02\x02only the second part"),
    segment(0xE2, b"ICC_PROFILE\0\x01\x01no profile"),
    segment(0xE2, b"FPXR\0"),
    segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\xff\xff\xff\xff"),
    segment(0xED, b"Photoshop 3.0\x008BIM"),
    segment(0xEE, b"Adobe"),
    segment(0xFE, b"\xff" * 100),
    segment(0xE0, b"JFIF\0"),
    segment(0xE0, b"JFXX\0\x10"),
    segment(0xEF, bytes(60_000)),
    b"\xff\xff\xff",
)


def read(data: bytes) -> Pixels:
    return np.asarray(decode(data, max_pixels=10**7, min_side=1))


def decoded(data: bytes) -> Pixels:
    """Pillow's own pixels, as they are stored."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def noise(width: int, height: int, seed: int = 1) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


def icc(profile: bytes, num_parts: int = 1) -> bytes:
    size = -(-len(profile) // num_parts)
    parts = [profile[at : at + size] for at in range(0, len(profile), size)]
    made = [
        segment(0xE2, b"ICC_PROFILE\0" + bytes([n + 1, len(parts)]) + part) for n, part in enumerate(parts)
    ]
    return b"".join(reversed(made))


@pytest.mark.parametrize("seed", range(40))
def test_metadata_in_any_state_changes_nothing(seed: int) -> None:
    rng = random.Random(seed)
    mode = rng.choice(["RGB", "L", "CMYK", "RGB"])
    image = Image.fromarray(SCENE).convert(mode)
    fields: dict[str, object] = {"quality": rng.choice([30, 75, 95]), "progressive": rng.random() < 0.4}
    if mode == "RGB":
        fields |= rng.choice([{"subsampling": number} for number in range(3)] + [{"keep_rgb": True}])
    if rng.random() < 0.3:
        fields["restart_marker_blocks"] = 1
    plain = encoded(image, "JPEG", **fields)
    orientation = rng.randint(1, 8)
    rational = rng.choice([(-1, 0), (0, 0), (72, 1), None])
    block = files.exif(orientation, order=rng.choice("<>"), rational=rational)
    about = [segment(0xE1, b"Exif\0\0" + block), *rng.sample(HARMLESS, rng.randint(0, 5))]
    rng.shuffle(about)
    behind = rng.choice([b"", b"trailing bytes", encoded(Image.new("RGB", (9, 9)), "JPEG"), bytes(1000)])
    lacking = rng.choice([0, 0, 1, 2]) if not behind else 0
    data = files.with_segments(plain, *about)
    got = read(data[: len(data) - lacking] + behind)
    assert (got == files.turned(decoded(plain), orientation)).all()


@pytest.mark.parametrize("number", [0, 9, 65535])
@pytest.mark.parametrize("order", "<>")
def test_orientations_that_do_not_exist_are_none(number: int, order: str) -> None:
    plain = encoded(Image.fromarray(SCENE), "JPEG")
    block = files.exif(number, order=order)
    for exif in (
        block,
        block[:9],
        block[:4],
        b"",
        b"II*\0\xff\xff\xff\xff",
        block.replace(b"\x12\x01\x03", b"\x12\x01\x04"),
    ):
        assert (read(files.with_segments(plain, segment(0xE1, b"Exif\0\0" + exif))) == decoded(plain)).all()


def test_a_phones_second_picture_does_not_count() -> None:
    first, second = Image.fromarray(SCENE), Image.new("RGB", (48, 32), "lime")
    mpo = encoded(first, "MPO", save_all=True, append_images=[second])
    assert getattr(Image.open(io.BytesIO(mpo)), "n_frames", 1) == 2
    assert (read(mpo) == decoded(encoded(first, "JPEG"))).all()


@pytest.mark.parametrize("num_parts", [1, 3])
def test_profiles(num_parts: int) -> None:
    image = Image.fromarray(SCENE)
    plain = encoded(image, "JPEG", quality=95, subsampling=0)
    profile = coded_profile(12, 13)
    assert (
        np.abs(
            read(files.with_segments(plain, icc(profile, num_parts))).astype(int)
            - files.from_p3(decoded(plain))
        ).max()
        <= 2
    )
    grey = encoded(image.convert("L"), "JPEG")
    want = files.srgb_code(decoded(grey) / 255)
    got = read(files.with_segments(grey, icc(files.grey_profile(1.0), num_parts))).astype(int)
    assert np.abs(got - want).max() <= 1
    unfit = read(files.with_segments(plain, icc(files.grey_profile(1.0), num_parts)))
    assert (unfit == decoded(plain)).all(), "a profile of grey says nothing about colours"


def inks(cyan: int, magenta: int, yellow: int, black: int) -> bytes:
    return encoded(Image.new("CMYK", (16, 16), (cyan, magenta, yellow, black)), "JPEG", quality=100)


@pytest.mark.parametrize(
    "colour", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 200, 100, 0), (10, 20, 30, 128), (0, 0, 0, 255)]
)
def test_inks_without_a_profile_are_taken_by_their_product(colour: tuple[int, int, int, int]) -> None:
    data = inks(*colour)
    *cmy, black = (1 - value / 255 for value in colour)
    want = [round(255 * light * black) for light in cmy]
    assert np.abs(read(data)[8, 8].astype(int) - want).max() <= 2
    at = data.index(b"Adobe") + 11
    assert data[at] == 0
    assert np.abs(read(data[:at] + b"\x02" + data[at + 1 :])[8, 8].astype(int) - as_ycck(colour)).max() <= 3


def as_ycck(colour: tuple[int, int, int, int]) -> list[int]:
    """What the same samples are as luma and chroma of ink: by JFIF's conversion, inverted as Adobe stores it."""
    y, cb, cr, k = (255 - value for value in colour)
    rgb = (y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128))
    cmy = [
        255 - min(255, max(0, value)) for value in rgb
    ]  # as stored, inverted: the light that each ink leaves
    return [round(light * k / 255) for light in cmy]


def test_inks_with_a_profile() -> None:
    white = read(files.with_segments(inks(0, 0, 0, 255), icc(files.ink_profile())))[8, 8]
    yellow = read(files.with_segments(inks(255, 0, 0, 0), icc(files.ink_profile())))[8, 8]
    assert white.min() >= 250 and yellow[2] < 100 < yellow[1] < yellow[0]


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "YCCK"])
def test_what_a_cut_file_shows_is_in_the_whole_one(progressive: bool, mode: str) -> None:
    image = noise(160, 144).convert("CMYK" if mode == "YCCK" else mode)
    data = encoded(image, "JPEG", progressive=progressive, quality=85)
    if mode == "YCCK":
        at = data.index(b"Adobe") + 11
        data = data[:at] + b"\x02" + data[at + 1 :]
    want = decoded(data).astype(int)
    num_read = 0
    for end in (*range(3, len(data), len(data) // 29), *range(len(data) - 40, len(data), 3), len(data) - 2):
        try:
            got = read(data[:end]).astype(int)
        except Refused as refused:
            assert "damaged" in str(refused)
            assert end < len(data) - 10, refused
            continue
        num_read += 1
        difference = np.abs(got - want)
        if progressive:
            assert difference.mean() < 5, (end, difference.mean())
        else:
            assert (difference.max(-1) > 0).mean() < 1 / 16 + 256 / got[..., 0].size, end
        if end == len(data) - 2:
            assert (got == want).all()
    assert num_read >= 10


def test_a_cut_file_that_somebody_closed_is_still_cut() -> None:
    data = encoded(noise(160, 144), "JPEG", quality=85)
    with pytest.raises(Refused, match="% of its pixels are missing"):
        read(data[: len(data) * 2 // 3] + b"\xff\xd9")
    assert read(data[: len(data) - 20] + b"\xff\xd9").shape == (144, 160, 3)


@pytest.mark.parametrize("lacking", [0, 1, 2])
def test_grey_that_looks_like_missing_blocks_is_grey(lacking: int) -> None:
    image = Image.new("RGB", (64, 320), (128, 128, 128))
    image.paste("red", (0, 0, 64, 16))
    data = encoded(image, "JPEG", subsampling=0)
    got = read(data[: len(data) - lacking])
    assert (got == decoded(data)).all() and got[-1, -1].tolist() == [128, 128, 128]


def with_frame(data: bytes, marker: int, **changes: int) -> bytes:
    """The same file with another kind of frame, or other bits or channels in it."""
    at = data.index(b"\xff\xc0")
    frame = bytearray(data[at : at + 10])
    frame[1] = marker
    frame[4] = changes.get("bits", frame[4])
    frame[9] = changes.get("channels", frame[9])
    return data[:at] + bytes(frame) + data[at + 10 :]


@pytest.mark.parametrize(
    ("marker", "changes", "word"),
    [
        (0xC0, {"bits": 12}, "12 bits"),
        (0xC0, {"channels": 2}, "2 channels"),
        (0xC3, {}, "lossless"),
        (0xC9, {}, "arithmetically coded"),
        (0xC5, {}, "hierarchical"),
    ],
)
def test_kinds_that_browsers_do_not_show_are_refused_by_name(
    marker: int, changes: dict[str, int], word: str
) -> None:
    data = with_frame(encoded(Image.fromarray(SCENE), "JPEG"), marker, **changes)
    with pytest.raises(Refused, match=word):
        read(data)


def test_headers_that_end_early() -> None:
    data = encoded(Image.fromarray(SCENE), "JPEG")
    for end in range(3, data.index(b"\xff\xda") + 4, 7):
        with pytest.raises(Refused, match="damaged"):
            read(data[:end])
    at = data.index(b"\xff\xc0") + 5
    with pytest.raises(Refused, match="says 48×0 pixels"):
        read(data[:at] + b"\0\0" + data[at + 2 :])
    for nothing in (b"\xff\xd8" + b"\xff" * 1_000_000, b"\xff\xd8\xff" * 300_000):
        with pytest.raises(Refused, match="cut off in its header"):
            read(nothing)
    with pytest.raises(Refused, match="ends before its pixels"):
        read(b"\xff\xd8\xff\xd9" * 3)
