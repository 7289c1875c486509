"""Owns a second implementation of Moondream 3's text model, written out plainly from what is published of it: one sequence, run
whole, by a dense mask and through all experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.models.moondream_config import TextConfig

Span = tuple[int, int]


class PlainText3:
    """The text model and region heads from tensors in the newer layout, in fp32."""

    def __init__(self, tensors: Mapping[str, Tensor], config: TextConfig) -> None:
        assert config.moe is not None
        self.config, self._experts = config, config.moe
        self._tensors = {name.removeprefix("model."): tensor.float() for name, tensor in tensors.items()}

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
            name = f"text.blocks.{index}"
            normed = self._norm(out, f"{name}.ln")
            mlp = self._routed if index >= self._experts.start_layer else self._dense
            out = out + self._attention(normed, f"{name}.attn", mask) + mlp(normed, f"{name}.mlp")
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, V)."""
        return self._linear(self._norm(hidden, "text.post_ln"), "text.lm_head")

    def _attention(self, normed: Tensor, name: str, mask: Tensor) -> Tensor:
        count, heads, width = normed.shape[0], self.config.n_heads, self.config.head_dim
        qkv = self._linear(normed, f"{name}.qkv")
        q, k, v = (part.view(count, heads, width) for part in qkv.chunk(3, dim=-1))
        seen = F.gelu(qkv, approximate="tanh")
        positions = torch.arange(count, dtype=torch.float32)[:, None] + 1
        by_position = 0.5 + torch.sigmoid(self._tensors[f"{name}.tau.alpha"] * positions.log())
        q = q * (torch.tanh(seen @ self._tensors[f"{name}.tau.wq"].t()) + by_position)[..., None]
        v = v * (torch.tanh(seen @ self._tensors[f"{name}.tau.wv"].t()) + by_position)[..., None]
        q, k = self._rotated(q), self._rotated(k)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(width)
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)
        return self._linear(mixed.reshape(count, -1), f"{name}.proj")

    def _rotated(self, heads: Tensor) -> Tensor:
        """(N, H, head_dim): the first half of the dimensions turned by position, in halves."""
        quarter = heads.shape[-1] // 4
        angles = torch.arange(len(heads))[:, None] * self.config.rope_theta ** (
            -torch.arange(quarter) / quarter
        )
        first, second = heads[..., :quarter], heads[..., quarter : 2 * quarter]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        turned = [first * cos - second * sin, first * sin + second * cos, heads[..., 2 * quarter :]]
        return torch.cat(turned, -1)

    def _dense(self, normed: Tensor, name: str) -> Tensor:
        inner = F.gelu(self._linear(normed, f"{name}.fc1"), approximate="tanh")
        return self._linear(inner, f"{name}.fc2")

    def _routed(self, normed: Tensor, name: str) -> Tensor:
        """Every expert of every row, those that were not chosen times 0."""
        router = self._linear(normed, f"{name}.router")
        chosen = router.argsort(-1, descending=True)[:, : self._experts.experts_per_token]
        chosen_scores = torch.full_like(router, -torch.inf).scatter(1, chosen, router.gather(1, chosen))
        both = torch.einsum("efd,nd->nef", self._tensors[f"{name}.fc1.weight"], normed)
        h, g = both.chunk(2, dim=-1)
        each = torch.einsum("edf,nef->ned", self._tensors[f"{name}.fc2.weight"], F.gelu(h) * (g + 1))
        return torch.einsum("ne,ned->nd", chosen_scores.softmax(-1), each)

    def _norm(self, inputs: Tensor, name: str) -> Tensor:
        weight, bias = self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"]
        return F.layer_norm(inputs, (inputs.shape[-1],), weight, bias, 1e-5)

    def _linear(self, inputs: Tensor, name: str) -> Tensor:
        return F.linear(inputs, self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"])

    def region(self, name: str, hidden: Tensor) -> Tensor:
        """The bins of a region head, coord_decoder or size_decoder."""
        return self._linear(self._norm(hidden, "region.ln"), f"region.{name}")

    def fourier(self, values: Tensor, kind: str) -> Tensor:
        """(N, 1 or 2) coordinates or sizes → (N, D) input embeddings; `kind` coord or size."""
        phases = 2 * torch.pi * values @ self._tensors[f"region.{kind}_features"]
        return self._linear(torch.cat([phases.cos(), phases.sin()], -1), f"region.{kind}_encoder")
