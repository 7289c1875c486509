"""Owns the setting `quantize`: a model of float weights that hands out its products' matrices in blocks. Decode thread, at load.

A matrix is read, rounded and let go of one at a time; what it came to is kept in the user's cache. Norms, biases, embeddings
apart from the head and whatever else a model takes as floats stay as they are; the head keeps eight bits in either format,
because every token's logits pass through its one matrix.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor

from worker.formats.errors import CheckpointError
from worker.formats.gguf_parts import parts_of
from worker.formats.source import Packed, ProgressReport, Rename, Source, Target, Tensors, slabs_of
from worker.native.quantised import KINDS
from worker.native.quantised_cache import QuantisedCache
from worker.native.quantiser import KINDS_OF
from worker.native.rounding import round_into

HEADS = ("lm_head.weight", "embed_tokens.weight")
log = structlog.get_logger("worker.native")


class QuantisedSource:
    """`source` with matrices in the blocks of `made`, int8 or int4; a `source.Source`. `folder`: the cache, None: the user's."""

    def __init__(self, source: Source, made: str, folder: Path | None = None) -> None:
        self._source, self._made, self._folder = source, made, folder
        self.path, self.settings_file = source.path, source.settings_file
        self.model_id, self.created = source.model_id, source.created
        self.num_bytes = source.num_bytes // (2 if made == "int8" else 3)
        self.config: dict[str, Any] = source.config
        self.generation, self.templates = source.generation, source.templates

    def open(self, report: ProgressReport, rename: Rename = Target) -> QuantisedTensors:
        """See `Source.open`."""
        cache = QuantisedCache(self.model_id, _files(self.path), self._made, self._folder)
        return QuantisedTensors(self._source.open(report, rename), self._made, cache, self.path)

    def tokenizer(self) -> bytes:
        """See `Source.tokenizer`."""
        return self._source.tokenizer()

    def end_tokens(self) -> list[int]:
        """See `Source.end_tokens`."""
        return self._source.end_tokens()

    def special_tokens(self) -> dict[str, str]:
        """See `Source.special_tokens`."""
        return self._source.special_tokens()


class QuantisedTensors:
    """The tensors of one model; a `source.Tensors`. `take_packed` raises CheckpointError for what is in blocks already."""

    def __init__(self, inner: Tensors, made: str, cache: QuantisedCache, path: Path) -> None:
        self._inner, self._made, self._cache, self._path = inner, made, cache, path
        self._is_told = cache.is_whole

    def __contains__(self, name: str) -> bool:
        return name in self._inner

    def take(self, name: str, *shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """See `Tensors.take`."""
        return self._inner.take(name, *shape, device=device, dtype=dtype)

    def skip(self, name: str, *shape: int) -> None:
        """See `Tensors.skip`."""
        self._inner.skip(name, *shape)

    def take_packed(self, name: str, *shape: int) -> Packed | None:
        """See `Tensors.take_packed`: any matrix that `fits`, in blocks."""
        found = self._inner.take_packed(name, *shape)
        if found is not None:
            raise CheckpointError(
                f"quantised already, as {found.type}, so quantize {self._made} does not apply: leave it out",
                file=self._path,
                tensor=name,
            )
        kind = block_kind(name, shape, self._made)
        if kind is None:
            return None
        rows, columns = shape
        values, num_bytes, _ = KINDS[kind]
        blocks = self._cache.read(name, kind, rows, columns // values * num_bytes)
        if blocks is not None:
            self._inner.skip(name, *shape)
            return Packed(kind, (rows, columns), blocks)
        if not self._is_told:
            self._is_told = True
            log.info(
                "quantize", to=self._made, note="once for these files; later starts find it in the cache"
            )
        blocks = torch.empty(rows, columns // values * num_bytes, dtype=torch.uint8)
        done = 0
        for slab in slabs_of(self._inner, name, *shape):
            if not round_into(slab, kind, blocks[done : done + len(slab)]):
                return None
            done += len(slab)
        self._inner.skip(name, *shape)
        self._cache.write(name, kind, blocks)
        return Packed(kind, (rows, columns), blocks)

    def kind_of(self, name: str) -> str:
        """See `Tensors.kind_of`: as it is stored in the files."""
        return self._inner.kind_of(name)

    def finish(self) -> None:
        """See `Tensors.finish`."""
        self._inner.finish()
        self._cache.finish()


def block_kind(name: str, shape: tuple[int, ...], made: str) -> str | None:
    """The blocks that a product's matrix of that name and shape is rounded to; None where blocks do not divide its rows."""
    kind = KINDS_OF["int8" if name.endswith(HEADS) else made]
    return None if shape[1] % KINDS[kind][0] else kind


def _files(path: Path) -> list[Path]:
    """All that weights may be read from."""
    if path.is_file():
        return list(parts_of(path))
    return sorted([*path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")])
