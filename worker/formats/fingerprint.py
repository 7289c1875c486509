"""Owns telling whether two workers read the same weights in the same way. Decode thread.

What one worker computes for another means something only by the same weights. Reading all of a model of some gigabytes for
that would take as long as loading it: a digest is made of the settings, of every file's size, and of samples all through it.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import Final

from worker.formats.source import Source

NUM_SAMPLES: Final = 64
SAMPLE_BYTES: Final = 4096


def fingerprint(source: Source, *how: str) -> str:
    """32 hexadecimal digits; `how` is what else decides what the weights become, such as `quantize`."""
    digest = blake2b(digest_size=16)
    digest.update(json.dumps([source.config, how], sort_keys=True, default=str).encode())
    for file in _files(source.path):
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as data:
            for sample in range(NUM_SAMPLES):
                data.seek(max(0, size - SAMPLE_BYTES) * sample // (NUM_SAMPLES - 1))
                digest.update(data.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    """The files with the weights; of a GGUF file in parts all parts, which are named alike up to their number."""
    if path.is_dir():
        return sorted(path.glob("*.safetensors"))
    stem, mark, _ = path.name.rpartition("-00001-of-")
    return sorted(path.parent.glob(f"{stem}{mark[:1]}*-of-*.gguf")) if mark else [path]
