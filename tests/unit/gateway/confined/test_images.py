"""Pictures: what is accepted, what is refused and how, and that tiles agree with the reference."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from gateway.confined.image_process import Answer, Job, prepare
from gateway.confined.pictures.essence import Refused
from shared.protocol import ImageSpec
from tests.fake_worker import FakeWorker
from tests.gateway_thread import GatewayThread
from tests.http_client import Answer as HttpAnswer
from tests.http_client import ask
from tests.two_sheets import spec_of
from tests.unit.gateway.confined import picture_files as files
from tests.unit.gateway.confined.picture_files import encoded

MOONDREAM = spec_of(378, 14, 4, 12, 729)
SMALL = spec_of(56, 7, 1, 4, 64)


def job(spec: ImageSpec = SMALL) -> Job:
    return Job(spec, max_pixels=64_000_000, min_side=4)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + files.chunk(b"IHDR", header)
        + files.chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + files.chunk(b"IEND", b"")
    )


def test_crop_and_canvas_are_plain_lanczos() -> None:
    image = Image.effect_mandelbrot((300, 200), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    answer, (crop, canvas) = prepare(encoded(image), job())
    assert crop == image.resize((56, 56), Image.Resampling.LANCZOS).tobytes()
    tiles = answer.sheets[1]
    assert canvas == image.resize((tiles.width, tiles.height), Image.Resampling.LANCZOS).tobytes()
    assert tiles.rows * 42 + 14 == tiles.height
    again = prepare(encoded(image, "BMP"), job())[0]
    assert again.digest == answer.digest, "the digest is of the pixels, not of the file"


def test_tilings_of_the_reference() -> None:
    file = Path(__file__).parents[3] / "data" / "golden_moondream" / "tilings.json"
    if not file.is_file():
        pytest.skip("no reference tilings here")
    rows = json.loads(file.read_text())
    for height, width, tiles_h, tiles_w in rows[:20]:
        answer = prepare(encoded(Image.new("L", (width, height)), "PNG", compress_level=1), job(MOONDREAM))[0]
        assert (answer.sheets[1].rows, answer.sheets[1].cols) == (tiles_h, tiles_w), (height, width)


def test_orientation_is_undone_and_transparency_is_white() -> None:
    image = Image.new("RGB", (40, 20), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6
    answer = prepare(encoded(image, "JPEG", exif=exif), Job(MOONDREAM, 10**6, 4))[0]
    assert isinstance(answer, Answer)
    _, (crop, _) = prepare(encoded(Image.new("RGBA", (20, 20), (10, 20, 30, 0))), job())
    assert set(crop) == {255}
    tall = Image.new("RGB", (600, 200), "blue")
    turned = prepare(encoded(tall, "JPEG", exif=exif), job(SMALL))[0]
    assert turned.sheets[1].rows > turned.sheets[1].cols


@pytest.mark.parametrize("orientation", range(1, 9))
def test_large_jpegs_are_decoded_smaller_within_the_stated_bound(orientation: int) -> None:
    rng = np.random.default_rng(orientation)
    image = Image.new("RGB", (1203, 1001))
    for size in (4, 16, 64, 256):  # finer detail is fainter, as in photographs
        layer = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        image = Image.blend(image, layer.resize(image.size, Image.Resampling.BICUBIC), 2.0 / size**0.5)
    turn = files.segment(0xE1, b"Exif\0\0" + files.exif(orientation))
    data = files.with_segments(encoded(image, "JPEG", quality=90), turn)
    answer, got = prepare(data, job())
    whole = Image.fromarray(
        files.turned(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), orientation)
    )
    for pixels, sheet in zip(got, answer.sheets, strict=True):
        shape = sheet.width, sheet.height
        want = np.asarray(whole.resize(shape, Image.Resampling.LANCZOS)).reshape(-1).astype(int)
        difference = np.abs(np.frombuffer(pixels, np.uint8) - want)
        assert difference.mean() <= 1.5 and np.percentile(difference, 99) <= 8


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "YCbCr"])
def test_every_common_mode_is_turned_to_rgb(mode: str) -> None:
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    _, (crop, canvas) = prepare(encoded(Image.new(mode, (30, 30)), kind), job())
    assert len(crop) == 56 * 56 * 3 and len(canvas) % 3 == 0


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "no picture"),
        (b"hello", "no picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture"),
        (b"%PDF-1.4", "no picture"),
        (encoded(Image.new("RGB", (20, 20)), "TIFF"), "no picture"),
        (encoded(Image.new("RGB", (20, 20)), "PPM"), "no picture"),
        (encoded(Image.new("RGB", (64, 64), "red"))[:60], "damaged"),
        (encoded(Image.new("RGB", (640, 640), "red"), "JPEG")[:900], "damaged"),
        (encoded(Image.new("RGB", (1, 1))), "at least 4"),
        (encoded(Image.new("RGB", (3, 300))), "at least 4"),
        (png_header(50_000, 50_000), "at most"),
        (png_header(2**31 - 1, 2**31 - 1), "picture"),
    ],
)
def test_what_is_no_good_picture_is_refused_in_words(data: bytes, word: str) -> None:
    with pytest.raises(Refused, match=word):
        prepare(data, job())


def test_animations_are_refused_without_counting_their_frames() -> None:
    frames = [Image.new("RGB", (8, 8), (colour, 0, 255 - colour)) for colour in range(200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(Refused, match="single frame"):
        prepare(data, job())
    assert prepare(encoded(frames[0], "GIF"), job())[0].sheets[1].rows == 1


# ---------------------------------------------------------------- through the gateway and its process


def query(gateway: GatewayThread, url: object) -> HttpAnswer:
    return ask(gateway.url, "/v1/query", {"question": "what?", "image_url": url})


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("http://example.com/a.png", "not fetched"),
        ("https://169.254.169.254/latest", "not fetched"),
        ("file:///etc/passwd", "not fetched"),
        ("/etc/passwd", "data URL"),
        ("", "data URL"),
        ("data:image/png,abc", "data URL"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,@@@@", "base64"),
        ("data:image/png;base64,abc", "base64"),
        ("data:text/html;base64,PGI+", "picture"),
        ("data:image/png;base64,aGVsbG8=", "no picture"),
    ],
)
def test_only_data_urls_with_pictures(gateway: GatewayThread, url: str, word: str) -> None:
    answer = query(gateway, url)
    assert answer.status == 400 and word in answer.error["message"], answer.body
    assert answer.error["param"] == "image_url"


def url_of(data: bytes, before: str = "data:image/png;base64,") -> str:
    return before + base64.b64encode(data).decode()


def circle(mode: str, ink: int, paper: int) -> Image.Image:
    image = Image.new(mode, (64, 64), paper)
    ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill=ink)
    return image


def rows_of_the_past() -> list[tuple[str, str, Image.Image]]:
    """Pictures that browsers show and that once were refused or read wrongly: name, URL, what is shown."""
    scene = Image.fromarray(files.scene())
    grey = circle("L", 0, 255)
    wide = np.asarray(grey).astype(np.uint16)[..., None] * 257
    jpeg = encoded(scene, "JPEG", quality=95)
    shown = Image.open(io.BytesIO(jpeg)).convert("RGB")
    second = Image.new("RGB", (48, 32), "lime")
    turn = files.segment(0xE1, b"Exif\0\0" + files.exif(6, rational=(-1, 0)))
    text = files.chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes((1 << 20) + 2)))
    png = encoded(scene)
    lines = base64.encodebytes(png).decode()
    return [
        (
            "a preview behind the picture",
            url_of(encoded(scene, "MPO", save_all=True, append_images=[second], quality=95)),
            shown,
        ),
        ("16 bits of grey", url_of(files.png(wide, 16, 0)), grey),
        ("16 bits of colour", url_of(files.png(wide.repeat(3, 2), 16, 2)), grey),
        (
            "orientation beside a resolution of -1/0",
            url_of(files.with_segments(jpeg, turn)),
            shown.transpose(Image.Transpose.ROTATE_270),
        ),
        ("text that unpacks to a megabyte", url_of(png[:33] + text + png[33:]), scene),
        ("a JPEG without its last two bytes", url_of(jpeg[:-2]), shown),
        ("capital letters and lines", "DATA:IMAGE/PNG;BASE64," + lines, scene),
        ("parameters", url_of(png, "data:image/png;charset=utf-8;name=x.png;base64,"), scene),
        ("no padding", url_of(png + b"x" * (len(png) % 3 == 0)).rstrip("="), scene),
        ("percent-encoded", "data:," + "".join(f"%{byte:02x}" for byte in png), scene),
        ("another type than declared", url_of(png, "data:text/plain;base64,"), scene),
        ("AVIF", url_of(encoded(scene, "AVIF", quality=100, subsampling="4:4:4")), scene),
    ]


def test_what_was_refused_or_read_wrongly_once(gateway: GatewayThread, worker: FakeWorker) -> None:
    wrong: list[str] = []
    for name, url, shown in rows_of_the_past():
        answer = query(gateway, url)
        if answer.status != 200:
            wrong.append(f"{name}: {answer.error['message']}")
            continue
        got = worker.payloads[-1][0]
        assert query(gateway, url_of(encoded(shown.convert("RGB")))).status == 200
        if max(abs(a - b) for a, b in zip(got, worker.payloads[-1][0], strict=True)) > 4:
            wrong.append(f"{name}: other pixels")
    assert not wrong


def test_too_large_files_and_pictures_are_413(worker: FakeWorker) -> None:
    with GatewayThread(workers=[worker.endpoint], max_image_bytes=2000) as gateway:
        gateway.wait_ready()
        big = base64.b64encode(b"x" * 3000).decode()
        assert query(gateway, "data:image/png;base64," + big).status == 413
        claimed = base64.b64encode(png_header(50_000, 50_000)).decode()
        answer = query(gateway, "data:image/png;base64," + claimed)
        assert answer.status == 413 and "50000×50000" in answer.error["message"]


def test_a_dead_process_costs_one_request_and_is_replaced(
    gateway: GatewayThread, data_url: Callable[..., str]
) -> None:
    assert query(gateway, data_url()).status == 200
    assert query(gateway, data_url(kind="JPEG")).status == 200

    def kill() -> None:
        for transport in list(gateway.gateway.service.images.processes):
            transport.kill()

    gateway.call(kill)
    answers = [query(gateway, data_url()).status for _ in range(3)]
    assert answers[-1] == 200 and answers.count(400) <= 1


@pytest.mark.slow
def test_a_decoder_that_hangs_is_killed_in_time(worker: FakeWorker, data_url: Callable[..., str]) -> None:
    """What is started on a busy machine has its time; only the one that hangs has half a second."""
    with GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_ready()
        assert query(gateway, data_url()).status == 200
        images = gateway.gateway.service.images
        patient, images._config = images._config, images._config.model_copy(update={"image_timeout_s": 0.5})

        def stop() -> None:
            for process in list(gateway.gateway.service.images.processes):
                process.send_signal(signal.SIGSTOP)

        gateway.call(stop)
        answer = query(gateway, data_url())
        assert answer.status == 400 and "within 0.5 s" in answer.error["message"]
        images._config = patient
        assert query(gateway, data_url()).status == 200


def test_memory_is_bounded(worker: FakeWorker) -> None:
    with GatewayThread(workers=[worker.endpoint], image_memory_bytes=256 << 20) as gateway:
        gateway.wait_ready()
        flat = encoded(Image.new("RGB", (9000, 7000)), "PNG")
        url = "data:image/png;base64," + base64.b64encode(flat).decode()
        answer = query(gateway, url)
        assert answer.status in (400, 413) and "memory" in answer.error["message"]
        assert query(gateway, url).status == answer.status


def test_pictures_that_wait_are_bounded_in_bytes(
    gateway: GatewayThread, data_url: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is always taken, however large: else none of its size ever would be."""
    images = gateway.gateway.service.images
    monkeypatch.setattr("gateway.confined.images._MAX_PENDING_BYTES", 10)
    url = data_url()
    assert query(gateway, url).status == 200
    for process in list(images.processes):
        os.kill(process.pid, signal.SIGSTOP)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(query, gateway, url)
        gateway.wait_for(lambda: images.num_pending == 1)
        second = query(gateway, url)
        assert (second.status, second.error["code"]) == (429, "queue_full") and second.headers["retry-after"]
        for process in list(images.processes):
            os.kill(process.pid, signal.SIGCONT)
        assert first.result(20).status == 200
    gateway.wait_for(lambda: images.num_pending == images.pending_bytes == 0)
