"""Owns the decoder that every family shares: embedding lookup, rotations, blocks, final norm and head. Decode thread.

A family consists of its blocks, its embedding and its head. Every block takes the residual stream and adds to it: layer
by layer, by a GPU's kernels, or all layers in one compiled call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from shared.protocol import ModelCard
from worker.device.choices import choices
from worker.forward import ImageCrops, KVCache, StateShape, StepTokens, add_taps
from worker.models.attention import AttentionPlan, fastest_kv_dtype, fuses, readable_kv_dtypes
from worker.models.contract import CropEncoder, EncodeCrops
from worker.models.head import Head
from worker.models.held import held_bytes
from worker.models.layers import LayerNorm, RmsNorm
from worker.models.torch_attention import GatherSpace
from worker.models.words import Table, TiedWords, Words
from worker.native.operations import operations
from worker.native.stack import Layer, LayerStack, layer_stack

if TYPE_CHECKING:
    from worker.kernels.fused import FusedPlan


class Block(Protocol):
    """One layer of a decoder."""

    def __call__(self, hidden: Tensor, plan: AttentionPlan, layer: int) -> Tensor:
        """(N, D) residual stream → (N, D) with this layer's sums added; writes K and V of layer number `layer`, counted
        among those that keep the same."""
        ...

    def fused(
        self, hidden: Tensor, gained: Tensor | None, plan: FusedPlan, layer: int
    ) -> tuple[Tensor, Tensor]:
        """As `__call__` with a GPU's kernels, each of which takes a residual sum and the norm after it. `gained` is what the
        block before adds to the residual stream. Returns the stream, and what this block adds to it last."""
        ...

    def native_layer(self) -> Layer | None:
        """This layer for a call over all of them; None where that does not compute it."""
        ...


class Decoder:
    """A loaded decoder of text; implements `contract.Model`. Families that read pictures add to it.

    `words` (V, D) is the embedding table, or the head's own weight; `dtype` that of activations, by default its own; `rotations` the tables that layers choose from: (context, 1, R/2) complex64,
    or a single row for all positions. `kv_dtype` is the dtype its cache runs fastest in, see `fastest_kv_dtype`.
    """

    prefix_tokens = 0
    num_taps = 0
    states: StateShape | None = None
    rotary_axes: Tensor | None = None  # (R/2,) int64: by which axis of its position each pair is rotated

    def __init__(
        self,
        card: ModelCard,
        words: Tensor | TiedWords,
        blocks: Sequence[Block],
        norm: LayerNorm | RmsNorm,
        head: Head,
        rotations: Sequence[Tensor],
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        embedding_scale: float = 1.0,
        biased: bool = False,
        convolving: frozenset[int] = frozenset(),
        dtype: torch.dtype | None = None,
    ) -> None:
        """`convolving` are the layers that keep states in place of keys and values, see `contract.Model.states`."""
        self.card = card
        self.device, self.dtype = words.device, dtype or words.dtype
        self._places = _places(len(blocks), convolving)
        self.num_layers = len(blocks) - len(convolving)
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.weight_bytes = self.num_weights = 0
        self.biased = biased
        self._native = operations(self.device)
        self._rotations = rotations
        self.kv_dtype, self.kv_dtypes = self.page_dtypes(self.device)
        self.fuses = not convolving and fuses(self.device, head_dim)
        self._words: Words = Table(words) if isinstance(words, Tensor) else words
        # In the activations' dtype, as the families that scale them were trained.
        scale = torch.tensor(embedding_scale, dtype=self.dtype, device=self.device)
        self._embedding_scale = None if embedding_scale == 1.0 else scale
        self._blocks = blocks
        self._norm, self._head = norm, head
        self._space = GatherSpace()
        self._stack = self._one_call(num_heads)

    def _one_call(self, num_heads: int) -> LayerStack | None:
        layers = [block.native_layer() for block in self._blocks]
        settings: dict[str, Any] = {"num_heads": num_heads, "eps": self._norm.eps, "qk_eps": self._norm.eps}
        return layer_stack(layers, self.device, self.dtype, **settings)

    def page_dtypes(self, device: torch.device) -> tuple[torch.dtype, tuple[torch.dtype, ...]]:
        """See `contract.Model`."""
        native = operations(device)
        fastest = fastest_kv_dtype(device, self.dtype, native)
        rotary_dim = 2 * self._rotations[0].shape[-1]
        return fastest, readable_kv_dtypes(fastest, self.dtype, self.head_dim, rotary_dim, native)

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a step of one row reads: all layers and the head, without the tables of words and rotations."""
        return held_bytes(list(self._blocks), self._norm, self._head)

    @property
    def encoder(self) -> CropEncoder | None:
        """None: it reads text only."""
        return None

    def embed(self, token_ids: Tensor) -> Tensor:
        """(N,) int64 ids → (N, D) input embeddings."""
        words = self._words(token_ids).to(self.dtype)
        return words if self._embedding_scale is None else words.mul_(self._embedding_scale)

    def embed_next(self, token_ids: Tensor, values: Tensor, spatial: Tensor) -> Tensor:
        """(B,) freshly sampled ids → (B, D). A text model has no coordinates: the rest is ignored."""
        return self.embed(token_ids)

    def encode_images(self, images: list[ImageCrops], features: EncodeCrops | None = None) -> list[Tensor]:
        """Refused: intake lets no picture through to a model whose card has no `image`."""
        if images:
            raise RuntimeError(f"{self.card.model_id} reads text only; it cannot encode a picture")
        return []

    def forward(self, hidden: Tensor, tokens: StepTokens, cache: KVCache) -> Tensor:
        """(N, D) embeddings → (N, D) hidden states before the final norm; writes K and V of all N tokens."""
        rotations = [self._turn(table, tokens.positions) for table in self._rotations]
        if self.fuses:
            return self._forward_fused(hidden, rotations, tokens, cache)
        if self._stack is not None:
            done = self._stack.run(hidden, tokens, cache, rotations[0])
            if done is not None:
                return done
        plan = AttentionPlan(tokens, cache, self._space, self._native, rotations, hidden.dtype)
        for layer, block in enumerate(self._blocks):
            hidden = block(hidden, plan, self._places[layer])
            add_taps(hidden, tokens.taps, layer)
            tokens.progress()
        return hidden

    def _turn(self, table: Tensor, positions: Tensor) -> Tensor:
        """(N, 1, R/2): each token's row of a table, or of several rows the pairs that are rotated by each."""
        if table.shape[0] == 1:
            return table.expand(positions.shape[-1], -1, -1).contiguous()
        if positions.dim() == 1:
            return table.index_select(0, positions)
        assert self.rotary_axes is not None
        rows = positions.long().index_select(0, self.rotary_axes).t()
        return table.squeeze(1).gather(0, rows).unsqueeze(1)

    def _forward_fused(
        self, hidden: Tensor, rotations: list[Tensor], tokens: StepTokens, cache: KVCache
    ) -> Tensor:
        hidden, gained = self._run_blocks(hidden, rotations, tokens, cache)
        return hidden if gained is None else hidden + gained

    def _run_blocks(
        self, hidden: Tensor, rotations: list[Tensor], tokens: StepTokens, cache: KVCache
    ) -> tuple[Tensor, Tensor | None]:
        """All blocks by a GPU's kernels: the stream, and what the last block adds to it."""
        from worker.kernels.fused import FusedPlan  # here, so that no CPU worker imports Triton

        plan = FusedPlan(tokens, cache, rotations)
        gained: Tensor | None = None
        for layer, block in enumerate(self._blocks):
            hidden, gained = block.fused(hidden, gained, plan, layer)
            add_taps(hidden, tokens.taps, layer)
        return hidden, gained

    def decode(self, hidden: Tensor, tokens: StepTokens, cache: KVCache) -> tuple[Tensor, Tensor]:
        """`forward`, then `logits` of all its tokens: (N, D) embeddings → (N, D) hidden states, (N, V) logits. By a GPU's
        kernels the last residual sum and the final norm are one launch."""
        if not self.fuses or not choices().tail_norm:
            hidden = self.forward(hidden, tokens, cache)
            return hidden, self.logits(hidden)
        rotations = [self._turn(table, tokens.positions) for table in self._rotations]
        hidden, normed = self._norm.fused(*self._run_blocks(hidden, rotations, tokens, cache))
        return hidden, self._head.fused(normed)

    def logits(self, hidden: Tensor) -> Tensor:
        """(R, D) hidden states of the sampling positions → (R, V) logits: fp32 sums, unrounded."""
        return self._head(self._norm(hidden))

    def score_values(self, hidden: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Refused, as `decode_values`."""
        raise RuntimeError(f"{self.card.model_id} reads text only; its tokens stand for no coordinates")

    def decode_values(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Refused: intake lets no spatial task through to a model without one among its capabilities."""
        raise RuntimeError(f"{self.card.model_id} reads text only; its tokens stand for no coordinates")


def _places(num_layers: int, convolving: frozenset[int]) -> list[int]:
    """The number of each layer among those that keep the same as it does."""
    before = [sum(one < index for one in convolving) for index in range(num_layers)]
    return [num if index in convolving else index - num for index, num in enumerate(before)]
