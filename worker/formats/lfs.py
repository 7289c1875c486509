"""Owns telling a Git LFS pointer from the file that it stands for. Any thread."""

from __future__ import annotations

from pathlib import Path

from worker.formats.errors import CheckpointError

_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path) -> None:
    """Raise CheckpointError if `path` is what Git leaves of a large file until LFS has fetched it."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError:
        return  # opening the file raises a better error
    if start == _POINTER:
        raise CheckpointError(
            "a Git LFS pointer, not the file itself; run `git lfs pull` in this folder", file=path
        )
