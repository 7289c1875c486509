"""Owns `degas bench pictures`: prepared pictures a second and core, beside decoding all of a picture, and beside transformers.

Runs in the main thread: what a picture process does for one request, from the data URL's body to pixels. Transformers' fast
processors also normalise them, which Degas leaves to the device.
"""

from __future__ import annotations

import base64
import hashlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gateway.confined.image_process import Job, prepare, unpack
from gateway.confined.pictures.decode import start
from loadtest.bench.picture_peer import PEERS, Processor
from loadtest.tables import Figures
from shared.image_spec import EdgeTiles, FreeSize
from shared.pictures import drawings
from shared.protocol import ImageSpec, OverlappingTiles

SIDES = {0.5: (866, 577), 2.0: (1632, 1224), 12.0: (4000, 3000)}
SPECS = {
    "moondream": ImageSpec(378, 729, OverlappingTiles(patch_size=14, margin_patches=4, max_crops=12)),
    "pocket": ImageSpec(56, 64, OverlappingTiles(patch_size=7, margin_patches=1, max_crops=4)),
    "smolvlm": ImageSpec(512, 64, EdgeTiles(2048)),
    "qwen2.5-vl": ImageSpec(28, 1, FreeSize(56 * 56, 28 * 28 * 1280), "bicubic", position_axes=3),
}
_MAX_PIXELS = 1 << 30
_DETAIL = (4, 16, 64, 256, 1024)  # samples across, from coarse to fine


@dataclass(frozen=True, slots=True)
class PictureRow:
    """Rates are pictures a second of one core's time; differences are levels of 255 from the whole picture."""

    megapixels: float
    model: str
    file_bytes: int
    pictures_per_s: float
    full_decode_per_s: float
    ratio: float
    mean_difference: float
    p99_difference: float
    transformers_per_s: float | None = None  # its fast processor; None: not measured, or it has none
    transformers_ratio: float | None = None

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def photograph(width: int, height: int, seed: int = 0) -> bytes:
    """A JPEG with detail of every size, the finer the fainter, as photographs have. Equal seeds give equal bytes."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), "grey")
    for across in _DETAIL:
        layer = rng.integers(0, 256, (max(2, across * height // width), across, 3), dtype=np.uint8)
        smooth = Image.fromarray(layer).resize((width, height), Image.Resampling.BICUBIC)
        image = Image.blend(image, smooth, min(0.9, 1.6 / across**0.5))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return file.getvalue()


def measure(
    megapixels: Sequence[float], models: Sequence[str], rounds: int, processor: Processor | None = None
) -> list[PictureRow]:
    """All ways in turn, `rounds` times each. Raises ValueError for sizes and models that it does not know, and
    `loadtest.gateway.environment.ReferenceError`."""
    for given, known in ((megapixels, SIDES), (models, SPECS)):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"{unknown[0]} is none of {', '.join(map(str, known))}")
    start()
    rows = []
    with tempfile.TemporaryDirectory(prefix="degas-bench-") as folder:
        for size in megapixels:
            file = Path(folder) / "picture.jpg"
            file.write_bytes(photograph(*SIDES[size]))
            rows += [_row(size, model, file, rounds, processor) for model in models]
    return rows


def _row(size: float, model: str, file: Path, rounds: int, processor: Processor | None) -> PictureRow:
    data = file.read_bytes()
    body = base64.b64encode(data)
    job = Job(SPECS[model], _MAX_PIXELS, 1)
    ours: list[float] = []
    whole: list[float] = []
    theirs: list[float] = []
    asks_peer = processor is not None and model in PEERS
    if asks_peer:
        assert processor is not None
        processor.seconds(model, file)  # its first picture pays for imports
    for _ in range(rounds):
        ours.append(_seconds(prepare, body, job))
        whole.append(_seconds(prepare_whole, body, job))
        if asks_peer:
            assert processor is not None
            theirs.append(processor.seconds(model, file))
    differences = np.abs(_pixels(prepare(data, job)[1]) - _pixels(prepare_whole(data, job)))
    seconds, whole_seconds = statistics.median(ours), statistics.median(whole)
    their_seconds = statistics.median(theirs) if theirs else None
    return PictureRow(
        size,
        model,
        len(data),
        1 / seconds,
        1 / whole_seconds,
        whole_seconds / seconds,
        float(differences.mean()),
        float(np.percentile(differences, 99)),
        None if their_seconds is None else 1 / their_seconds,
        None if their_seconds is None else their_seconds / seconds,
    )


def prepare_whole(data: bytes, job: Job) -> list[bytes]:
    """The same sheets from all pixels of the picture, by Pillow alone: what a reduced one is compared with."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    resample = Image.Resampling[job.spec.resample.upper()]
    made: dict[object, Image.Image] = {}
    sheets = []
    for drawing in drawings(job.spec, image.width, image.height):
        part = image if drawing.box is None else image.crop(drawing.box)
        for number, size in enumerate(drawing.sizes, 1):
            key = (drawing.box, *drawing.sizes[:number])
            part = made[key] = made.get(key) or part.resize(size, resample)
        sheets.append(part.tobytes())
    hashlib.sha256(b"".join(sheets)).digest()
    return sheets


def _seconds(way: Callable[[bytes, Job], object], body: bytes, job: Job) -> float:
    begin = time.process_time()
    way(unpack(body, job), job)
    return time.process_time() - begin


def _pixels(parts: Sequence[bytes]) -> np.ndarray[Any, np.dtype[np.int16]]:
    return np.frombuffer(b"".join(parts), np.uint8).astype(np.int16)


def pictures_table(rows: Sequence[PictureRow]) -> Figures:
    """A line for each size and model."""
    names = (
        "megapixels",
        "model",
        "file kB",
        "pictures/s",
        "from all pixels",
        "gain",
        "mean difference",
        "p99",
        "transformers fast",
        "×",
    )
    table = Figures("prepared JPEGs a second and core", names, left=("model",), dim=("transformers fast",))
    for row in rows:
        table.add(
            f"{row.megapixels:g}",
            row.model,
            f"{row.file_bytes / 1000:.0f}",
            f"{row.pictures_per_s:.1f}",
            f"{row.full_decode_per_s:.1f}",
            f"{row.ratio:.2f}×",
            f"{row.mean_difference:.2f}",
            f"{row.p99_difference:.0f}",
            "" if row.transformers_per_s is None else f"{row.transformers_per_s:.1f}",
            "" if row.transformers_ratio is None else f"{row.transformers_ratio:.2f}×",
        )
    return table
