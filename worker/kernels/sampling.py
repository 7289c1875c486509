"""Owns which of the two sampling kernels runs, and what both are given for a model: ids it never says. Decode thread."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.device.choices import choices
from worker.kernels.outputs import Sinks
from worker.kernels.sample import allowed_words, sample
from worker.kernels.sample_histogram import sample_by_histogram


class SamplingKernels:
    """The sampling kernels for one model; `suppress_ids` are never drawn."""

    def __init__(self, suppress_ids: Sequence[int], vocab_size: int, device: torch.device) -> None:
        self._allowed = allowed_words(list(suppress_ids), vocab_size, device)

    def sample(
        self,
        logits: Tensor,
        draw: Sequence[Tensor],
        words: Tensor | None = None,
        sinks: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(ids (R,) int64, bad (R,) int32) as `worker.kernels.sample.sample`. `draw`: temperature, top_k, top_p, min_p and
        uniforms; `sinks`: the fields of `outputs.Sinks`, where the kernel also leaves ids and `bad`."""
        kernel = sample_by_histogram if choices().histogram else sample
        to = None if sinks is None else Sinks(*sinks)
        return kernel(logits, *draw, words=words, allowed=self._allowed, sinks=to)
