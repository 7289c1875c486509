"""Owns quantised matrices kept on disk from start to start: a folder a model, in the user's cache. Decode thread, at load.

A folder is made beside its place and moved there once it is whole, so that a reader finds all of it or nothing. Its name
changes with the model's files (path, size, time of change), the format and the quantiser's version.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import structlog
import torch
from torch import Tensor

from worker.native.build import private_folder
from worker.native.quantiser import VERSION

_INDEX = "index.json"
_ABANDONED_S = 3600.0  # a folder that nobody has finished for so long belongs to a process that died
log = structlog.get_logger("worker.native")


class QuantisedCache:
    """The blocks of one model in one format. `files`: all that the weights are read from.

    A cache that cannot be read or written costs time and is logged; it raises nothing.
    """

    def __init__(self, model: str, files: Sequence[Path], made: str, folder: Path | None = None) -> None:
        self._part: Path | None = None
        self._index: dict[str, list[int | str]] = {}
        self._home: Path | None = None
        self.is_whole = False
        try:
            base = private_folder(folder or Path.home() / ".cache" / "degas")
            home = None if base is None else private_folder(base / "quantised")
            self._family, name = _names(model, files, made)
        except (OSError, RuntimeError) as error:
            log.warning("quantised_not_kept", reason=str(error))
            return
        if home is None:
            return
        self._home, self._place = home, home / name
        try:
            self._index = json.loads((self._place / _INDEX).read_bytes())
            self.is_whole = True
        except (OSError, ValueError):
            self._begin()

    def read(self, name: str, kind: str, rows: int, row_bytes: int) -> Tensor | None:
        """Blocks (rows, row_bytes) uint8 of that kind; None where they are not kept, or damaged."""
        if not self.is_whole or self._index.get(name) != [kind, rows, row_bytes]:
            return None
        try:
            data = np.fromfile(self._place / name, np.uint8)
        except OSError:
            return None
        if len(data) != rows * row_bytes:
            return None
        return torch.from_numpy(data).view(rows, row_bytes)

    def write(self, name: str, kind: str, blocks: Tensor) -> None:
        """Keep blocks (rows, bytes of a row). `name` is one that a model's own code asks for, and a file's name."""
        if self._part is None:
            return
        try:
            (self._part / name).write_bytes(blocks.contiguous().numpy().data)
            self._index[name] = [kind, *blocks.shape]
        except OSError as error:
            self._give_up(error)

    def finish(self) -> None:
        """All is written: let the next start find it, and remove what earlier contents of the same files left."""
        if self._part is None or self._home is None:
            return
        try:
            (self._part / _INDEX).write_text(json.dumps(self._index))
            shutil.rmtree(self._place, ignore_errors=True)
            self._part.rename(self._place)
            self._part = None
            self._clear(self._home)
        except OSError as error:  # another worker was quicker, or the disk is full
            self._give_up(error)

    def _begin(self) -> None:
        self._index = {}
        try:
            self._part = Path(tempfile.mkdtemp(prefix=f"{self._place.name}.part", dir=self._place.parent))
            # A load that fails leaves nothing behind; one that is killed does, until `_clear`.
            weakref.finalize(self, shutil.rmtree, self._part, ignore_errors=True)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.warning("quantised_not_kept", reason=str(error))
        if self._part is not None:
            shutil.rmtree(self._part, ignore_errors=True)
        self._part = None

    def _clear(self, home: Path) -> None:
        for other in home.glob(f"{self._family}-*"):
            is_part = other.suffix.startswith(".part")
            if other == self._place or (is_part and time.time() - other.stat().st_mtime < _ABANDONED_S):
                continue
            shutil.rmtree(other, ignore_errors=True)


def _names(model: str, files: Sequence[Path], made: str) -> tuple[str, str]:
    """What all contents of these files share in their names, and the name of today's. Raises OSError for a missing file."""
    where, what = hashlib.sha256(), hashlib.sha256(f"{made} {VERSION}".encode())
    for file in files:
        real = file.resolve()
        status = real.stat()
        where.update(f"{real}\0".encode())
        what.update(f"{real}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    plain = re.sub(r"[^A-Za-z0-9]+", "-", model)[:40]
    family = f"{plain}-{made}-{where.hexdigest()[:8]}"
    return family, f"{family}-{what.hexdigest()[:16]}"
