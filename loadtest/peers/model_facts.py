"""Owns what a comparison has to know of a model before it is loaded: format, words, and the type a server would pick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.config import WorkerConfig
from worker.device.cpu import CpuDevice
from worker.formats.errors import CheckpointError
from worker.formats.gguf_container import read_container
from worker.formats.gguf_parts import joined, parts_of
from worker.formats.open_source import open_source
from worker.resolve import choose_dtype


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """`dtype` is that of activations, as `degas worker` picks it on this machine."""

    format: str
    vocab_size: int
    dtype: str


def model_facts(path: Path) -> ModelFacts:
    """Read a file's or folder's head. Raises ValueError for one that cannot be opened or holds no model of text."""
    try:
        source = open_source(path)
        config = source.config.get("text_config", source.config)
        vocab_size = int(config["vocab_size"])
    except (CheckpointError, OSError, KeyError, TypeError) as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    dtype = choose_dtype(WorkerConfig(model=str(path)), CpuDevice(), source)
    return ModelFacts(_format(path, source.config), vocab_size, str(dtype).removeprefix("torch."))


def _format(path: Path, config: dict[str, Any]) -> str:
    """The type of most weights, as ggml or torch calls it."""
    if not path.is_file():
        return str(config.get("dtype") or config.get("torch_dtype") or "safetensors")
    return joined([read_container(part) for part in parts_of(path)]).usual_type
