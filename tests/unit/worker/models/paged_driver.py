"""Owns a small stand-in for the step runner: sequences over shuffled pages, steps of decode rows and chunks."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shared.protocol import OverlappingTiles
from shared.tiling import canvas_for
from tests.two_sheets import image_crops
from worker.forward import DecodeRows, ImageCrops, KVCache, PrefillSegment, StepTokens
from worker.models.contract import Model
from worker.models.paged_convolution import state_lines

GOLDEN = Path(__file__).resolve().parents[3] / "data" / "golden_moondream"


def quiet(phase: str, done: float, total: float) -> None:
    """A progress report that nobody reads."""


def relative_error(found: Tensor, expected: Tensor | np.ndarray) -> float:
    """The largest difference over the largest expected magnitude."""
    want = torch.as_tensor(expected).double()
    assert found.shape == want.shape, (found.shape, want.shape)
    return float((found.double() - want).abs().max() / want.abs().max())


def same(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Equal bit for bit where that was measured to hold (AVX-512); elsewhere to within `tolerance`."""
    if torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return torch.equal(found, expected)
    return relative_error(found, expected) < tolerance


def prepare(model: Model, image: Image.Image) -> ImageCrops:
    """Resize a picture the way a gateway does."""
    spec = model.card.image
    assert spec is not None
    assert isinstance(spec.rule, OverlappingTiles)
    canvas = canvas_for(image.height, image.width, crop_size=spec.crop_size, rule=spec.rule)
    resized = image.resize((canvas.width, canvas.height), Image.Resampling.LANCZOS)
    small = image.resize((spec.crop_size, spec.crop_size), Image.Resampling.LANCZOS)
    return image_crops(
        torch.from_numpy(np.array(small)),
        torch.from_numpy(np.array(resized)),
        canvas.tiles_h,
        canvas.tiles_w,
    )


@dataclass
class Row:
    """One sequence: its pages and how many tokens they hold."""

    pages: list[int] = field(default_factory=list)
    length: int = 0


class Driver:
    """Runs steps of a model over pages handed out in random order; page 0 is left to padding."""

    def __init__(
        self, model: Model, num_pages: int = 600, page_tokens: int = 16, kv_dtype: torch.dtype | None = None
    ) -> None:
        self.model = model
        shape = (num_pages, page_tokens, model.num_kv_heads, model.head_dim)
        # Garbage, so that reading beyond a length shows.
        generator = torch.Generator().manual_seed(3)
        dtype = kv_dtype or model.dtype
        self.cache = KVCache(
            keys=[torch.randn(shape, generator=generator).to(dtype) * 50 for _ in range(model.num_layers)],
            values=[torch.randn(shape, generator=generator).to(dtype) * 50 for _ in range(model.num_layers)],
            page_tokens=page_tokens,
        )
        if model.states is not None:
            lines = state_lines(model.states.num_inputs, page_tokens)
            state = (num_pages, lines, model.states.width)
            self.cache.states = [
                torch.randn(state, generator=generator).to(model.dtype) * 50
                for _ in range(model.states.num_layers)
            ]
        self._free = list(range(1, num_pages))
        random.Random(7).shuffle(self._free)

    def _grow(self, row: Row, length: int) -> None:
        while len(row.pages) * self.cache.page_tokens < length:
            row.pages.append(self._free.pop())

    def _line(self, row: Row, position: int) -> int:
        size = self.cache.page_tokens
        return row.pages[position // size] * size + position % size

    def step(
        self,
        decode: list[tuple[Row, Tensor]],
        chunks: list[tuple[Row, Tensor, int]] | None = None,
        padding: int = 0,
        start: int | None = None,
    ) -> Tensor:
        """One forward: `decode` rows with (1, D) embeddings, then `chunks` (row, (S, D), prefix_tokens).

        Returns hidden states of the real decode rows, then of the chunks' tokens. `start` recomputes from there.
        """
        positions: list[int] = []
        lines: list[int] = []
        hidden: list[Tensor] = []
        rows = None
        if decode or padding:
            for row, embedding in decode:
                self._grow(row, row.length + 1)
                positions.append(row.length)
                lines.append(self._line(row, row.length))
                hidden.append(embedding)
                row.length += 1
            positions += [0] * padding
            lines += [0] * padding
            if padding:
                hidden.append(torch.zeros(padding, hidden[0].shape[1], dtype=hidden[0].dtype))
            width = max(len(row.pages) for row, _ in decode) + 2
            tables = torch.zeros(len(decode) + padding, width, dtype=torch.int32)
            lengths = torch.ones(len(decode) + padding, dtype=torch.int32)
            for index, (row, _) in enumerate(decode):
                tables[index, : len(row.pages)] = torch.tensor(row.pages, dtype=torch.int32)
                lengths[index] = row.length
            rows = DecodeRows(len(decode) + padding, tables, lengths, max(row.length for row, _ in decode))
        segments = []
        for row, embeddings, prefix in chunks or []:
            first = row.length if start is None else start
            last = first + embeddings.shape[0]
            self._grow(row, last)
            positions += range(first, last)
            lines += [self._line(row, position) for position in range(first, last)]
            hidden.append(embeddings)
            table = torch.tensor([*row.pages, 0], dtype=torch.int32)
            segments.append(PrefillSegment(last - first, first, prefix, table))
            row.length = max(row.length, last)
        tokens = StepTokens(torch.tensor(positions), torch.tensor(lines), rows, segments)
        out = self.model.forward(torch.cat(hidden), tokens, self.cache)
        kept = [index for index in range(out.shape[0]) if not len(decode) <= index < len(decode) + padding]
        return out[kept]

    def prefill(self, embeddings: Tensor, prefix: int) -> tuple[Row, Tensor]:
        """A new sequence from (S, D) embeddings: the row, and its (S, D) hidden states."""
        row = Row()
        return row, self.step([], [(row, embeddings, prefix)])
