"""Owns the Llama family: what of the dense decoder it uses, and its loader. Decode thread."""

from __future__ import annotations

from pathlib import Path

import torch

from worker.models.contract import ProgressReport
from worker.models.dense import Dense, load_dense
from worker.models.dense_config import make_card, parse_config
from worker.models.weights import read_config


def load(folder: Path, device: torch.device, dtype: torch.dtype, report: ProgressReport) -> Dense:
    """Build a Llama (2, 3, 3.1, 3.2 text) from a Hugging Face folder. Raises CheckpointError."""
    raw = read_config(folder)
    sizes = parse_config(raw, folder, model_type="llama", qk_norm=False)
    return load_dense(folder, sizes, make_card(sizes, raw, folder, "llama"), device, dtype, report)
