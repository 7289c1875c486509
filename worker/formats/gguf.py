"""Owns a model in a GGUF file: settings, tensors, tokenizer and template, under Hugging Face's names. Decode thread."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worker.formats.chat_templates import turn_ends
from worker.formats.errors import CheckpointError
from worker.formats.gguf_architectures import Architecture, architecture_of
from worker.formats.gguf_blocks import unpacker
from worker.formats.gguf_container import Container, StoredTensor, read_container
from worker.formats.gguf_parts import joined, name_of_parts, parts_of
from worker.formats.gguf_tokenizer import chat_templates, make_tokenizer, special_ids, token_ids
from worker.formats.gguf_values import pieces
from worker.formats.model_names import name_of
from worker.formats.source import Packed, ProgressReport, Rename, Target

_SAMPLING = {
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "penalty_repeat": "repetition_penalty",
}


class Gguf:
    """A model in a GGUF file, or in the parts that one was split into; a `source.Source`.

    `path` is the file, or its first part. Raises CheckpointError when it is damaged, or of a kind nobody serves.
    """

    def __init__(self, path: Path) -> None:
        self.path = self.settings_file = path
        whole = joined(read_container(part) for part in parts_of(path))
        self._container = whole
        self._architecture = architecture_of(whole)
        special = special_ids(whole)
        self.config = self._architecture.config(whole) | {
            "bos_token_id": next(iter(special["bos_token_id"]), None),
            "eos_token_id": special["eos_token_id"],
        }
        self.generation = sampling_of(whole)
        self.templates = chat_templates(whole)
        self.model_id = name_of(path, name_of_parts(path))
        self.created = int(path.stat().st_mtime)
        self.num_bytes = whole.num_bytes

    def open(self, report: ProgressReport, rename: Rename = Target) -> GgufTensors:
        """See `Source.open`."""
        return GgufTensors(self._container, self._architecture, self.config, report, rename)

    def tokenizer(self) -> bytes:
        """See `Source.tokenizer`."""
        return make_tokenizer(self._container)

    def special_tokens(self) -> dict[str, str]:
        """See `Source.special_tokens`: a container names ids only, and gateways have the tokenizer to spell them."""
        return {}

    def end_tokens(self) -> list[int]:
        """See `Source.end_tokens`."""
        return token_ids(self._container, turn_ends(self.templates))


class GgufTensors:
    """The tensors of one model, unpacked one at a time as they are taken; a `source.Tensors`."""

    def __init__(
        self,
        container: Container,
        architecture: Architecture,
        config: dict[str, Any],
        report: ProgressReport,
        rename: Rename = Target,
    ) -> None:
        self._path = container.path
        self._architecture = architecture
        self._heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        self._report = report
        self._tensors: dict[str, tuple[StoredTensor, bool]] = {}
        for name, stored in container.tensors.items():
            canonical = architecture.canonical(name)
            target = None if canonical is None else rename(canonical)
            if target is None:
                continue
            if target.name in self._tensors:
                raise CheckpointError(f"stored twice, as {target.name}", file=stored.path, tensor=name)
            shaped = replace(stored, shape=architecture.shape(name, stored.shape))
            self._tensors[target.name] = (shaped, target.transposed)
        self._left = set(self._tensors)
        self._done_bytes = 0
        self.num_bytes = sum(stored.num_bytes for stored, _ in self._tensors.values())

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, *shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """See `Tensors.take`. Memory: the tensor itself, and a few megabytes of the blocks that are unpacked."""
        stored, transposed = self._find(name, shape)
        unpack = unpacker(stored.type.name)
        if unpack is None:
            raise CheckpointError(
                f"stored as {stored.type.name}, which cannot be unpacked here; "
                "`pip install gguf` knows more types, or take a file in Q4_K_M, Q8_0 or BF16",
                file=stored.path,
                tensor=stored.name,
            )
        tensor = torch.empty(stored.shape, dtype=dtype)
        flat = tensor.view(-1)
        width = stored.type.num_values
        offset = 1.0 if self._architecture.is_offset(stored.name) else 0.0
        for first, piece in pieces(stored):
            blocks = torch.from_numpy(piece).view(-1, stored.type.num_bytes)
            values = unpack(blocks)
            flat[first * width : (first + len(blocks)) * width] = (
                values.view(-1) - offset if offset else values.view(-1)
            )
        tensor = self._in_halves(stored, tensor)
        self._told(name, stored)
        tensor = tensor.t() if transposed else tensor
        return tensor.to(device=device).contiguous()

    def take_packed(self, name: str, *shape: int) -> Packed | None:
        """See `Tensors.take_packed`."""
        stored, transposed = self._find(name, shape)
        if stored.type.num_values == 1 or transposed or len(stored.shape) != 2:
            return None
        rows, values = stored.shape
        packed, done = torch.empty(stored.num_bytes, dtype=torch.uint8), 0
        for _, piece in pieces(stored):
            packed[done : done + len(piece)] = torch.from_numpy(piece)
            done += len(piece)
        packed = packed.view(rows, -1)
        self._told(name, stored)
        return Packed(stored.type.name, (rows, values), self._in_halves(stored, packed))

    def skip(self, name: str, *shape: int) -> None:
        """See `Tensors.skip`."""
        stored, _ = self._find(name, shape)
        self._told(name, stored)

    def kind_of(self, name: str) -> str:
        """See `Tensors.kind_of`."""
        found = self._tensors.get(name)
        return "" if found is None else found[0].type.name

    def finish(self) -> None:
        """See `Tensors.finish`."""
        if self._left:
            names = sorted(self._tensors[name][0].name for name in self._left)
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise CheckpointError(
                f"tensors this model does not know: {', '.join(names[:5])}{more}", file=self._path
            )

    def _find(self, name: str, shape: tuple[int, ...]) -> tuple[StoredTensor, bool]:
        found = self._tensors.get(name)
        if found is None:
            raise CheckpointError("missing", file=self._path, tensor=name, expected=shape)
        stored, transposed = found
        have = stored.shape[::-1] if transposed else stored.shape
        if have != shape:
            raise CheckpointError(
                "not of the shape that the file's settings ask for",
                file=stored.path,
                tensor=stored.name,
                expected=shape,
                found=have,
            )
        return found

    def _in_halves(self, stored: StoredTensor, tensor: Tensor) -> Tensor:
        """Rows of q and k as Hugging Face has them: the first halves of a head's rotary pairs, then the second."""
        if not self._architecture.is_interleaved(stored.name):
            return tensor
        heads = self._heads[stored.name.split(".")[2]]
        rows = tensor.shape[0]
        if rows % (2 * heads):
            raise CheckpointError(
                f"{rows} rows are not {heads} heads of rotary pairs", file=stored.path, tensor=stored.name
            )
        paired = tensor.view(heads, rows // heads // 2, 2, *tensor.shape[1:])
        return paired.transpose(1, 2).reshape(tensor.shape)

    def _told(self, name: str, stored: StoredTensor) -> None:
        if name in self._left:
            self._left.discard(name)
            self._done_bytes += stored.num_bytes
            self._report("weights", self._done_bytes, self.num_bytes)


def sampling_of(container: Container) -> dict[str, Any]:
    """What generation_config.json would say: the sampling that newer files recommend."""
    found = {
        ours: container.metadata[f"general.sampling.{theirs}"]
        for theirs, ours in _SAMPLING.items()
        if f"general.sampling.{theirs}" in container.metadata
    }
    return found | {"do_sample": True} if found else {}
