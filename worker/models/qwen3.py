"""Owns the dense Qwen3 family: what of the dense decoder it uses, and its loader. Decode thread."""

from __future__ import annotations

import torch

from worker.formats.source import ProgressReport, Source
from worker.models.dense import Dense, load_dense
from worker.models.dense_config import make_card, parse_config

_HEAD_DIM = 128  # whatever hidden_size and the number of heads are, unless config.json says otherwise


def load(source: Source, device: torch.device, dtype: torch.dtype, report: ProgressReport) -> Dense:
    """Build a dense Qwen3. Raises CheckpointError."""
    sizes = parse_config(
        source.config, source.settings_file, model_type="qwen3", qk_norm=True, head_dim=_HEAD_DIM
    )
    return load_dense(source, sizes, make_card(sizes, source, "qwen3"), device, dtype, report)
