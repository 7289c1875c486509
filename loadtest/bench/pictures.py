"""Owns `degas bench pictures`: prepared pictures a second and core, beside decoding all of a picture.

Runs in the main thread: what a picture process does for one request, from the data URL's body to pixels.
"""

from __future__ import annotations

import base64
import hashlib
import io
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from gateway.confined.image_process import Job, prepare, unpack
from gateway.confined.pictures.decode import start
from loadtest.tables import Figures
from shared.protocol import ImageSpec, OverlappingTiles
from shared.tiling import canvas_for

SIDES = {0.5: (866, 577), 2.0: (1632, 1224), 12.0: (4000, 3000)}
SPECS = {
    "moondream": ImageSpec(378, 729, OverlappingTiles(patch_size=14, margin_patches=4, max_crops=12)),
    "pocket": ImageSpec(56, 64, OverlappingTiles(patch_size=7, margin_patches=1, max_crops=4)),
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


def measure(megapixels: Sequence[float], models: Sequence[str], rounds: int) -> list[PictureRow]:
    """Both ways in turn, `rounds` times each. Raises ValueError for sizes and models that it does not know."""
    for given, known in ((megapixels, SIDES), (models, SPECS)):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"{unknown[0]} is none of {', '.join(map(str, known))}")
    start()
    rows = []
    for size in megapixels:
        body = base64.b64encode(data := photograph(*SIDES[size]))
        for model in models:
            job = Job(SPECS[model], _MAX_PIXELS, 1)
            ours: list[float] = []
            whole: list[float] = []
            for _ in range(rounds):
                ours.append(_seconds(prepare, body, job))
                whole.append(_seconds(prepare_whole, body, job))
            differences = np.abs(_pixels(prepare(data, job)[1]) - _pixels(prepare_whole(data, job)))
            seconds, whole_seconds = statistics.median(ours), statistics.median(whole)
            rows.append(
                PictureRow(
                    size,
                    model,
                    len(data),
                    1 / seconds,
                    1 / whole_seconds,
                    whole_seconds / seconds,
                    float(differences.mean()),
                    float(np.percentile(differences, 99)),
                )
            )
    return rows


def prepare_whole(data: bytes, job: Job) -> tuple[bytes, bytes]:
    """Crop and canvas from all pixels of the picture, by Pillow alone: what a reduced one is compared with."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    spec = job.spec
    assert isinstance(spec.rule, OverlappingTiles)
    canvas_size = canvas_for(image.height, image.width, crop_size=spec.crop_size, rule=spec.rule)
    crop = image.resize((spec.crop_size, spec.crop_size), Image.Resampling.LANCZOS).tobytes()
    canvas = image.resize((canvas_size.width, canvas_size.height), Image.Resampling.LANCZOS).tobytes()
    hashlib.sha256(crop + canvas).digest()
    return crop, canvas


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
    )
    table = Figures("prepared JPEGs a second and core", names, left=("model",))
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
        )
    return table
