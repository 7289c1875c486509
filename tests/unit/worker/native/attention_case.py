"""Owns random steps for compiled attention, and what they come to by a plain loop in fp64."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.forward import DecodeRows, PrefillSegment, StepTokens
from worker.native.operations import Operations
from worker.native.token_rows import token_rows


@dataclass
class Heads:
    """What a layer is like: see `Operations.attend`."""

    heads: int
    kv_heads: int
    dim: int
    page_tokens: int
    window: int = 0
    cap: float = 0.0


@dataclass
class Sequence:
    """One row's or chunk's sequence: `count` new tokens behind `context`."""

    context: int
    count: int
    prefix: int = 0
    is_chunk: bool = True


def random_heads(rng: random.Random) -> Heads:
    """Any that compiled attention takes."""
    kv_heads = rng.choice((1, 1, 2, 3))
    return Heads(
        heads=kv_heads * rng.choice((1, 2, 3, 5, 8)),
        kv_heads=kv_heads,
        dim=rng.choice((16, 32, 64, 80, 96, 128)),
        page_tokens=rng.choice((1, 5, 16, 16, 64, 100)),
        window=rng.choice((0, 0, 1, 7, 100, 1500)),
        cap=rng.choice((0.0, 0.0, 0.7, 20.0)),
    )


def random_sequences(rng: random.Random) -> list[Sequence]:
    """Decode rows, then chunks: short and long ones, behind nothing and behind thousands of tokens."""

    def context() -> int:
        return rng.choice((0, 0, rng.randint(1, 70), rng.randint(1, 700), rng.randint(1, 2600)))

    found = [Sequence(context(), 1, is_chunk=False) for _ in range(rng.choice((0, 0, 1, 4)))]
    for _ in range(rng.choice((0, 1, 2, 3)) if found else rng.choice((1, 2, 3))):
        before, count = context(), rng.choice((1, rng.randint(2, 20), rng.randint(2, 300)))
        prefix = rng.choice((0, 0, rng.randint(0, before), before + rng.randint(0, count)))
        found.append(Sequence(before, count, prefix))
    return found


class Case:
    """Random keys, values and products of the sequences, in shuffled pages of what is no sequence's."""

    def __init__(
        self,
        heads: Heads,
        sequences: list[Sequence],
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        seed: int = 0,
    ) -> None:
        self.heads, self.sequences = heads, sequences
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        size = heads.page_tokens
        needed = [-(-(one.context + one.count) // size) for one in sequences]
        free = list(range(1, sum(needed) + 1))
        rng.shuffle(free)
        self.pages = [[free.pop() for _ in range(count)] for count in needed]
        shape = (sum(needed) + 1, size, heads.kv_heads, heads.dim)
        # Garbage where no sequence's tokens lie, so that reading beyond a length shows.
        self.keys = torch.randn(shape, generator=generator).to(kv_dtype)
        self.values = torch.randn(shape, generator=generator).to(kv_dtype)
        # Scores of some spread: few keys weigh much, and the largest is met late.
        width = (heads.heads + 2 * heads.kv_heads) * heads.dim
        tokens = sum(one.count for one in sequences)
        self.qkv = (1.5 * torch.randn(tokens, width, generator=generator)).to(dtype)

    def attend(self, native: Operations) -> Tensor:
        """(N, H·D) by the compiled operations; writes the new keys and values."""
        step = self._tokens()
        rows = token_rows(step)
        assert rows is not None
        heads = self.heads
        out = torch.full(
            (len(self.qkv), heads.heads * heads.dim), math.nan, dtype=self.qkv.dtype
        )  # each must be written
        rotation = torch.ones(len(self.qkv), 1, 8, dtype=torch.complex64)
        native.attend(
            self.qkv,
            self.keys,
            self.values,
            step.write_index,
            rows,
            rotation,
            heads.heads,
            out,
            window=heads.window,
            cap=heads.cap,
        )
        return out

    def expected(self) -> Tensor:
        """(N, H·D) in fp64; call it behind `attend`, which writes the new keys and values."""
        heads, parts, start = self.heads, [], 0
        keys, values = self.keys.double().flatten(0, 1), self.values.double().flatten(0, 1)
        for number, one in enumerate(self.sequences):
            length = one.context + one.count
            lines = torch.tensor([self._line(number, position) for position in range(length)])
            query = self.qkv[start : start + one.count, : heads.heads * heads.dim].double()
            query = query.view(one.count, heads.heads, heads.dim)
            q_pos, k_pos = torch.arange(one.context, length)[:, None], torch.arange(length)[None]
            seen = k_pos <= q_pos
            seen |= (q_pos < one.prefix) & (k_pos < one.prefix)
            if heads.window:
                seen &= k_pos > q_pos - heads.window
            group = heads.heads // heads.kv_heads
            key, value = (part[lines].repeat_interleave(group, 1).transpose(0, 1) for part in (keys, values))
            scores = query.transpose(0, 1) @ key.transpose(1, 2) / math.sqrt(heads.dim)
            if heads.cap:
                scores = heads.cap * torch.tanh(scores / heads.cap)
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            parts.append((weights @ value).transpose(0, 1).flatten(1))
            start += one.count
        return torch.cat(parts)

    def _line(self, number: int, position: int) -> int:
        size = self.heads.page_tokens
        return self.pages[number][position // size] * size + position % size

    def _tokens(self) -> StepTokens:
        lines: list[int] = []
        positions: list[int] = []
        segments: list[PrefillSegment] = []
        decode: list[tuple[list[int], int]] = []
        for number, one in enumerate(self.sequences):
            new = range(one.context, one.context + one.count)
            positions += new
            lines += [self._line(number, position) for position in new]
            if one.is_chunk:
                table = torch.tensor(self.pages[number], dtype=torch.int32)
                segments.append(PrefillSegment(one.count, one.context, one.prefix, table))
            else:
                decode.append((self.pages[number], one.context + 1))
        rows = None
        if decode:
            tables = torch.zeros(len(decode), max(len(pages) for pages, _ in decode) + 1, dtype=torch.int32)
            for row, (pages, _) in enumerate(decode):
                tables[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
            lengths = torch.tensor([length for _, length in decode], dtype=torch.int32)
            rows = DecodeRows(len(decode), tables, lengths, int(lengths.max()))
        return StepTokens(torch.tensor(positions), torch.tensor(lines), rows, segments)
