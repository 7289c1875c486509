"""Owns opening whichever format lies at a path. Decode thread."""

from __future__ import annotations

from pathlib import Path

from worker.formats.folder import Folder
from worker.formats.gguf import Gguf
from worker.formats.locate import file_or_folder
from worker.formats.source import Source


def open_source(path: Path) -> Source:
    """The model at `path`, by what lies there: a folder, or a GGUF file.

    Raises CheckpointError saying what does not fit and what would.
    """
    found = file_or_folder(path)
    return Gguf(found) if found.is_file() else Folder(found)
