"""Owns Moondream 2: its language model, and how text, pictures and regions come together. Decode thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.protocol import ModelCard
from worker.device.choices import choices
from worker.forward import ImageCrops
from worker.models.attention import AttentionPlan
from worker.models.contract import EncodeCrops
from worker.models.decoder import Block, Decoder
from worker.models.head import Head
from worker.models.layers import take_linear, take_norm
from worker.models.linear import PackedLinear, Take, TakeWeight, side_by_side, together
from worker.models.moondream_config import MoondreamConfig, TextConfig
from worker.models.moondream_region import RegionModel
from worker.models.moondream_vision import VisionEncoder
from worker.models.rope import RopeConfig, pair_order, rotation_table
from worker.native.stack import ParallelLayer

if TYPE_CHECKING:
    from worker.kernels.fused import FusedPlan


class Moondream(Decoder):
    """A loaded Moondream 2; implements `contract.Model`. Moondream 3 is the same with other blocks."""

    def __init__(
        self,
        config: MoondreamConfig,
        card: ModelCard,
        take: Take,
        device: torch.device,
        take_weight: TakeWeight | None = None,
    ) -> None:
        """`take_weight` hands out weights of products in blocks, where products read those; None: as `take`."""
        text, take_weight = config.text, take_weight or take
        words = take("text.wte", text.vocab_size, text.dim)
        blocks = [self._block(config, take, take_weight, index) for index in range(text.n_layers)]
        norm = take_norm(take, "text.post_ln", text.dim)
        weight = take_weight("text.lm_head.weight", text.vocab_size, text.dim)
        head = Head(weight, take("text.lm_head.bias", text.vocab_size))
        super().__init__(
            card,
            words,
            blocks,
            norm,
            head,
            [rotation_table(RopeConfig(text.rope_theta), text.head_dim // 2, text.max_context, device)],
            num_heads=text.n_heads,
            num_kv_heads=text.n_kv_heads,
            head_dim=text.head_dim,
            biased=True,
        )
        self.config = config
        self.prefix_tokens = config.prefix_tokens
        # Whether the host may look for rows that need the region model. On a CPU that is cheap and mostly saves the work; on
        # a GPU it would make the host wait, and a captured graph cannot do it.
        self.looks = device.type == "cpu"
        # A crop has hundreds of tokens: a GPU's products of so many rows gain nothing by narrow weights.
        self.vision = VisionEncoder(config.vision, take, take if device.type == "cuda" else take_weight)
        self.region = RegionModel(config.region, take)

    def _block(self, config: MoondreamConfig, take: Take, take_weight: TakeWeight, index: int) -> Block:
        """Layer number `index` of the text model."""
        return _TextBlock(take, take_weight, f"text.blocks.{index}", config.text)

    @property
    def encoder(self) -> VisionEncoder:
        """The vision encoder."""
        return self.vision

    def embed_next(self, token_ids: Tensor, values: Tensor, spatial: Tensor) -> Tensor:
        """(B,) ids, (B, 2) fp32 values, (B,) bool → (B, D): values in place of words where `spatial` holds."""
        words = self.embed(token_ids)
        if self.looks and not bool(spatial.any()):
            return words
        coordinates = self.region.encode_coordinate(values[:, :1], self.dtype)
        sizes = self.region.encode_size(values, self.dtype)
        is_coordinate = (spatial & (token_ids == self.card.coord_id)).unsqueeze(1)
        is_size = (spatial & (token_ids == self.card.size_id)).unsqueeze(1)
        return torch.where(is_size, sizes, torch.where(is_coordinate, coordinates, words))

    def encode_images(self, images: list[ImageCrops], features: EncodeCrops | None = None) -> list[Tensor]:
        """Pictures → one (num_image_tokens, D) tensor each. Raises ValueError on frames that do not fit."""
        return self.vision.encode(images, features or self.vision.features) if images else []

    def decode_values(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """(R, D) hidden, (R,) sampled ids → (R, 2) fp32: a coordinate in column 0, a (width, height), else 0."""
        is_coordinate = (token_ids == self.card.coord_id).unsqueeze(1)
        is_size = (token_ids == self.card.size_id).unsqueeze(1)
        values = torch.zeros(token_ids.shape[0], 2, dtype=torch.float32, device=token_ids.device)
        if not self.looks or bool(is_coordinate.any()):
            coordinates = F.pad(self.region.decode_coordinate(hidden), (0, 1))
            values = torch.where(is_coordinate, coordinates, values)
        if not self.looks or bool(is_size.any()):
            values = torch.where(is_size, self.region.decode_size(hidden), values)
        return values

    def score_values(self, hidden: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """See `contract.Model`. The decoders run twice, which a request that asks for this pays alone."""
        is_coordinate = (token_ids == self.card.coord_id).unsqueeze(1)
        is_size = (token_ids == self.card.size_id).unsqueeze(1)
        coordinates = F.pad(self.region.score_coordinate(hidden), (0, 1))
        scores = torch.where(is_size, self.region.score_size(hidden), coordinates)
        return self.decode_values(hidden, token_ids), torch.where(is_size | is_coordinate, scores, 0.0)


class _TextBlock:
    """One layer: a single norm feeds attention and MLP side by side, both added to the residual stream."""

    def __init__(self, take: Take, take_weight: TakeWeight, name: str, config: TextConfig) -> None:
        dim = config.dim
        self._head_dim = config.head_dim
        self._num_heads = config.n_heads
        self._num_rotated = config.n_heads + config.n_kv_heads
        self._ln = take_norm(take, f"{name}.ln", dim)
        weight = take_weight(f"{name}.attn.qkv.weight", config.qkv_dim, dim)
        order = qkv_order(config).to(weight.device)
        weight = weight[order] if isinstance(weight, Tensor) else weight.ordered(order)
        bias = take(f"{name}.attn.qkv.bias", config.qkv_dim)[order]
        self._qkv_dim = config.qkv_dim
        self._joined: PackedLinear | None = None
        if joins(weight.device):
            # One weight, of which the two products are parts: joined and apart cost the memory of one.
            fc1 = take_weight(f"{name}.mlp.fc1.weight", config.ff_dim, dim)
            bias = torch.cat([bias, take(f"{name}.mlp.fc1.bias", config.ff_dim)])
            self._joined = PackedLinear(together([weight, fc1]), bias, pack=False)
            self._qkv = self._joined.part(0, config.qkv_dim)
            self._fc1 = self._joined.part(config.qkv_dim, config.qkv_dim + config.ff_dim)
        else:
            self._qkv = PackedLinear(weight, bias)
            self._fc1 = take_linear(take, f"{name}.mlp.fc1", dim, config.ff_dim, take_weight)
        # Attention's projection and the MLP's second layer add to the same residual: one product over both inputs.
        proj = take_weight(f"{name}.attn.proj.weight", dim, dim)
        fc2 = take_weight(f"{name}.mlp.fc2.weight", dim, config.ff_dim)
        bias = take(f"{name}.attn.proj.bias", dim) + take(f"{name}.mlp.fc2.bias", dim)
        self._out = PackedLinear(side_by_side([proj, fc2]), bias)

    def __call__(self, hidden: Tensor, plan: AttentionPlan, layer: int) -> Tensor:
        normed = self._ln(hidden)
        mixed = plan.attend_product(layer, self._qkv(normed), self._num_heads, self._split)
        return self._out.add(torch.cat([mixed, self._fc1.gelu(normed)], dim=1), hidden)

    def native_layer(self) -> ParallelLayer | None:
        """This layer for a call over all of them; None unless each of its products is compiled."""
        qkv, fc1, out = self._qkv.native, self._fc1.native, self._out.native
        if qkv is None or fc1 is None or out is None:
            return None
        norm, bias = self._ln.weight.data_ptr(), self._ln.bias.data_ptr()
        return ParallelLayer(norm=norm, norm_bias=bias, qkv=qkv, fc1=fc1, out=out)

    def _split(self, qkv: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return split_heads(qkv, rotation, self._num_heads, self._num_rotated, self._head_dim)

    def fused(
        self, hidden: Tensor, gained: Tensor | None, plan: FusedPlan, layer: int
    ) -> tuple[Tensor, Tensor]:
        """As `__call__` with a GPU's kernels. `gained` is what the block before adds to the residual stream: the
        sum is taken with the norm. Returns the stream, and what this block adds to it."""
        from worker.kernels.activation import gelu_tanh

        hidden, normed = self._ln.fused(hidden, gained)
        # Attention and activation write side by side into the one input of the product that joins them.
        width = self._num_heads * self._head_dim
        joined = self._joined if choices().one_product else None
        if joined is not None and joined.takes_few(normed):
            # The GELU is in the product; the rotation is not, for it needs whole heads, rounded.
            both = normed.new_empty(normed.shape[0], width + self._fc1.out_features)
            qkv = joined.few(normed, gelu_out=both[:, width:])
            plan.attend(layer, qkv, self._num_heads, out=both[:, :width])
            return hidden, self._out.fused(both)
        if joined is not None:
            product = joined(normed)
            qkv, inner = product[:, : self._qkv_dim], product[:, self._qkv_dim :]
        else:
            qkv, inner = self._qkv.fused(normed), self._fc1.fused(normed)
        both = inner.new_empty(inner.shape[0], width + inner.shape[1])
        gelu = (inner, both[:, width:])
        is_one = choices().one_launch
        plan.attend(layer, qkv, self._num_heads, out=both[:, :width], gelu=gelu if is_one else None)
        if not is_one:
            gelu_tanh(*gelu)
        return hidden, self._out.fused(both)


def split_heads(
    qkv: Tensor, rotation: Tensor, num_heads: int, num_rotated: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `attention.Split`: the first half of each head of q and k is rotated. All in fp32."""
    # Only finite values reach the cache, since a NaN in a page would spoil the page's next owner even where it is masked.
    # The faulty row is found by its output, which keeps the NaN through the residual stream.
    heads = qkv.float().nan_to_num_(0.0, 0.0, 0.0).view(qkv.shape[0], -1, head_dim)
    # Rotary embedding in fp32 and in place: one complex product over the heads of q and k.
    pairs = heads[:, :num_rotated, : head_dim // 2].view(-1, num_rotated, head_dim // 4, 2)
    torch.view_as_complex(pairs).mul_(rotation)
    return heads[:, :num_heads], heads[:, num_heads:num_rotated], heads[:, num_rotated:]


def joins(device: torch.device) -> bool:
    """Whether qkv and the MLP's first layer, which read the same input, are kept as one weight: a product less a layer.
    A CPU packs each for itself."""
    return device.type == "cuda"


def qkv_order(config: TextConfig) -> Tensor:
    """Rows of the fused qkv projection so that the two of a rotated pair lie side by side, see `pair_order`."""
    head = pair_order(config.head_dim, config.head_dim // 2)
    starts = torch.arange(config.n_heads + config.n_kv_heads)[:, None] * config.head_dim
    rotated = (starts + head).reshape(-1)
    return torch.cat([rotated, torch.arange(rotated.shape[0], config.qkv_dim)])
