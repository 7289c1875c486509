"""Owns a second implementation of Moondream's text model, written out plainly: one sequence, run whole, by a dense mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from worker.models.moondream_config import TextConfig

Span = tuple[int, int]


class PlainText:
    """The text model of a folder in the released layout, in fp32."""

    def __init__(self, folder: Path, config: TextConfig) -> None:
        self.config = config
        self._tensors: Mapping[str, Tensor] = {
            name.removeprefix("model."): tensor.float()
            for name, tensor in load_file(folder / "model.safetensors").items()
        }

    def words(self, ids: Sequence[int]) -> Tensor:
        """(N, D) input embeddings."""
        return self._tensors["text.wte"][torch.tensor(ids)]

    def hidden(self, inputs: Tensor, blocks: Sequence[Span]) -> Tensor:
        """(N, D) before the final norm. Causal, and both ways within each of `blocks`, [first, end)."""
        count = inputs.shape[0]
        mask = torch.ones(count, count, dtype=torch.bool).tril()
        for first, end in blocks:
            mask[first:end, first:end] = True
        out = inputs
        for index in range(self.config.n_layers):
            out = self._layer(out, f"text.blocks.{index}", mask)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, V)."""
        return self._linear(self._norm(hidden, "text.post_ln"), "text.lm_head")

    def _layer(self, inputs: Tensor, name: str, mask: Tensor) -> Tensor:
        config, count = self.config, inputs.shape[0]
        normed = self._norm(inputs, f"{name}.ln")
        heads = self._linear(normed, f"{name}.attn.qkv").view(count, -1, config.head_dim).transpose(0, 1)
        q, k, v = heads.split([config.n_heads, config.n_kv_heads, config.n_kv_heads])
        shared = config.n_heads // config.n_kv_heads
        k, v = (one.repeat_interleave(shared, 0) for one in (_rotated(k), v))
        scores = _rotated(q) @ k.transpose(1, 2) / config.head_dim**0.5
        mixed = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        attended = self._linear(mixed.transpose(0, 1).reshape(count, -1), f"{name}.attn.proj")
        inner = F.gelu(self._linear(normed, f"{name}.mlp.fc1"), approximate="tanh")
        return inputs + attended + self._linear(inner, f"{name}.mlp.fc2")

    def _norm(self, inputs: Tensor, name: str) -> Tensor:
        weight, bias = self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"]
        return F.layer_norm(inputs, (inputs.shape[-1],), weight, bias, 1e-5)

    def _linear(self, inputs: Tensor, name: str) -> Tensor:
        return F.linear(inputs, self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"])

    def region(self, name: str, inputs: Tensor) -> Tensor:
        """One of the region model's linear layers or decoders."""
        if f"region.{name}.weight" in self._tensors:
            return self._linear(inputs, f"region.{name}")
        inner = F.gelu(self._linear(inputs, f"region.{name}.fc1"), approximate="tanh")
        return self._linear(inner, f"region.{name}.fc2")

    def fourier(self, values: Tensor, kind: str) -> Tensor:
        """(N, 1 or 2) coordinates or sizes → (N, D) input embeddings; `kind` coord or size."""
        phases = 2 * torch.pi * values @ self._tensors[f"region.{kind}_features"]
        return self.region(f"{kind}_encoder", torch.cat([phases.cos(), phases.sin()], -1))


def _rotated(heads: Tensor) -> Tensor:
    """(H, N, head_dim): the first half of the dimensions turned by position, in halves."""
    half = heads.shape[-1] // 4
    angles = torch.arange(heads.shape[1])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    first, second, rest = heads.split([half, half, heads.shape[-1] - 2 * half], -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
