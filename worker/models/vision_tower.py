"""Owns the vision transformer that families share: uint8 crops in, features of their patches out. Decode thread.

Pre-norm layers with full attention within each crop, over patches with learned positions. A family says what its tensors
are called and builds the blocks; normalising pixels is the tower's, so that only bytes travel to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from worker.forward import nothing
from worker.models.crop_attention import CropAttention, crop_attention, padded_width
from worker.models.layers import LayerNorm, Mlp, take_linear, take_norm
from worker.models.linear import PackedLinear, Take
from worker.models.settings import Settings

ATTENTION: SDPBackend | None = None
"""The backend of attention on a GPU; None: torch's choice, which is cuDNN's on Hopper with torch 2.11, not FlashAttention.
`loadtest.gpu.vision` times both and compares them with fp32 arithmetic: pin the quicker of those that are right."""


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """Sizes of a tower, and how pixels are normalised: (value / 255 - mean) / std in each channel."""

    crop_size: int  # pixels
    patch_size: int
    dim: int
    ff_dim: int
    num_layers: int
    num_heads: int
    eps: float
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    exact_gelu: bool = False  # in place of the tanh approximation

    @property
    def grid(self) -> int:
        """Patches along one side of a crop."""
        return self.crop_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a crop."""
        return self.grid * self.grid


class Tower:
    """Implements `contract.CropEncoder`.

    `patches` is the product over a patch's pixels, channel first; `positions` (1, T, D) are added to the tokens. `first`
    (1, 1, D) is a token in front of the patches that takes part and is left out in the end; `norm` the last norm. `compiled`:
    attention by a CPU's compiled operations where they take its heads.
    """

    def __init__(
        self,
        config: TowerConfig,
        max_crops: int,
        patches: PackedLinear,
        positions: Tensor,
        blocks: Sequence[TowerBlock],
        norm: LayerNorm | None,
        first: Tensor | None = None,
        *,
        compiled: bool = True,
    ) -> None:
        self.config, self.max_crops = config, max_crops
        self.crop_size, self.num_tokens, self.width = config.crop_size, config.num_patches, config.dim
        self.dtype, self.fuses = positions.dtype, positions.device.type == "cuda"
        self.progress: Callable[[], None] = nothing
        self._patches, self._positions, self._blocks = patches, positions, blocks
        self._norm, self._first = norm, first
        self._scale, self._shift = _normalising(config, positions.device)
        heads, where = config.num_heads, positions.device
        own = config.dim // heads
        width = padded_width(where, own, positions.dtype)
        attention = crop_attention(where, heads, width, positions.dtype) if compiled else None
        for block in blocks:
            block.attention = attention

    def pixels(self, crops: Tensor) -> Tensor:
        """(C, S, S, 3) uint8 → (C, patches, 3·P·P) fp32, normalised; a patch is flattened channel first."""
        config = self.config
        grid, patch = config.grid, config.patch_size
        cut = crops.view(-1, grid, patch, grid, patch, 3).permute(0, 1, 3, 5, 2, 4)
        values = cut.reshape(-1, config.num_patches, 3 * patch * patch).float()
        return values.mul_(self._scale).sub_(self._shift)

    def features(self, crops: Tensor) -> Tensor:
        """(C, S, S, 3) uint8 crops → (C, patches, D) features after the last norm."""
        hidden = self._patches(self.pixels(crops).to(self.dtype))
        if self._first is not None:
            hidden = torch.cat([self._first.expand(hidden.shape[0], -1, -1), hidden], dim=1)
        hidden = hidden + self._positions
        hidden = self._fused(hidden) if self.fuses else self._plain(hidden)
        return hidden if self._first is None else hidden[:, 1:]

    def _plain(self, hidden: Tensor) -> Tensor:
        for block in self._blocks:
            hidden = block(hidden)
            self.progress()
        return hidden if self._norm is None else self._norm(hidden)

    def _fused(self, hidden: Tensor) -> Tensor:
        shape = hidden.shape
        hidden = hidden.view(-1, shape[2])
        gained: Tensor | None = None
        for block in self._blocks:
            hidden, gained = block.fused(hidden, gained, shape[0])
        if self._norm is None:
            return (hidden if gained is None else hidden + gained).view(shape)
        return self._norm.fused(hidden, gained)[1].view(shape)


def _normalising(config: TowerConfig, device: torch.device) -> tuple[float | Tensor, float | Tensor]:
    """(scale, shift), so that a normalised value is value · scale - shift: numbers where all channels are alike, else
    (3·P·P,) fp32 each. Made at load: on a GPU they would hold the host for their upload."""
    scale = [1 / (255 * std) for std in config.std]
    shift = [mean / std for mean, std in zip(config.mean, config.std, strict=True)]
    if len(set(scale)) == len(set(shift)) == 1:
        return scale[0], shift[0]
    area = config.patch_size**2
    of_channels = (torch.tensor(values, device=device) for values in (scale, shift))
    first, second = (values.repeat_interleave(area) for values in of_channels)
    return first, second


class TowerBlock:
    """One pre-norm layer with full attention within each crop. `qkv` gives all of q, then k, then v."""

    def __init__(
        self,
        norm1: LayerNorm,
        qkv: PackedLinear,
        proj: PackedLinear,
        norm2: LayerNorm,
        mlp: Mlp,
        num_heads: int,
        *,
        exact_gelu: bool = False,
    ) -> None:
        self._norm1, self._qkv, self._proj, self._norm2, self._mlp = norm1, qkv, proj, norm2, mlp
        self._num_heads, self._exact = num_heads, exact_gelu
        self.attention: CropAttention | None = None  # of the whole tower; None: torch's

    def __call__(self, hidden: Tensor) -> Tensor:
        """(C, T, D) → (C, T, D)."""
        mixed = self._attend(self._qkv(self._norm1(hidden)), hidden.shape[0]).view(*hidden.shape[:2], -1)
        hidden = self._proj.add(mixed, hidden)
        normed = self._norm2(hidden)
        if self._exact:
            return self._mlp.fc2.add(F.gelu(self._mlp.fc1(normed)), hidden)
        return self._mlp.add(normed, hidden)

    def fused(self, hidden: Tensor, gained: Tensor | None, crops: int) -> tuple[Tensor, Tensor]:
        """As `__call__` over the flattened tokens of all crops, (C·T, D), with a GPU's kernels. `gained` is what the
        block before adds to the residual stream; returns the stream, and what this block's MLP adds to it."""
        hidden, normed = self._norm1.fused(hidden, gained)
        mixed = self._attend(self._qkv(normed), crops)
        hidden, normed = self._norm2.fused(self._proj(mixed), hidden)
        inner = F.gelu(self._mlp.fc1(normed)) if self._exact else self._mlp.fc1.gelu_fused(normed)
        return hidden, self._mlp.fc2(inner)

    def _attend(self, qkv: Tensor, crops: int) -> Tensor:
        """(C, T, 3·D) or (C·T, 3·D) → (C·T, D)."""
        if self.attention is not None:
            return self.attention.attend(qkv, crops)
        dim = qkv.shape[-1] // 3
        split = qkv.view(crops, -1, 3, self._num_heads, dim // self._num_heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        with attention_backend(qkv.device):
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(-1, dim)


def attention_backend(device: torch.device) -> AbstractContextManager[None]:
    """For a block: the backend that `ATTENTION` pins on a GPU."""
    if ATTENTION is None or device.type != "cuda":
        return nullcontext()
    pinned: AbstractContextManager[None] = sdpa_kernel(ATTENTION)
    return pinned


# ---------------------------------------------------------------- SigLIP, as transformers names its tensors


def take_siglip(take: Take, name: str, config: TowerConfig, max_crops: int, positions: Tensor) -> Tower:
    """SigLIP's vision transformer under `name`; `positions` (T, D) are those of the patches, in order."""
    embeddings = f"{name}.embeddings"
    blocks = [
        TowerBlock(
            take_norm(take, f"{layer}.layer_norm1", config.dim, config.eps),
            take_qkv(take, f"{layer}.self_attn", config),
            padded_linear(
                take(f"{layer}.self_attn.out_proj.weight", config.dim, config.dim),
                take(f"{layer}.self_attn.out_proj.bias", config.dim),
                config,
            ),
            take_norm(take, f"{layer}.layer_norm2", config.dim, config.eps),
            Mlp(
                take_linear(take, f"{layer}.mlp.fc1", config.dim, config.ff_dim),
                take_linear(take, f"{layer}.mlp.fc2", config.ff_dim, config.dim),
            ),
            config.num_heads,
            exact_gelu=config.exact_gelu,
        )
        for layer in (f"{name}.encoder.layers.{index}" for index in range(config.num_layers))
    ]
    return Tower(
        config,
        max_crops,
        take_patches(take, f"{embeddings}.patch_embedding", config),
        positions.unsqueeze(0),
        blocks,
        take_norm(take, f"{name}.post_layernorm", config.dim, config.eps),
    )


def take_patches(take: Take, name: str, config: TowerConfig) -> PackedLinear:
    """A convolution whose stride is its width, as a product over patches."""
    patch = config.patch_size
    weight = take(f"{name}.weight", config.dim, 3, patch, patch)
    return PackedLinear(weight.flatten(1), take(f"{name}.bias", config.dim))


def take_qkv(take: Take, name: str, config: TowerConfig, *, biased: bool = True) -> PackedLinear:
    """q, k and v, stored apart, as one product, heads as wide as they are attended at."""
    dim = config.dim

    def stacked(kind: str, *inputs: int) -> Tensor:
        parts = [take(f"{name}.{part}_proj.{kind}", dim, *inputs) for part in "qkv"]
        own, wide = _widths(config, parts[0])
        # Scores are divided by the root of the width.
        parts[0] = parts[0] if own == wide else (parts[0].float() * (wide / own) ** 0.5).to(parts[0].dtype)
        heads = torch.cat(parts).unflatten(0, (3 * config.num_heads, own))
        return F.pad(heads.movedim(1, -1), (0, wide - own)).movedim(-1, 1).flatten(0, 1)

    return PackedLinear(stacked("weight", dim), stacked("bias") if biased else None)


def padded_linear(weight: Tensor, bias: Tensor, config: TowerConfig) -> PackedLinear:
    """The product (D, D) behind attention, for heads as wide as they are attended at."""
    own, wide = _widths(config, weight)
    heads = weight.unflatten(1, (config.num_heads, own))
    return PackedLinear(F.pad(heads, (0, wide - own)).flatten(1), bias)


def _widths(config: TowerConfig, weight: Tensor) -> tuple[int, int]:
    """Of a head: its own width, and the one it is attended at, with zeros behind its values."""
    own = config.dim // config.num_heads
    return own, padded_width(weight.device, own, weight.dtype)


def unshuffled(features: Tensor, factor: int) -> Tensor:
    """(C, G·G, D) → (C, (G/f)·(G/f), D·f·f): each square of f × f patches becomes one token, row by row within it."""
    num, tokens, dim = features.shape
    grid = round(tokens**0.5)
    small = grid // factor
    squares = features.view(num, small, factor, small, factor, dim).transpose(2, 3)
    return squares.reshape(num, small * small, factor * factor * dim)


# ---------------------------------------------------------------- settings


def read_tower(
    settings: Settings, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> TowerConfig:
    """The sizes in a `vision_config` as SigLIP's names have them. Raises CheckpointError on what cannot be."""
    side, patch = square(settings, "image_size"), square(settings, "patch_size")
    if side % patch:
        raise settings.fault("'image_size' is not whole patches of 'patch_size'")
    if settings.size("num_channels", 3) != 3:
        raise settings.fault("'num_channels' is not 3")
    dim, heads = settings.size("hidden_size"), settings.size("num_attention_heads")
    if dim % heads:
        raise settings.fault("'hidden_size' of the vision tower does not divide into 'num_attention_heads'")
    return TowerConfig(
        crop_size=side,
        patch_size=patch,
        dim=dim,
        ff_dim=settings.size("intermediate_size"),
        num_layers=settings.size("num_hidden_layers"),
        num_heads=heads,
        eps=settings.above_0("layer_norm_eps", 1e-6),
        mean=mean,
        std=std,
        exact_gelu=is_exact_gelu(settings, "hidden_act"),
    )


def square(settings: Settings, name: str) -> int:
    """A side in pixels: a number, or a list of two that are alike. Raises CheckpointError."""
    value = settings.get(name)
    if isinstance(value, list | tuple):
        if len(value) != 2 or value[0] != value[1]:
            raise settings.fault(f"{name!r} is {value!r}; only squares are supported")
        value = value[0]
    return Settings({name: value}, settings.file).size(name)


def is_exact_gelu(settings: Settings, name: str) -> bool:
    """Which of the two GELUs an activation is. Raises CheckpointError for others."""
    named = settings.get(name)
    if named not in ("gelu", "gelu_pytorch_tanh"):
        raise settings.fault(f"{name!r} is {named!r}; supported are gelu and gelu_pytorch_tanh")
    return bool(named == "gelu")


def tokens_of(settings: Settings, config: TowerConfig, factor: int) -> int:
    """Positions of a crop whose patches are joined `factor` × `factor`. Raises CheckpointError where that leaves a rest."""
    if factor < 1 or config.grid % factor:
        raise settings.fault(f"{config.grid} patches a side do not divide by {factor}")
    return (config.grid // factor) ** 2
