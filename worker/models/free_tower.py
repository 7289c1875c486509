"""Owns vision transformers that read a picture of any size at once, as Qwen's: uint8 pixels in, the decoder's features out. Decode thread.

Pre-norm layers with two-dimensional rotary positions and, in some families, attention within windows. Squares of merge × merge
patches lie together from the beginning, so that joining them in the end is a change of shape. A family says what its
tensors are called and builds the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.pictures import LOAD_PIXELS
from worker.forward import nothing
from worker.models.layers import GatedMlp, LayerNorm, Mlp, RmsNorm
from worker.models.linear import PackedLinear, Take
from worker.models.rope import pair_order
from worker.models.segment_attention import SegmentAttention
from worker.models.settings import Settings
from worker.models.vision_tower import square

Norm = LayerNorm | RmsNorm
Triple = tuple[float, float, float]
ROTARY_BASE = 10000.0


@dataclass(frozen=True, slots=True)
class FreeConfig:
    """Sizes of a tower, and how pixels are normalised: (value / 255 - mean) / std in each channel."""

    patch_size: int
    merge: int  # patches along the side of a square that gives one token
    dim: int
    ff_dim: int
    num_layers: int
    num_heads: int
    frames: int  # that a stored patch has: a still picture is shown as often
    mean: Triple
    std: Triple
    window: int = 0  # squares along a window's side, of layers that are not in `full`; 0: no windows
    full: frozenset[int] = frozenset()

    @property
    def unit(self) -> int:
        """Pixels along the side of what gives one token."""
        return self.patch_size * self.merge


@dataclass(frozen=True, slots=True)
class FreeBlock:
    """One layer. `qkv` gives all of q, then k, then v, rotated pairs side by side."""

    norm1: Norm
    qkv: PackedLinear
    proj: PackedLinear
    norm2: Norm
    mlp: Mlp | GatedMlp

    def __call__(self, hidden: Tensor, attention: SegmentAttention) -> Tensor:
        """(T, D) → (T, D)."""
        hidden = self.proj.add(attention.attend(self.qkv(self.norm1(hidden))), hidden)
        return self.mlp.add(self.norm2(hidden), hidden)


@dataclass(frozen=True, slots=True)
class Merger:
    """Joins the patches of each square and projects them: norm, product, GELU (exact), product."""

    norm: Norm
    first: PackedLinear
    second: PackedLinear
    squares: int  # patches of a square
    norms_joined: bool = False  # the norm is over a whole square

    def __call__(self, hidden: Tensor) -> Tensor:
        """(T, D) → (T / squares, out)."""
        joined = (len(hidden) // self.squares, -1)
        normed = self.norm(hidden.view(joined) if self.norms_joined else hidden).reshape(joined)
        return self.second(F.gelu(self.first(normed)))


@dataclass(frozen=True, slots=True)
class FramePatches:
    """The product over a patch's pixels, channel first: of a still picture, and of as many frames as stored patches have."""

    still: PackedLinear
    moving: PackedLinear | None = None  # none: a patch has one frame

    def __call__(self, values: Tensor) -> Tensor:
        """(patches, 3·P·P) of one frame, which all show, or (patches, 3·frames·P·P) → (patches, D)."""
        if self.moving is not None and values.shape[1] != self.still.in_features:
            return self.moving(values)
        return self.still(values)


class FreeTower:
    """Implements `contract.CropEncoder` for one crop of any size, of a still picture or of several frames.

    `patches` is the first product; `table` (G, G, D) learned positions, which are interpolated
    to the picture's grid; `taps` mergers behind some layers, whose features stand beside the last merger's.
    """

    crop_size, max_crops = 0, 1

    def __init__(
        self,
        config: FreeConfig,
        dtype: torch.dtype,
        patches: FramePatches,
        blocks: Sequence[FreeBlock],
        merger: Merger,
        table: Tensor | None = None,
        taps: dict[int, Merger] | None = None,
    ) -> None:
        self.config, self.dtype, self.width = config, dtype, config.dim
        self.progress: Callable[[], None] = nothing
        self.num_tokens = LOAD_PIXELS // config.patch_size**2
        self._patches, self._blocks, self._merger = patches, blocks, merger
        self._table, self._taps = table, taps or {}
        device = patches.still.device if table is None else table.device
        area = config.patch_size**2
        std, mean = (torch.tensor(values, device=device) for values in (config.std, config.mean))
        self._scale = (1 / (255 * std)).repeat_interleave(area)
        self._shift = (mean / std).repeat_interleave(area)
        half = config.dim // config.num_heads // 2
        exponents = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
        self._inverse = 1.0 / ROTARY_BASE**exponents

    def pixels(self, crop: Tensor) -> Tensor:
        """(H, W, 3) uint8 → (patches, 3·P·P) fp32, normalised, square by square; a patch is flattened channel first. Of frames
        (F, H, W, 3) → (patches, 3·F·P·P), within a channel frame by frame.

        Raises ValueError on sides that are not whole squares.
        """
        if crop.dim() == 4:
            frames = [self.pixels(frame).unflatten(1, (3, -1)) for frame in crop]
            return torch.stack(frames, 2).flatten(1)
        high, wide = self._grid(crop)
        merge, patch = self.config.merge, self.config.patch_size
        cut = crop.view(high // merge, merge, patch, wide // merge, merge, patch, 3)
        values = cut.permute(0, 3, 1, 4, 6, 2, 5).reshape(high * wide, -1).float()
        return values.mul_(self._scale).sub_(self._shift)

    def features(self, crops: Tensor) -> Tensor:
        """(1, H, W, 3) uint8 → (1, squares, (1 + taps) · out): the last merger's features, then the taps'."""
        return self.features_of(list(crops))[0].unsqueeze(0)

    def features_of(self, crops: Sequence[Tensor]) -> list[Tensor]:
        """(H, W, 3) uint8 each, or (F, H, W, 3), of any sizes → (squares, (1 + taps) · out) each, see `features`. All go through the layers as one
        run of tokens, without padding: products take them together, and each attends within itself.
        """
        parts, rotations, orders, windows, lengths = [], [], [], [], []
        squares = 0
        for crop in crops:
            high, wide = self._grid(crop)
            hidden = self._patches(self.pixels(crop).to(self.dtype))
            if self._table is not None:
                hidden = hidden + self._squares(self._learned(high, wide)).to(self.dtype)
            order, own = self._windows(high, wide)
            if order is not None:
                orders.append(order + squares)
            parts.append(hidden)
            rotations.append(self._rotation(high, wide))
            windows += own
            lengths.append(high * wide)
            squares += high * wide // self.config.merge**2
        hidden, rotation = torch.cat(parts), torch.cat(rotations)
        order = torch.cat(orders) if orders else None
        if order is not None:
            hidden, rotation = self._permuted(hidden, order), self._permuted(rotation, order)
        heads, config = self.config.num_heads, self.config
        shared = (rotation.contiguous(), heads, config.dim // heads, self.dtype)
        full = SegmentAttention(lengths, *shared)
        narrow = SegmentAttention(windows, *shared) if windows else full
        tapped = []
        for layer, block in enumerate(self._blocks):
            hidden = block(hidden, full if layer in config.full else narrow)
            if layer in self._taps:
                tapped.append(self._taps[layer](hidden))
            self.progress()
        merged = torch.cat([self._merger(hidden), *tapped], dim=1)
        if order is not None:
            merged = merged[torch.argsort(order)]
        return list(merged.split([length // config.merge**2 for length in lengths]))

    def num_patches(self, crop: Tensor) -> int:
        """Of a crop (H, W, 3) or frames (F, H, W, 3), for whoever decides how many go together. Raises ValueError as `pixels`."""
        high, wide = self._grid(crop)
        return high * wide

    def _grid(self, crop: Tensor) -> tuple[int, int]:
        """Patches down and across."""
        unit, patch = self.config.unit, self.config.patch_size
        high, wide = crop.shape[-3:-1]
        if not high or not wide or high % unit or wide % unit:
            raise ValueError(f"a picture of {high}×{wide} pixels is not whole squares of {unit}")
        return high // patch, wide // patch

    def _squares(self, grid: Tensor) -> Tensor:
        """(rows, cols, …) → (rows · cols, …), square by square."""
        merge = self.config.merge
        rows, cols = grid.shape[:2]
        cut = grid.view(rows // merge, merge, cols // merge, merge, *grid.shape[2:])
        return cut.transpose(1, 2).reshape(rows * cols, *grid.shape[2:])

    def _permuted(self, values: Tensor, order: Tensor) -> Tensor:
        """Tokens (T, …) with their squares in this order."""
        squares: Tensor = values.unflatten(0, (len(order), -1))
        return squares[order].flatten(0, 1)

    def _rotation(self, high: int, wide: int) -> Tensor:
        """(T, 1, head_dim / 2) complex64: the first half of the pairs by row, the others by column."""
        rows, cols = (
            torch.arange(n, device=self._inverse.device)[:, None] * self._inverse for n in (high, wide)
        )
        angles = torch.cat(
            [rows[:, None].expand(-1, wide, -1), cols[None].expand(high, -1, -1)], dim=2
        ).contiguous()
        return self._squares(torch.polar(torch.ones_like(angles), angles)).unsqueeze(1)

    def _learned(self, high: int, wide: int) -> Tensor:
        """(high, wide, D) fp32: the table, stretched bilinearly so that its corners are the picture's."""
        assert self._table is not None
        table = self._table.float()
        for axis, length in enumerate((high, wide)):
            side = table.shape[axis]
            steps = torch.arange(length, dtype=torch.float32, device=table.device)
            at = steps * (side - 1) / max(length - 1, 1)
            low = at.floor().long().clamp(0, side - 1)
            part = (at - low).view(-1, *[1] * (2 - axis))
            below, above = (
                table.index_select(axis, low),
                table.index_select(axis, (low + 1).clamp(max=side - 1)),
            )
            table = below * (1 - part) + above * part
        return table

    def _windows(self, high: int, wide: int) -> tuple[Tensor | None, list[int]]:
        """The order of squares that puts those of each window together, and how many patches each window has."""
        config = self.config
        if not config.window:
            return None, []
        rows, cols = high // config.merge, wide // config.merge
        squares = torch.arange(rows * cols).view(rows, cols)
        side = config.window
        cut = [
            squares[top : top + side, left : left + side].flatten()
            for top in range(0, rows, side)
            for left in range(0, cols, side)
        ]
        order = torch.cat(cut).to(self._inverse.device)
        return order, [len(own) * config.merge**2 for own in cut]


# ---------------------------------------------------------------- settings and tensors that families share


def read_free_tower(vision: Settings, mean: Triple, std: Triple, **windows: object) -> FreeConfig:
    """The sizes in a `vision_config` as Qwen's names have them. Raises CheckpointError on what cannot be."""
    dim, heads = vision.size("hidden_size"), vision.size("num_heads")
    if dim % heads or (dim // heads) % 4:
        raise vision.fault("'hidden_size' over 'num_heads' is not a multiple of 4, so no head can be rotated")
    for name in ("in_channels", "in_chans"):
        if vision.size(name, 3) != 3:
            raise vision.fault(f"{name!r} is not 3")
    return FreeConfig(
        patch_size=square(vision, "patch_size"),
        merge=vision.size("spatial_merge_size"),
        dim=dim,
        ff_dim=vision.size("intermediate_size"),
        num_layers=vision.size("depth"),
        num_heads=heads,
        frames=square(vision, "temporal_patch_size"),
        mean=mean,
        std=std,
        **windows,  # type: ignore[arg-type]
    )


def take_frame_patches(take: Take, name: str, config: FreeConfig, *, biased: bool) -> FramePatches:
    """A convolution over frames and patches, as a product over a patch's pixels in all frames, and as one over the patches of a
    still picture: every frame is the same, so its weights are summed over frames, before they are rounded."""
    size = config.patch_size
    weight = take(f"{name}.weight", config.dim, 3, config.frames, size, size)
    still = weight.float().sum(2).flatten(1).to(weight.dtype)
    bias = take(f"{name}.bias", config.dim) if biased else None
    moving = PackedLinear(weight.flatten(1), bias) if config.frames > 1 else None
    return FramePatches(PackedLinear(still, bias), moving)


def take_rotated_qkv(take: Take, name: str, config: FreeConfig) -> PackedLinear:
    """q, k and v, stored as one, with the dimensions of q's and k's heads in rotary pairs (see `pair_order`)."""
    dim, heads = config.dim, config.num_heads
    own = dim // heads
    starts = torch.arange(2 * heads).unsqueeze(1) * own
    order = torch.cat([(starts + pair_order(own)).flatten(), torch.arange(2 * dim, 3 * dim)])
    weight, bias = take(f"{name}.weight", 3 * dim, dim), take(f"{name}.bias", 3 * dim)
    order = order.to(weight.device)
    return PackedLinear(weight[order], bias[order])
