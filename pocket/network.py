"""Owns Moondream's arithmetic at training time (teacher forced, whole sequences); runs in the training process.

The parameter names equal the released checkpoint's after a ``model.`` prefix, so weights trained here load
anywhere a Moondream 2 checkpoint does. Attention is written as explicit products: the backward pass of the
fused kernel takes over half of a training step on a CPU.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROT_DIM_MAX = 32
ROPE_THETA = 10000.0
MASKED = -1e30


DESCRIPTION = (
    "A vision-language model of four million parameters, trained on drawings of coloured shapes. It knows circles, "
    "squares, triangles, stars, diamonds and crosses in eight colours; it is not for photographs."
)


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the language model; defaults are Moondream 2's."""

    dim: int = 2048
    ff_dim: int = 8192
    n_layers: int = 24
    vocab_size: int = 51200
    max_context: int = 2048
    n_heads: int = 32
    n_kv_heads: int = 32


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision encoder and of the tiling; defaults are Moondream 2's."""

    enc_dim: int = 1152
    enc_patch_size: int = 14
    enc_n_layers: int = 27
    enc_ff_dim: int = 4304
    enc_n_heads: int = 16
    proj_out_dim: int = 2048
    crop_size: int = 378
    in_channels: int = 3
    max_crops: int = 12
    overlap_margin: int = 4
    proj_inner_dim: int = 8192

    @property
    def grid(self) -> int:
        """Patches along one side of a crop."""
        return self.crop_size // self.enc_patch_size


@dataclass(frozen=True)
class RegionConfig:
    """Sizes of the coordinate and size coders; defaults are Moondream 2's."""

    dim: int = 2048
    coord_feat_dim: int = 256
    coord_out_dim: int = 1024
    size_feat_dim: int = 512
    size_out_dim: int = 2048
    inner_dim: int = 8192


@dataclass(frozen=True)
class NetworkConfig:
    """A whole model: the three parts and the tokenizer's ids and prompt templates."""

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    region: RegionConfig = field(default_factory=RegionConfig)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_prefix(self) -> int:
        """Positions that see each other in both directions: BOS and the image tokens."""
        return 1 + self.vision.grid**2

    @classmethod
    def read(cls, path: Path) -> "NetworkConfig":
        """Read a released ``config.json``; sizes it does not name keep Moondream 2's values."""
        inner = json.loads(path.read_text()).get("config", {})

        def part(kind: type, name: str) -> Any:
            known = {f.name for f in fields(kind)}
            return kind(**{k: v for k, v in inner.get(name, {}).items() if k in known})

        return cls(
            text=part(TextConfig, "text"),
            vision=part(VisionConfig, "vision"),
            region=part(RegionConfig, "region"),
            tokenizer=inner.get("tokenizer", {}),
        )

    def as_released(self, torch_dtype: str) -> dict[str, Any]:
        """The content of a released ``config.json``."""
        inner = {"text": asdict(self.text), "vision": asdict(self.vision), "region": asdict(self.region)}
        return {
            "architectures": ["HfMoondream"],
            "model_type": "moondream1",
            "torch_dtype": torch_dtype,
            "degas": {"model_id": "pocket", "description": DESCRIPTION},
            "config": {**inner, "tokenizer": dict(self.tokenizer)},
        }


class Mlp(nn.Module):
    """Linear, tanh GELU, linear."""

    # "none" is the exact GELU: within 5e-4 of the tanh form, and four times as quick in bf16 on a CPU.
    approximate = "tanh"

    def __init__(self, dim_in: int, dim_inner: int, dim_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim_in, dim_inner)
        self.fc2 = nn.Linear(dim_inner, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim_in) to (..., dim_out), any float dtype."""
        y: Tensor = self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))
        return y


class Attention(nn.Module):
    """Multi-head attention with a fused qkv projection, as explicit products."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x (B, T, dim); rope cos and sin (B or 1, 1, T, rot/2); mask (B, 1, T, T) added to the scores."""
        batch, length, dim = x.shape
        head_dim = dim // self.num_heads
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        scores = (q * (1.0 / math.sqrt(head_dim))) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores + mask
        out = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(batch, length, dim)
        y: Tensor = self.proj(out)
        return y


def rope_table(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin for int positions (B, T): two float32 tensors (B, 1, T, rot/2)."""
    rot_dim = min(ROT_DIM_MAX, head_dim)
    # The reference derives frequencies from half the head, which equals the rotated width at head_dim 64.
    exponents = torch.arange(0, rot_dim, 2, device=positions.device, dtype=torch.float32) / rot_dim
    angles = positions[:, None, :, None].to(torch.float32) * (1.0 / ROPE_THETA**exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dims of each head, halves form: x (B, H, T, head_dim)."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), dim=-1)


class VisionBlock(nn.Module):
    """Pre-LayerNorm transformer block of the encoder."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(config.enc_dim, eps=1e-5)
        self.attn = Attention(config.enc_dim, config.enc_n_heads)
        self.ln2 = nn.LayerNorm(config.enc_dim, eps=1e-5)
        self.mlp = Mlp(config.enc_dim, config.enc_ff_dim, config.enc_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(crops, patches, enc_dim) to the same."""
        x = x + self.attn(self.ln1(x))
        y: Tensor = x + self.mlp(self.ln2(x))
        return y


class Vision(nn.Module):
    """Encoder, stitching and projection."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_emb = nn.Linear(config.in_channels * config.enc_patch_size**2, config.enc_dim)
        self.pos_emb = nn.Parameter(torch.empty(1, config.grid**2, config.enc_dim))
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.enc_n_layers))
        self.post_ln = nn.LayerNorm(config.enc_dim, eps=1e-5)
        self.proj_mlp = Mlp(2 * config.enc_dim, config.proj_inner_dim, config.proj_out_dim)

    def encode(self, crops: Tensor) -> Tensor:
        """Crops uint8 (N, size, size, 3) to features (N, patches, enc_dim)."""
        size, grid = self.config.enc_patch_size, self.config.grid
        num = crops.shape[0]
        pixels = crops.to(self.pos_emb.dtype).div(255.0).sub(0.5).div(0.5)
        patches = (
            pixels.view(num, grid, size, grid, size, 3)
            .permute(0, 1, 3, 5, 2, 4)
            .reshape(num, grid * grid, -1)
        )
        x = self.patch_emb(patches) + self.pos_emb
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.post_ln(x)
        return y

    def embed(self, features: Tensor, tilings: list[tuple[int, int]]) -> Tensor:
        """Image tokens (B, patches, proj_out_dim) from the features of all pictures' crops, in order.

        A picture with tiling (1, 1) may bring one crop instead of two: its local crop has the same pixels.
        """
        first, starts = 0, []
        total = features.shape[0]
        counts = [num_crops(tiling) for tiling in tilings]
        if sum(counts) != total:
            raise ValueError(f"{total} crops for tilings that need {sum(counts)}")
        for count in counts:
            starts.append(first)
            first += count
        pooled: list[Tensor | None] = [None] * len(tilings)
        patches = features.shape[1]
        for tiling in sorted(set(tilings)):
            rows = [i for i, t in enumerate(tilings) if t == tiling]
            if tiling == (1, 1):
                for i in rows:
                    pooled[i] = features[starts[i]]
                continue
            num = tiling[0] * tiling[1]
            index = torch.tensor([starts[i] + 1 for i in rows], device=features.device)
            index = index[:, None] + torch.arange(num, device=features.device)
            local = features[index.reshape(-1)].view(len(rows), num * patches, -1)
            weights = stitch_weights(tiling, self.config.grid, self.config.overlap_margin)
            merged = weights.to(features.device, features.dtype) @ local
            for i, one in zip(rows, merged.unbind(0), strict=True):
                pooled[i] = one
        whole = features[torch.tensor(starts, device=features.device)]
        y: Tensor = self.proj_mlp(
            torch.cat((whole, torch.stack([p for p in pooled if p is not None])), dim=-1)
        )
        return y


def num_crops(tiling: tuple[int, int]) -> int:
    """Crops to encode for a tiling; (1, 1) needs only one, since its two crops are the same pixels."""
    return 1 if tiling == (1, 1) else 1 + tiling[0] * tiling[1]


@lru_cache(maxsize=256)
def stitch_weights(tiling: tuple[int, int], grid: int, margin: int) -> Tensor:
    """Stitching and adaptive average pooling as one matrix (patches, tiles·patches), float32.

    Both are linear in the features, so a batch of pictures with one tiling costs a single product.
    """
    tiles_h, tiles_w = tiling
    stride = grid - 2 * margin
    ids = torch.zeros(tiles_h * stride + 2 * margin, tiles_w * stride + 2 * margin, dtype=torch.long)
    own = torch.arange(grid * grid).view(grid, grid)
    for y in range(tiles_h):
        for x in range(tiles_w):
            top, bottom = (0 if y == 0 else margin), (grid if y == tiles_h - 1 else grid - margin)
            left, right = (0 if x == 0 else margin), (grid if x == tiles_w - 1 else grid - margin)
            tile = own + (y * tiles_w + x) * grid * grid
            rows = slice(y * stride + top, y * stride + bottom)
            ids[rows, x * stride + left : x * stride + right] = tile[top:bottom, left:right]
    weights = torch.zeros(grid * grid, tiles_h * tiles_w * grid * grid)
    height, width = ids.shape
    for i in range(grid):
        y0, y1 = i * height // grid, -(-(i + 1) * height // grid)
        for j in range(grid):
            x0, x1 = j * width // grid, -(-(j + 1) * width // grid)
            cell = ids[y0:y1, x0:x1].reshape(-1)
            weights[i * grid + j].index_add_(0, cell, torch.full((cell.numel(),), 1.0 / cell.numel()))
    return weights


class TextBlock(nn.Module):
    """Parallel block: one LayerNorm feeds attention and feed-forward."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(config.dim, eps=1e-5)
        self.attn = Attention(config.dim, config.n_heads)
        self.mlp = Mlp(config.dim, config.ff_dim, config.dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """(B, T, dim) to the same."""
        normed = self.ln(x)
        y: Tensor = x + self.attn(normed, rope, mask) + self.mlp(normed)
        return y


class Text(nn.Module):
    """The language model."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        if config.n_kv_heads != config.n_heads:
            raise ValueError("grouped key/value heads are not used by this architecture")
        self.config = config
        self.wte = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.n_layers))
        self.post_ln = nn.LayerNorm(config.dim, eps=1e-5)
        self.lm_head = nn.Linear(config.dim, config.vocab_size)

    def decode(self, embeddings: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Hidden states before the final LayerNorm: (B, T, dim).

        positions int (B, T); mask (B, 1, T, T), zero where a row may look and very negative elsewhere.
        """
        cos, sin = rope_table(positions, self.config.dim // self.config.n_heads)
        rope = (cos.to(embeddings.dtype), sin.to(embeddings.dtype))
        for block in self.blocks:
            embeddings = block(embeddings, rope, mask)
        return embeddings

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., dim) hidden states to (..., vocab_size)."""
        y: Tensor = self.lm_head(self.post_ln(hidden))
        return y


class Region(nn.Module):
    """Coordinates and sizes, in and out of the language model's width."""

    def __init__(self, config: RegionConfig) -> None:
        super().__init__()
        self.config = config
        self.coord_features = nn.Parameter(torch.empty(1, config.coord_feat_dim // 2))
        self.size_features = nn.Parameter(torch.empty(2, config.size_feat_dim // 2))
        self.coord_encoder = nn.Linear(config.coord_feat_dim, config.dim)
        self.size_encoder = nn.Linear(config.size_feat_dim, config.dim)
        self.coord_decoder = Mlp(config.dim, config.inner_dim, config.coord_out_dim)
        self.size_decoder = Mlp(config.dim, config.inner_dim, config.size_out_dim)

    def encode_coordinate(self, value: Tensor) -> Tensor:
        """float32 (N, 1) in [0, 1] to (N, dim)."""
        y: Tensor = self.coord_encoder(self._fourier(value, self.coord_features))
        return y

    def encode_size(self, value: Tensor) -> Tensor:
        """float32 (N, 2) width and height in [0, 1] to (N, dim)."""
        y: Tensor = self.size_encoder(self._fourier(value, self.size_features))
        return y

    def decode_coordinate(self, hidden: Tensor) -> Tensor:
        """Hidden states (N, dim), before the final LayerNorm, to bin logits (N, bins)."""
        y: Tensor = self.coord_decoder(hidden)
        return y

    def decode_size(self, hidden: Tensor) -> Tensor:
        """Hidden states (N, dim) to bin logits (N, 2, bins), width first."""
        y: Tensor = self.size_decoder(hidden)
        return y.view(*hidden.shape[:-1], 2, -1)

    @staticmethod
    def _fourier(value: Tensor, features: Tensor) -> Tensor:
        # bf16 holds 8 bits of mantissa: angles of many turns need float32 until after cos and sin.
        angles = 2.0 * math.pi * value.float() @ features.float()
        return torch.cat((angles.cos(), angles.sin()), dim=-1).to(features.dtype)


class Network(nn.Module):
    """The three parts; ``state_dict`` keys get a ``model.`` prefix on disk."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.text = Text(config.text)
        self.vision = Vision(config.vision)
        self.region = Region(config.region)


def size_value(bins: Tensor) -> Tensor:
    """Size of a bin: 2^(bin/1023·10 − 10), float32."""
    return torch.pow(2.0, bins.float() / 1023.0 * 10.0 - 10.0)
