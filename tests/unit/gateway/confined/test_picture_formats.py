"""WebP, AVIF, GIF, BMP and ICO: kinds, turns, profiles, damage; and what is refused, by its name."""

from __future__ import annotations

import io
import random
import re
import struct

import numpy as np
import pytest
from PIL import Image

from gateway.confined.pictures.decode import decode
from gateway.confined.pictures.essence import Refused
from gateway.confined.pictures.profiles import coded_profile
from tests.unit.gateway.confined import picture_files as files
from tests.unit.gateway.confined.picture_files import Pixels, encoded

SCENE = files.scene()
PICTURE = Image.fromarray(SCENE)
XMP = b"<x:xmpmeta><rdf:Description tiff:Orientation='6'/></x:xmpmeta>"


def read(data: bytes) -> Pixels:
    return np.asarray(decode(data, max_pixels=10**6, min_side=1))


def with_alpha() -> tuple[Image.Image, Pixels]:
    """Left third solid, the middle half transparent, right third wholly so; and how that is on white."""
    alpha = np.repeat(np.array([255, 128, 0], np.uint8), 16)[None].repeat(32, 0)
    share = alpha[..., None] / 255
    on_white: Pixels = np.rint(SCENE * share + 255 * (1 - share)).astype(np.uint8)
    return Image.fromarray(np.dstack([SCENE, alpha])), on_white


def riff(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


@pytest.mark.parametrize("seed", range(16))
def test_webp(seed: int) -> None:
    rng = random.Random(seed)
    orientation = rng.randint(1, 8)
    exif = files.exif(orientation, order=rng.choice("<>"), rational=rng.choice([None, (-1, 0)]))
    exif = rng.choice([exif, b"Exif\0\0" + exif])
    transparent, on_white = with_alpha()
    image, want = rng.choice([(PICTURE, SCENE), (transparent, on_white)])
    fields: dict[str, object] = {"exif": exif}
    lossless = rng.random() < 0.7
    if lossless and rng.random() < 0.5:
        fields["icc_profile"] = rng.choice([coded_profile(1, 8), b"no profile"])
    if rng.random() < 0.4:
        fields["xmp"] = XMP
    data = encoded(image, "WEBP", lossless=lossless, exact=True, quality=95, **fields)
    if not lossless:
        want = np.asarray(
            Image.open(io.BytesIO(encoded(image, "WEBP", exact=True, quality=95))).convert("RGBA")
        )
        share = want[..., 3:] / 255
        want = np.rint(want[..., :3] * share + 255 * (1 - share)).astype(np.uint8)
    if "icc_profile" in fields and fields["icc_profile"] != b"no profile":
        light = np.asarray(image)[..., :3] / 255
        share = np.asarray(image.convert("RGBA"))[..., 3:] / 255
        want = np.rint(files.srgb_code(light) * share + 255 * (1 - share)).astype(np.uint8)
    data += rng.choice([b"", b"behind the end"])
    bound = 2 if lossless else 14
    assert np.abs(read(data).astype(int) - files.turned(want, orientation)).max() <= bound


def test_a_webp_that_lacks_metadata_only_is_whole() -> None:
    data = encoded(PICTURE, "WEBP", lossless=True, xmp=XMP, exif=files.exif(6))
    for end in range(data.index(b"EXIF") + 1, len(data), 9):
        got = read(data[:end])
        assert (got == SCENE).all() if got.shape == SCENE.shape else (got == files.turned(SCENE, 6)).all()
    for end in range(12, data.index(b"EXIF"), 9):
        with pytest.raises(Refused, match="damaged"):
            read(data[:end])
    unpadded = encoded(Image.new("RGB", (5, 5), "red"), "WEBP", lossless=True)
    assert (read(unpadded.rstrip(b"\0")) == (255, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_turns_by_its_own_boxes(orientation: int) -> None:
    data = encoded(PICTURE, "AVIF", quality=100, subsampling="4:4:4", exif=files.exif(orientation))
    want = files.turned(SCENE, orientation)
    assert np.abs(read(data).astype(int) - want).max() <= 3
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "maker", orientation
    described = encoded(PICTURE, "AVIF", quality=100, subsampling="4:4:4", exif=exif)
    header = re.search(rb"II\*\0|MM\0\*", described)
    assert header is not None
    at = header.start()
    for broken in (described, described.replace(described[at + 4 : at + 12], b"\xff" * 8)):
        assert np.abs(read(broken).astype(int) - want).max() <= 3
    boxed = encoded(PICTURE, "AVIF", quality=100, subsampling="4:4:4", xmp=XMP)
    assert np.abs(read(boxed).astype(int) - SCENE).max() <= 3


def test_avif_colours_alpha_and_range() -> None:
    transparent, on_white = with_alpha()
    assert (
        np.abs(
            read(encoded(transparent, "AVIF", quality=100, subsampling="4:4:4")).astype(int) - on_white
        ).max()
        <= 4
    )
    plain = encoded(PICTURE, "AVIF", quality=100, subsampling="4:4:4")
    at = plain.index(b"colrnclx") + 8
    wide = plain[:at] + struct.pack(">HH", 12, 13) + plain[at + 4 :]
    assert np.abs(read(wide).astype(int) - files.from_p3(SCENE)).max() <= 5
    tagged = encoded(PICTURE, "AVIF", quality=100, subsampling="4:4:4", icc_profile=coded_profile(12, 13))
    assert np.abs(read(tagged).astype(int) - files.from_p3(SCENE)).max() <= 5
    for curve, name in ((16, "PQ"), (18, "HLG")):
        with pytest.raises(Refused, match=name):
            read(plain[:at] + struct.pack(">HH", 9, curve) + plain[at + 4 :])
    for end in range(40, len(plain), 30):
        with pytest.raises(Refused, match="AVIF"):
            read(plain[:end])


@pytest.mark.parametrize("interlace", [0, 1])
@pytest.mark.parametrize("transparency", [None, 2])
def test_gif(interlace: int, transparency: int | None) -> None:
    image = PICTURE.quantize(8)
    fields = {} if transparency is None else {"transparency": transparency}
    data = encoded(image, "GIF", interlace=interlace, comment=b"x" * 300, optimize=False, **fields)
    want = np.asarray(image.convert("RGB")).copy()
    if transparency is not None:
        want[np.asarray(image) == transparency] = 255
    assert (read(data) == want).all()
    for lacking in (1, 2):
        assert (read(data[:-lacking]) == want).all()
    # A screen larger than its one frame, which does not begin at its corner.
    at = data.index(b"\x2c\0\0\0\0")
    moved = (
        data[:6]
        + struct.pack("<HH", 60, 50)
        + data[10:at]
        + b"\x2c"
        + struct.pack("<HH", 5, 7)
        + data[at + 5 :]
    )
    around = np.full((50, 60, 3), 255, np.uint8)
    around[7:39, 5:53] = want
    assert (read(moved) == around).all()


@pytest.mark.parametrize("kind", ["GIF", "BMP", "PNG"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_rows_that_were_cut_off_are_white_or_too_many(kind: str, mode: str) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (96, 40, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    data = encoded(image, kind, **({"interlace": 0} if kind == "GIF" else {}))
    want = read(data)
    accepted = 0
    for end in (*range(0, len(data) - 30, len(data) // 30), *range(len(data) - 60, len(data))):
        try:
            got = read(data[:end])
        except Refused as refused:
            assert "damaged" in str(refused) or "no picture" in str(refused)
            continue
        accepted += 1
        sound = (got == want).all((1, 2))
        assert (~sound).sum() <= 6 and (got[~sound] == 255).all()
    assert accepted >= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_bmp(mode: str) -> None:
    image = PICTURE.convert(mode)
    assert (read(encoded(image, "BMP") + b"behind") == np.asarray(image.convert("RGB"))).all()


def bmp(header: bytes, pixels: bytes, between: bytes = b"") -> bytes:
    begin = 14 + len(header) + len(between)
    return b"BM" + struct.pack("<IHHI", begin + len(pixels), 0, 0, begin) + header + between + pixels


def test_rarer_bitmaps() -> None:
    red, blue = [255, 0, 0], [0, 0, 255]
    info = "<IiiHHIIiiII"
    down = bmp(
        struct.pack(info, 40, 2, -2, 1, 24, 0, 0, 0, 0, 0, 0),
        bytes([0, 0, 255] * 2 + [0, 0] + [255, 0, 0] * 2 + [0, 0]),
    )
    assert read(down).tolist() == [[red, red], [blue, blue]]
    of_16 = bmp(struct.pack(info, 40, 2, 1, 1, 16, 0, 0, 0, 0, 0, 0), struct.pack("<2H", 0x7C00, 0x001F))
    assert read(of_16).tolist() == [[red, blue]]
    masks = struct.pack("<3I", 0xF800, 0x07E0, 0x001F)
    of_565 = bmp(
        struct.pack(info, 40, 2, 1, 1, 16, 3, 0, 0, 0, 0, 0), struct.pack("<2H", 0xF800, 0x001F), masks
    )
    assert read(of_565).tolist() == [[red, blue]]
    unused = bmp(struct.pack(info, 40, 2, 1, 1, 32, 0, 0, 0, 0, 0, 0), bytes([0, 0, 255, 0, 255, 0, 0, 0]))
    assert read(unused).tolist() == [[red, blue]], "the fourth byte is no alpha"
    colours = bytes([0, 0, 255, 0, 255, 0, 0, 0])
    of_runs = bmp(struct.pack(info, 40, 4, 1, 1, 8, 1, 6, 0, 0, 2, 0), bytes([2, 0, 2, 1, 0, 1]), colours)
    assert read(of_runs).tolist() == [[red, red, blue, blue]]
    old = bmp(struct.pack("<IHHHH", 12, 2, 1, 1, 24), bytes([0, 0, 255, 255, 0, 0, 0, 0]))
    assert read(old).tolist() == [[red, blue]]


@pytest.mark.parametrize("bitmap_format", ["png", "bmp"])
def test_the_largest_icon_is_shown(bitmap_format: str) -> None:
    transparent, _ = with_alpha()
    square = transparent.resize((48, 48), Image.Resampling.NEAREST)
    data = encoded(square, "ICO", sizes=[(16, 16), (48, 48), (32, 32)], bitmap_format=bitmap_format)
    got = read(data)
    assert got.shape == (48, 48, 3) and (got[:, 33:] == 255).all()
    assert (got[:, :15] == np.asarray(square)[:, :15, :3]).all()
    if bitmap_format == "png":
        cursor = data[:2] + b"\2\0" + data[4:]
        assert (read(cursor) == got).all()
    claimed = bytearray(data)
    at = struct.unpack_from("<I", data, 6 + 12)[0] if bitmap_format == "bmp" else 0
    if at:
        for number in range(3):
            at = struct.unpack_from("<I", data, 6 + 16 * number + 12)[0]
            claimed[at + 4 : at + 12] = struct.pack("<ii", 60_000, 120_000)
        with pytest.raises(Refused, match="60000×60000"):
            read(bytes(claimed))


def test_animations_are_refused_and_single_frames_are_not() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "AVIF", "PNG"):
        several = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        with pytest.raises(Refused, match="single frame"):
            read(several)
        one = read(encoded(frames[0], kind, save_all=True))
        assert np.abs(one.astype(int) - (255, 0, 0)).max() <= 4


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"   ", "begin with 20 20 20"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- x --><svg>", "SVG"),
        (b"<!DOCTYPE html><html>", "web page"),
        (HEIC, "HEIC"),
        (b"\0\0\0\x18ftypisom\0\0\0\0mp42avc1", "video"),
        (encoded(PICTURE, "TIFF"), "TIFF"),
        (encoded(PICTURE, "JPEG2000"), "JPEG 2000"),
        (b"\xff\x0a" + bytes(30), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (encoded(PICTURE, "PPM"), "PPM"),
        (b"8BPS\0\1", "Photoshop"),
        (b"%PDF-1.7", "document"),
        (b"PK\x03\x04", "archive"),
        (b"iVBORw0KGgoAAAANSUhEUg", "encode the file only once"),
        (b"hello", "begin with 68 65 6c 6c 6f"),
    ],
)
def test_what_is_no_picture_is_named(data: bytes, word: str) -> None:
    with pytest.raises(Refused, match=word) as caught:
        read(data)
    assert "no picture" in str(caught.value)
    assert not data or "one of the formats JPEG, PNG, WEBP, GIF, BMP, AVIF, ICO" in str(caught.value)


def claiming(kind: str, width: int, height: int) -> bytes:
    """A small file whose header says another size."""
    data = bytearray(encoded(PICTURE, kind))
    if kind == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    else:
        data[8:33] = files.chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_the_size_is_judged_before_pixels_are_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as in a picture process
    with pytest.raises(Refused, match="60000×60000; at most 1000000 pixels") as caught:
        read(claiming(kind, 60_000, 60_000))
    assert caught.value.too_large
    icon = claiming("PNG", 60_000, 60_000)
    with pytest.raises(Refused, match="60000×60000"):
        read(struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(icon), 22) + icon)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "ICO"])
def test_nothing_but_a_refusal_comes_of_random_damage(kind: str) -> None:
    data = encoded(PICTURE, kind)
    for seed in range(120):
        rng = random.Random(seed)
        broken = bytearray(data)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(broken)) if rng.random() < 0.4 else rng.randrange(min(80, len(broken)))
            broken[at] = rng.randrange(256)
        try:
            read(bytes(broken[: rng.randint(0, len(broken))] if rng.random() < 0.3 else broken))
        except Refused as refused:
            assert len(str(refused)) < 400 and "0x" not in str(refused)
