"""Owns the input embeddings of prefill chunks: words, image features, and coordinates, given or generated before.
Decode thread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from worker.device.contract import to_device
from worker.models.contract import Model
from worker.schedule.plan import Chunk
from worker.schedule.sequence import Picture
from worker.step.features import FeatureCache


class ChunkEmbedding:
    """Embeds the chunks of a step; pictures are encoded when a chunk first needs one."""

    def __init__(self, model: Model, features: FeatureCache) -> None:
        self._model = model
        self._features = features

    def embed(
        self,
        chunks: list[Chunk],
        ids: Tensor,
        out: Tensor | None = None,
        taps: list[tuple[int, Tensor]] | None = None,
    ) -> Tensor:
        """(N,) int64 ids of all chunks, in order, and of padding → (N, D), in `out` if given; ids of image positions
        are below 0. What features have beyond D columns goes to `taps`, see `StepTokens`."""
        hidden = self._model.embed(ids.clamp_min(0))  # image positions are overwritten below
        if out is not None:
            hidden = out.copy_(hidden)
        wanted: list[tuple[str, Picture, int, int, int, int]] = []
        at = 0
        for chunk in chunks:
            for picture in chunk.seq.pictures:
                if picture.end <= chunk.start:
                    continue
                for run in picture.runs:
                    start = max(run.position, chunk.start)
                    end = min(run.position + run.num_tokens, chunk.start + chunk.num_tokens)
                    if start < end:
                        to, first = at + start - chunk.start, run.offset + start - run.position
                        for unit, offset, num in _pieces(picture, first, end - start):
                            wanted.append((chunk.seq.tenant, picture, unit, to, offset, num))
                            to += num
            if chunk.seq.values:
                self._embed_known_values(chunk, hidden, ids, at)
            at += chunk.num_tokens
        if wanted:
            features = self._features.get((tenant, picture, unit) for tenant, picture, unit, *_ in wanted)
            for tenant, picture, unit, to, offset, num in wanted:
                own = features[tenant, picture.digest, unit][offset : offset + num]
                hidden[to : to + num].copy_(own[:, : hidden.shape[1]])
                if own.shape[1] > hidden.shape[1]:
                    assert taps is not None
                    taps.append((to, own[:, hidden.shape[1] :]))
        return hidden

    def _embed_known_values(self, chunk: Chunk, hidden: Tensor, ids: Tensor, at: int) -> None:
        """Embed by value the coordinates that the prompt holds, and of a resumed spatial sequence those it had generated."""
        seq = chunk.seq
        where: list[int] = []
        pairs: list[tuple[float, float]] = []
        for behind, values in seq.values.items():
            place = seq.num_prompt + behind - chunk.start
            if 0 <= place < chunk.num_tokens:
                where.append(at + place)
                pairs.append(values)
        if not where:
            return
        index = to_device(torch.tensor(where, dtype=torch.int64), self._model.device)
        known = to_device(torch.tensor(pairs, dtype=torch.float32), self._model.device)
        spatial = torch.ones(len(where), dtype=torch.bool, device=hidden.device)
        hidden.index_copy_(0, index, self._model.embed_next(ids[index], known, spatial).to(hidden.dtype))


def _pieces(picture: Picture, first: int, num: int) -> list[tuple[int, int, int]]:
    """Features [first, first + num) of a picture as (unit, offset within it, how many), in order."""
    size = picture.unit_tokens
    if not size:
        return [(0, first, num)]
    pieces = []
    while num:
        unit, offset = divmod(first, size)
        count = min(num, size - offset)
        pieces.append((unit, offset, count))
        first, num = first + count, num - count
    return pieces
