"""PNGs, written sample by sample: every type, depth, interlacing, orientation, transparency and colour space."""

from __future__ import annotations

import itertools
import random
import struct
import zlib

import numpy as np
import pytest

from gateway.confined.pictures.decode import decode
from gateway.confined.pictures.essence import Refused
from gateway.confined.pictures.profiles import coded_profile, gamma_profile
from tests.unit.gateway.confined import picture_files as files
from tests.unit.gateway.confined.picture_files import Pixels, Samples, chunk, png

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}
KINDS = [
    (colour_type, depth, interlaced)
    for colour_type, depths in {
        GREY: (1, 2, 4, 8, 16),
        RGB: (8, 16),
        PALETTE: (1, 2, 4, 8),
        GREY_ALPHA: (8, 16),
        RGB_ALPHA: (8, 16),
    }.items()
    for depth in depths
    for interlaced in (False, True)
]
ADOBE = (0.3127, 0.3290, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
P3 = coded_profile(12, 13)
HARMLESS = (
    chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes((1 << 20) + 2))),
    chunk(b"zTXt", b"Comment\0\0no deflate stream"),
    chunk(b"tEXt", b"Software\0" + b"x" * 3000),
    chunk(
        b"iTXt",
        b"XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta xmlns:x='adobe:ns:meta/'><tiff:Orientation>6</tiff:Orientation>",
    ),
    chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 4\n00000000\n")),
    chunk(b"tIME", b"\1"),
    chunk(b"pHYs", b""),
    chunk(b"gAMA", struct.pack(">I", 45455)),
    chunk(b"sBIT", b"\x08"),
    chunk(b"iCCP", b"broken\0\0" + b"not zlib"),
    chunk(b"iCCP", b"no profile\0\0" + zlib.compress(b"no profile" * 30)),
    chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
    chunk(b"tEXt", b"a\0b")[:-1] + b"?",  # the checksum is wrong
    chunk(b"prVt", b"unknown"),
    chunk(b"iCCP", b"grey profile for colours\0\0" + zlib.compress(files.ink_profile())),
)


def read(data: bytes) -> Pixels:
    return np.asarray(decode(data, max_pixels=10**6, min_side=1))


def shown(colours: np.ndarray, alpha: np.ndarray) -> Pixels:
    """On white."""
    on_white: Pixels = np.rint(colours * alpha[..., None] + 255 * (1 - alpha[..., None])).astype(np.uint8)
    return on_white


def expected(
    samples: Samples, depth: int, colour_type: int, key: tuple[int, ...], palette: np.ndarray
) -> Pixels:
    """By the PNG standard."""
    if colour_type == PALETTE:
        entries = palette[samples[..., 0]]
        return shown(entries[..., :3].astype(float), entries[..., 3] / 255)
    levels = samples * (255 / ((1 << depth) - 1))
    alpha = np.ones(samples.shape[:2])
    if colour_type in (GREY_ALPHA, RGB_ALPHA):
        alpha, levels = levels[..., -1] / 255, levels[..., :-1]
    elif key:
        alpha = (samples != np.array(key)).any(-1).astype(float)
    if levels.shape[-1] == 1:
        levels = np.repeat(levels, 3, -1)
    return shown(levels, alpha)


@pytest.mark.parametrize(("colour_type", "depth", "interlaced"), KINDS)
def test_every_kind_of_png_is_read_as_the_standard_says(
    colour_type: int, depth: int, interlaced: bool
) -> None:
    rng = random.Random(f"{colour_type} {depth} {interlaced}")
    for orientation in (1, rng.randint(2, 8), rng.randint(2, 8)):
        width, height = rng.randint(1, 40), rng.randint(1, 40)
        samples = files.gradient(width, height, CHANNELS[colour_type], depth, rng.randint(0, 99))
        chunks = rng.sample(HARMLESS, rng.randint(0, 4))
        key: tuple[int, ...] = ()
        palette = np.random.default_rng(width).integers(0, 256, (1 << min(depth, 8), 4))
        if colour_type == PALETTE:
            palette[len(palette) // 2 :, 3] = 255  # tRNS may be shorter than the palette
            chunks.append(chunk(b"PLTE", palette[:, :3].astype(np.uint8).tobytes()))
            chunks.append(chunk(b"tRNS", palette[: len(palette) // 2, 3].astype(np.uint8).tobytes()))
        elif colour_type in (GREY, RGB) and rng.random() < 0.7:
            key = tuple(int(sample) for sample in samples[height // 2, width // 2])
            chunks.append(chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)))
        turn = chunk(b"eXIf", files.exif(orientation, order=rng.choice("<>"), rational=(-1, 0)))
        if orientation != 1:
            chunks = [made for made in chunks if made[4:8] != b"eXIf"]
        before, after = ([*chunks, turn], b"") if rng.random() < 0.5 else (chunks, turn)
        data = (
            png(samples, depth, colour_type, *before, interlaced=interlaced, after=after) + b"behind the end"
        )
        got = read(data).astype(int)
        want = files.turned(expected(samples, depth, colour_type, key, palette), orientation)
        assert got.shape == want.shape
        bound = (depth == 16) + (colour_type >= PALETTE)  # upper 8 bits of 16; a level of alpha's rounding
        assert np.abs(got - want).max() <= bound, (colour_type, depth, orientation, key)


def test_transparent_16_bit_colours_are_compared_in_all_16_bits() -> None:
    samples = np.array([[[0x1234, 0x5678, 0x9ABC], [0x1235, 0x5678, 0x9ABC]]], np.uint16)
    key = chunk(b"tRNS", struct.pack(">3H", 0x1234, 0x5678, 0x9ABC))
    assert read(png(samples, 16, RGB, key)).tolist() == [[[255, 255, 255], [0x12, 0x56, 0x9A]]]


COLOURS = np.array(list(itertools.product((0, 60, 128, 200, 255), repeat=3)), np.uint8).reshape(25, 5, 3)


@pytest.mark.parametrize(
    ("name", "chunks", "want"),
    [
        ("profile of Display P3", [chunk(b"iCCP", b"p3\0\0" + zlib.compress(P3))], files.from_p3(COLOURS)),
        ("Display P3 by numbers", [chunk(b"cICP", bytes([12, 13, 0, 1]))], files.from_p3(COLOURS)),
        ("sRGB by numbers", [chunk(b"cICP", bytes([1, 13, 0, 1]))], COLOURS),
        (
            "numbers before a profile",
            [chunk(b"cICP", bytes([1, 13, 0, 1])), chunk(b"iCCP", b"p3\0\0" + zlib.compress(P3))],
            COLOURS,
        ),
        (
            "profile of Adobe RGB",
            [chunk(b"iCCP", b"a\0\0" + zlib.compress(gamma_profile(1 / 2.19921875, ADOBE)))],
            files.from_adobe(COLOURS),
        ),
        (
            "gAMA and cHRM of Adobe RGB",
            [
                chunk(b"gAMA", struct.pack(">I", 45471)),
                chunk(b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in ADOBE))),
            ],
            files.from_adobe(COLOURS),
        ),
        ("light itself", [chunk(b"gAMA", struct.pack(">I", 100_000))], files.srgb_code(COLOURS / 255)),
        (
            "sRGB counts before gAMA",
            [chunk(b"gAMA", struct.pack(">I", 100_000)), chunk(b"sRGB", b"\0")],
            COLOURS,
        ),
        ("gAMA of zero", [chunk(b"gAMA", bytes(4))], COLOURS),
        (
            "corners in one line",
            [chunk(b"gAMA", struct.pack(">I", 45455)), chunk(b"cHRM", struct.pack(">8I", *([30_000] * 8)))],
            COLOURS,
        ),
    ],
)
def test_colour_spaces_come_to_srgb(name: str, chunks: list[bytes], want: Pixels) -> None:
    got = read(png(COLOURS.astype(np.uint16), 8, RGB, *chunks)).astype(int)
    assert np.abs(got - want).max() <= 2, name
    with_alpha = np.dstack([COLOURS, np.full(COLOURS.shape[:2], 255)]).astype(np.uint16)
    assert (read(png(with_alpha, 8, RGB_ALPHA, *chunks)) == got).all(), "alpha is no colour"


@pytest.mark.parametrize("depth", [8, 16])
def test_grey_of_another_curve_is_brought_to_srgbs(depth: int) -> None:
    levels = np.arange(256) * (257 if depth == 16 else 1)
    samples = levels.reshape(16, 16, 1).astype(np.uint16)
    want = files.srgb_code(np.repeat(np.arange(256).reshape(16, 16, 1), 3, 2) / 255)
    profile = chunk(b"iCCP", b"grey\0\0" + zlib.compress(files.grey_profile(1.0)))
    for made in (profile, chunk(b"gAMA", struct.pack(">I", 100_000))):
        assert np.abs(read(png(samples, depth, GREY, made)).astype(int) - want).max() <= 2
    dark = np.arange(64).reshape(8, 8, 1).astype(np.uint16)
    got = read(png(dark, 16, GREY, chunk(b"gAMA", struct.pack(">I", 100_000))))
    assert (got[..., :1] == files.srgb_code(dark / 65535)).all(), "dark levels lie in the lower 8 bits"


def test_high_dynamic_range_is_refused_by_name() -> None:
    for curve, name in ((16, "PQ"), (18, "HLG")):
        with pytest.raises(Refused, match=name):
            read(png(COLOURS.astype(np.uint16), 8, RGB, chunk(b"cICP", bytes([9, curve, 0, 1]))))


def animated(num_frames: int, *, shown_first: bool, first: bytes = b"") -> bytes:
    """An APNG whose frames are blue, with a red picture for programs that know no animations."""
    red = np.full((8, 8, 3), (255, 0, 0), np.uint16)
    blue = np.full((8, 8, 3), (0, 0, 255), np.uint16)
    whole = png(red, 8, RGB)
    pixels = whole[whole.index(b"IDAT") - 4 : -12]
    frame = zlib.compress(b"".join(b"\0" + row.astype(np.uint8).tobytes() for row in blue))
    control = first or struct.pack(">IIIIHHBB", 8, 8, 0, 0, 1, 10, 0, 0)
    head = whole[:33] + chunk(b"acTL", struct.pack(">II", num_frames, 0))
    if shown_first:
        head += chunk(b"fcTL", bytes(4) + control)
        num_frames -= 1
    behind = b"".join(
        chunk(b"fcTL", struct.pack(">I", 2 * n + 1) + control)
        + chunk(b"fdAT", struct.pack(">I", 2 * n + 2) + frame)
        for n in range(num_frames)
    )
    return head + pixels + behind + chunk(b"IEND", b"")


def test_an_animation_of_one_frame_is_that_frame() -> None:
    assert read(animated(1, shown_first=True))[0, 0].tolist() == [255, 0, 0]
    assert read(animated(1, shown_first=False))[0, 0].tolist() == [0, 0, 255]
    for shown_first in (True, False):
        with pytest.raises(Refused, match="single frame"):
            read(animated(2, shown_first=shown_first))
    small = struct.pack(">IIIIHHBB", 4, 4, 0, 0, 1, 10, 0, 0)
    with pytest.raises(Refused, match="does not cover"):
        read(animated(1, shown_first=False, first=small))


def test_damage_to_what_pixels_need_is_told_apart() -> None:
    samples = files.gradient(30, 30, 3, 8, 1)
    data = png(samples, 8, RGB)
    broken_header = data[:20] + b"\1" + data[21:]
    with pytest.raises(Refused, match="checksum of its IHDR"):
        read(broken_header)
    with pytest.raises(Refused, match="no palette"):
        read(png(samples[..., :1], 8, PALETTE))
    with pytest.raises(Refused, match="colour type 2 with 4 bits"):
        impossible = chunk(b"IHDR", struct.pack(">IIBBBBB", 30, 30, 4, 2, 0, 0, 0))
        read(data[:8] + impossible + data[33:])
    with pytest.raises(Refused, match="says 0×5 pixels"):
        read(data[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0)) + data[33:])
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0x10
    with pytest.raises(Refused, match="damaged"):
        read(bytes(flipped))
    with pytest.raises(Refused, match="CgBI"):
        read(data[:8] + chunk(b"CgBI", bytes(4)) + data[8:])
    for end in (*range(0, len(data), 17), *range(len(data) - 200, len(data), 3)):
        try:
            got = read(data[:end])
        except Refused:
            continue
        num_sound = int((got == samples).all((1, 2)).cumprod().sum())
        assert num_sound >= 28 and (got[num_sound:] == 255).all(), (
            "a row of the sixteenth may be missing, white"
        )
    assert (read(data[:-12]) == samples).all()
