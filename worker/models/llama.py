"""Owns the Llama family: what of the dense decoder it uses, and its loader. Decode thread."""

from __future__ import annotations

import torch

from worker.formats.source import ProgressReport, Source
from worker.models.dense import Dense, load_dense
from worker.models.dense_config import make_card, parse_config


def load(source: Source, device: torch.device, dtype: torch.dtype, report: ProgressReport) -> Dense:
    """Build a Llama (2, 3, 3.1, 3.2 text). Raises CheckpointError."""
    sizes = parse_config(source.config, source.settings_file, model_type="llama", qk_norm=False)
    return load_dense(source, sizes, make_card(sizes, source, "llama"), device, dtype, report)
