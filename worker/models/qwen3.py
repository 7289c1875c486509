"""Owns the dense Qwen3 family: what of the dense decoder it uses, and its loader. Decode thread."""

from __future__ import annotations

from pathlib import Path

import torch

from worker.models.contract import ProgressReport
from worker.models.dense import Dense, load_dense
from worker.models.dense_config import make_card, parse_config
from worker.models.weights import read_config

_HEAD_DIM = 128  # whatever hidden_size and the number of heads are, unless config.json says otherwise


def load(folder: Path, device: torch.device, dtype: torch.dtype, report: ProgressReport) -> Dense:
    """Build a dense Qwen3 from a Hugging Face folder. Raises CheckpointError."""
    raw = read_config(folder)
    sizes = parse_config(raw, folder, model_type="qwen3", qk_norm=True, head_dim=_HEAD_DIM)
    return load_dense(folder, sizes, make_card(sizes, raw, folder, "qwen3"), device, dtype, report)
