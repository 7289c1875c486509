"""Owns building a Moondream from a folder: which generation it is, and its tensors by one set of names. Decode thread, at load."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.formats.source import ProgressReport, Source, Tensors
from worker.models.linear import Take
from worker.models.moondream import Moondream
from worker.models.moondream3 import Moondream3
from worker.models.moondream_card import make_card
from worker.models.moondream_config import parse_config, says_third
from worker.models.moondream_names import canonical_name
from worker.models.taking import Taker

_MOST_LAYERS = 64  # in which a router is looked for


def load(source: Source, device: torch.device, dtype: torch.dtype, report: ProgressReport) -> Moondream:
    """Build the model, from either layout of names. Raises CheckpointError unless exactly this model is there."""
    checkpoint = source.open(report, canonical_name)
    third = says_third(source.config) or _has_router(checkpoint)
    config = parse_config(source.config, source.settings_file, third=third)
    taker = Taker(checkpoint, device, dtype)
    take = taker.take if "text.blocks.0.attn.tau.wqwv" in checkpoint else _joining(taker)
    kind = Moondream3 if third else Moondream
    model = kind(config, make_card(config, source), take, device, taker.take_weight)
    checkpoint.finish()
    model.weight_bytes, model.num_weights = taker.weight_bytes, taker.num_weights
    return model


def _has_router(checkpoint: Tensors) -> bool:
    """Whether there are experts, which only the third generation has: its config.json may say nothing."""
    return any(f"text.blocks.{layer}.mlp.router.weight" in checkpoint for layer in range(_MOST_LAYERS))


def _joining(taker: Taker) -> Take:
    """`taker.take`, but the two weights of Moondream 3's scaled attention, which most files store apart, come as one."""

    def take(name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if not name.endswith(".tau.wqwv"):
            return taker.take(name, *shape, dtype=dtype)
        heads, inputs = shape[0] // 2, shape[1]
        stem = name.removesuffix("wqwv")
        return torch.cat([taker.take(stem + part, heads, inputs, dtype=dtype) for part in ("wq", "wv")])

    return take
