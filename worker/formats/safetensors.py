"""Owns reading safetensors: files read a piece at a time, checked against what the model expects. Decode thread.

Pickled weights are refused. A tensor that is missing, misshapen or unknown stops the start with its name, never with a
silently wrong model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from worker.formats.file_pieces import read_pieces
from worker.formats.folder_refusals import refuse_folder
from worker.formats.safetensors_header import read_header
from worker.formats.source import CheckpointError, Packed, ProgressReport, Rename, Target

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_NOT_MODELS = ("consolidated.safetensors", "adapter_model.safetensors", "adapters.safetensors")
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FP8 = "F8_E4M3"
_ROWS_AT_ONCE = 4096

ROW_SCALE = ".row_scale"
"""What takes the place of `.weight` in the canonical name of the scales of an FP8 weight's rows."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a tensor lies."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int  # of its first byte, in the file
    num_bytes: int
    transposed: bool


class Checkpoint:
    """An open checkpoint. `take` hands out each tensor once; `finish` raises an error if a tensor was not taken.

    `rename` maps stored names to canonical ones; None drops a tensor that the model computes itself. Raises
    CheckpointError on anything but whole, consistent safetensors files.
    """

    def __init__(self, folder: Path, report: ProgressReport, rename: Rename = Target) -> None:
        self.folder = folder
        self._report = report
        self._tensors: dict[str, _Stored] = {}
        headers = {path: read_header(path) for path in _find_files(folder)}
        prefix = _missing_prefix({name for header in headers.values() for name in header})
        for path, header in headers.items():
            for name, (dtype, shape, offset, num_bytes) in header.items():
                target = rename(name if name.startswith("lm_head.") else prefix + name)
                if target is None:
                    continue
                if target.name in self._tensors:
                    raise CheckpointError("stored twice", file=path, tensor=name)
                if target.joined:  # of the scales of rows there is no column
                    kept = 0 if target.name.endswith(ROW_SCALE) else 1
                    rows = shape[: len(shape) - kept]
                    shape = (math.prod(rows), *shape[len(rows) :])
                stored = _Stored(path, name, shape, dtype, offset, num_bytes, target.transposed)
                self._tensors[target.name] = stored
        self._left = set(self._tensors)
        self._done_bytes = 0
        self.num_bytes = sum(stored.num_bytes for stored in self._tensors.values())
        for path in {stored.path for stored in self._tensors.values()}:
            _check_whole(path)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, *shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The tensor of that canonical name, of this shape, as a copy on `device` in `dtype`.

        Raises CheckpointError when it is missing, of another shape, or not floating point.
        """
        stored = self._find(name, shape)
        if stored.dtype == _FP8:
            return self._take_scaled(name, stored, device, dtype)
        tensor = torch.empty(stored.shape, device=device, dtype=dtype)
        flat, done = tensor.view(-1), 0
        for values in _values(stored):
            flat[done : done + len(values)].copy_(values)
            done += len(values)
        self._told(name, stored)
        return tensor.t().contiguous() if stored.transposed else tensor

    def slabs(self, name: str, *shape: int) -> Iterator[Tensor] | None:
        """See `source.slabs_of`."""
        stored = self._find(name, shape)
        if stored.transposed or len(stored.shape) != 2 or stored.dtype == _FP8:
            return None
        slabs = (values.view(-1, stored.shape[1]) for values in _values(stored, stored.shape[1]))
        return slabs if stored.dtype != "F64" else (slab.float() for slab in slabs)

    def _take_scaled(self, name: str, stored: _Stored, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A matrix of FP8 (e4m3), each row times its scale; some rows at a time are widened."""
        scale_name = _scale_of(name)
        if scale_name not in self._tensors or stored.transposed:
            problem = (
                f"{_FP8} without scales of its rows is not supported; take the model's own folder in bf16"
            )
            raise CheckpointError(problem, file=stored.path, tensor=stored.name)
        rows, columns = stored.shape
        scales = self.take(scale_name, rows, device=torch.device("cpu"), dtype=torch.float32)
        try:
            with safe_open(stored.path, framework="pt", device="cpu") as file:
                narrow: Tensor = file.get_tensor(stored.name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(str(error), file=stored.path, tensor=stored.name) from error
        whole = torch.empty(rows, columns, dtype=dtype, device=device)
        for first in range(0, rows, _ROWS_AT_ONCE):
            some = slice(first, first + _ROWS_AT_ONCE)
            values = narrow.view(rows, columns)[some].float()
            whole[some] = (values * scales[some].unsqueeze(1)).to(dtype)
        self._told(name, stored)
        return whole

    def take_packed(self, name: str, *shape: int) -> Packed | None:
        """See `Tensors.take_packed`: no tensor here is stored in blocks."""
        return None

    def skip(self, name: str, *shape: int) -> None:
        """See `Tensors.skip`."""
        self._told(name, self._find(name, shape))
        scale = self._tensors.get(_scale_of(name))
        if scale is not None:
            self._told(_scale_of(name), scale)

    def kind_of(self, name: str) -> str:
        """See `Tensors.kind_of`."""
        stored = self._tensors.get(name)
        return "" if stored is None else stored.dtype

    def _find(self, name: str, shape: tuple[int, ...]) -> _Stored:
        stored = self._tensors.get(name)
        if stored is None:
            raise CheckpointError(
                "missing: the download is incomplete, or config.json is another model's",
                file=self.folder,
                tensor=name,
                expected=shape,
            )
        found = stored.shape[::-1] if stored.transposed else stored.shape
        if found != shape:
            raise CheckpointError(
                "not of the shape that config.json asks for",
                file=stored.path,
                tensor=stored.name,
                expected=shape,
                found=found,
            )
        return stored

    def _told(self, name: str, stored: _Stored) -> None:
        if name in self._left:
            self._left.discard(name)
            self._done_bytes += stored.num_bytes
            self._report("weights", self._done_bytes, self.num_bytes)

    def finish(self) -> None:
        """Raises CheckpointError naming tensors that were never taken."""
        if self._left:
            names = sorted(self._left)
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            listed = ", ".join(self._tensors[name].name for name in names[:5])
            path = self._tensors[names[0]].path
            raise CheckpointError(
                f"tensors this model does not know: {listed}{more}; take the config.json that belongs to these weights",
                file=path,
            )


def _scale_of(name: str) -> str:
    """The canonical name of the scales of an FP8 weight's rows."""
    return name.removesuffix(".weight") + ROW_SCALE


def _find_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files: one, or those that an index names."""
    index_path = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index_path.is_file():
        index = _read_json(index_path)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError("no weight_map in this index", file=index_path)
        return _indexed_files(index_path, weight_map)
    if single.is_file():
        return [single]
    others = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    shards = [path for path in others if _SHARD.search(path.name)]
    if shards:
        raise CheckpointError(
            f"{len(others)} safetensors files and no index (model.safetensors.index.json): the download is incomplete",
            file=folder,
        )
    others = [path for path in others if path.name not in _NOT_MODELS]
    if len(others) == 1:
        return others
    if others:
        raise CheckpointError(f"{len(others)} safetensors files and no index", file=folder)
    raise refuse_folder(folder, "no model.safetensors in this folder")


def _missing_prefix(names: set[str]) -> str:
    """The prefix that is missing if the decoder was saved without its head: `layers.0…`, not `model.layers.0…`."""
    bare = "embed_tokens.weight" in names and not any(name.startswith("model.") for name in names)
    return "model." if bare else ""


def _indexed_files(index_path: Path, weight_map: dict[str, Any]) -> list[Path]:
    """The shards of an index, each checked to hold exactly the tensors that the index says."""
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{shard!r} is no safetensors file of this folder", file=index_path)
        shards.setdefault(shard, set()).add(tensor)
    paths = []
    for shard, tensors in sorted(shards.items()):
        path = index_path.parent / shard
        if not path.is_file():
            raise CheckpointError(
                f"no such file, though {index_path.name} names it: the download is incomplete, fetch it again",
                file=path,
            )
        difference = sorted(tensors.symmetric_difference(read_header(path)))
        if difference:
            where = "named by the index only" if difference[0] in tensors else "not named by the index"
            raise CheckpointError(where, file=path, tensor=difference[0])
        paths.append(path)
    return paths


def _check_whole(path: Path) -> None:
    """Raises CheckpointError unless the tensors of the header cover the file, one behind the other."""
    try:
        with safe_open(path, framework="pt", device="cpu"):
            pass
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"not a whole safetensors file: {error}", file=path) from error


def _values(stored: _Stored, together: int = 1) -> Iterator[Tensor]:
    """(N,) of the file's dtype each, N a multiple of `together`; see `read_pieces`."""
    dtype = _FLOATS.get(stored.dtype)
    if dtype is None:
        problem = f"{stored.dtype} weights are not supported, only {', '.join(_FLOATS)}"
        raise CheckpointError(problem, file=stored.path, tensor=stored.name)
    whole = together * dtype.itemsize
    for piece in read_pieces(stored.path, stored.name, stored.offset, stored.num_bytes, whole):
        yield torch.from_numpy(piece).view(dtype)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"no {path.name} in this folder", file=path.parent) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"not readable as JSON: {error}", file=path) from error
