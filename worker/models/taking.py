"""Owns handing a model its tensors from an open checkpoint, and counting what they are. Decode thread, at load."""

from __future__ import annotations

import math

import structlog
import torch
from torch import Tensor

from worker.formats.source import Tensors
from worker.models.linear import reads_blocks
from worker.native.quantised import KINDS, Quantised, QuantisedWeight

log = structlog.get_logger("worker.models")


class Taker:
    """`take` and `take_weight` of `layers.Take` and `layers.TakeWeight`, onto `device` in `dtype`."""

    def __init__(self, checkpoint: Tensors, device: torch.device, dtype: torch.dtype) -> None:
        self._checkpoint, self._device, self._dtype = checkpoint, device, dtype
        self._reads_blocks = device.type == "meta" or reads_blocks(device, dtype)
        self._expanded: set[str] = set()
        self.weight_bytes = self.num_weights = 0

    def take(
        self, name: str, *shape: int, dtype: torch.dtype | None = None, as_saved: bool = False
    ) -> Tensor:
        """The tensor of that name and shape, in `dtype` or the model's own. Raises CheckpointError.

        `as_saved`: where the model computes in fp32, a tensor that was saved in bf16 comes as that, which is all of it.
        """
        if as_saved and self._dtype == torch.float32 and self._checkpoint.kind_of(name) == "BF16":
            dtype = torch.bfloat16
        tensor = self._checkpoint.take(name, *shape, device=self._device, dtype=dtype or self._dtype)
        self.weight_bytes += tensor.nbytes
        self.num_weights += tensor.numel()
        return tensor

    def take_weight(self, name: str, *shape: int, as_saved: bool = False) -> Tensor | Quantised:
        """The same for the weight of a product, which stays in blocks where products here read its kind."""
        if not self._reads_blocks:
            return self.take(name, *shape, as_saved=as_saved)
        packed = self._checkpoint.take_packed(name, *shape)
        if packed is None:
            return self.take(name, *shape, as_saved=as_saved)
        if packed.type not in KINDS:
            if packed.type not in self._expanded:
                self._expanded.add(packed.type)
                log.info("weights_expanded", kind=packed.type, known=", ".join(KINDS))
            return self.take(name, *shape, as_saved=as_saved)
        self.weight_bytes += packed.data.nbytes
        self.num_weights += math.prod(packed.shape)
        return QuantisedWeight(packed.type, *packed.shape, packed.data.to(self._device))
