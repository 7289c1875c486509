"""Owns models that were split into several GGUF files (`…-00001-of-0000N.gguf`): which belong together. Any thread."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from worker.formats.errors import CheckpointError
from worker.formats.gguf_container import Container, StoredTensor

_PART = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})$")


def name_of_parts(path: Path) -> str:
    """The name that all parts share; the file's own where it is whole."""
    match = _PART.match(path.stem)
    return match["stem"] if match else path.stem


def parts_of(path: Path) -> list[Path]:
    """The files that one model was split into, in order; the file alone where it is whole.

    Raises CheckpointError naming a part that is missing.
    """
    match = _PART.match(path.stem)
    if match is None:
        return [path]
    count = int(match["count"])
    parts = [
        path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)
    ]
    for part in parts:
        if not part.is_file():
            raise CheckpointError(
                f"one of the {count} parts of this model is missing: the download is incomplete; fetch it into "
                "the same folder",
                file=part,
            )
    return parts or [path]


def joined(containers: Iterable[Container]) -> Container:
    """One container of all parts. Settings are those of the first."""
    parts = list(containers)
    first = parts[0]
    said = first.metadata.get("split.count", 1)
    if isinstance(said, int) and said > len(parts):
        raise CheckpointError(
            f"a part of a model in {said} files, without its part's number in its name; give the files their "
            "names back (…-00001-of-0000N.gguf)",
            file=first.path,
        )
    tensors: dict[str, StoredTensor] = {}
    for part in parts:
        for name, stored in part.tensors.items():
            if name in tensors:
                raise CheckpointError("stored in two parts", file=part.path, tensor=name)
            tensors[name] = stored
    return Container(first.path, first.metadata, tensors)
