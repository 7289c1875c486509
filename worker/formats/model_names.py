"""Owns what a model is called by where it lies: its folder, or its repository in a hub's cache. Any thread."""

from __future__ import annotations

from pathlib import Path

_PREFIX = "models--"


def repository_of(path: Path) -> str | None:
    """`org/name` of a folder or file in a hub's cache (`models--org--name/snapshots/<commit>/…`); None elsewhere."""
    absolute = path.absolute()  # not resolved: a snapshot's files are links into another folder
    for part in (absolute, *absolute.parents):
        if part.name.startswith(_PREFIX):
            return part.name.removeprefix(_PREFIX).replace("--", "/", 1)
    return None


def name_of(path: Path, otherwise: str) -> str:
    """What the model at `path` is called: its repository's name, else `otherwise`."""
    return repository_of(path) or otherwise
