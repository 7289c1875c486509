"""Owns turning one step's logits into tokens: masks, penalties, draw, values, logprobs, results. Decode thread.

Nothing here reads the device, so the same code runs eagerly and inside a captured graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from worker.device.choices import choices
from worker.models.contract import Model
from worker.native.operations import operations
from worker.schedule.sequence import Sequence
from worker.step.rows import RowTables
from worker.step.sampler import apply_mask, penalise, stochastic
from worker.step.slot import OUTPUT_FIELDS, Slot

if TYPE_CHECKING:
    from worker.kernels.sampling import SamplingKernels

Which = slice | Tensor
"""Some of a step's samples: a range of them, or (R,) int64 indexes."""


class Wants(NamedTuple):
    """The parts of sampling that some rows need. A part that no row needs changes no token, but takes time."""

    random: bool = False
    adjusted: bool = False  # biases and penalties
    spatial: bool = False  # values of coordinates and sizes
    automata: bool = False  # masks and states of constraints that live on the device
    num_top: int = -1  # logprobs of so many other tokens; -1: not even the token's own


def wants_of(sequences: Iterable[Sequence]) -> Wants:
    """What these rows need together."""
    random = adjusted = spatial = automata = False
    num_top = -1
    for seq in sequences:
        sampling = seq.sampling
        random = random or sampling.temperature > 0
        adjusted = adjusted or seq.is_adjusted
        spatial = spatial or seq.is_spatial
        automata = automata or seq.table_place > 0
        num_top = max(num_top, sampling.num_logprobs)
    return Wants(random, adjusted, spatial, automata, num_top)


class StepSampler:
    """Samples rows of a step into the row tables (the next step's inputs) and the slot's outputs."""

    def __init__(self, model: Model, rows: RowTables, device: torch.device) -> None:
        self._model = model
        self._rows = rows
        suppress = model.card.suppress_ids
        self._suppress = torch.tensor(suppress, dtype=torch.int64, device=device)
        self._native = operations(device)
        self._kernels: SamplingKernels | None = None
        self._masked_kernels: SamplingKernels | None = None
        if device.type == "cuda":
            self.use_kernels()

    def use_kernels(self) -> None:
        """Sample by a GPU's kernels, as it does on one anyway."""
        from worker.kernels.sampling import SamplingKernels  # triton is imported only where a GPU is

        card = self._model.card
        self._kernels = SamplingKernels(card.suppress_ids, card.vocab_size, self._suppress.device)
        self._masked_kernels = SamplingKernels([], card.vocab_size, self._suppress.device)

    def sample(
        self,
        slot: Slot,
        which: Which,
        logits: Tensor,
        hidden: Tensor,
        words: Tensor | None,
        wants: Wants,
        *,
        rows: str = "sample_rows",
    ) -> None:
        """Sample the step's samples `which`. logits (R, V) fp32 and hidden (R, D) are theirs, in order, as are
        words (R, ceil(V/32)) int32, bits of the ids a row may have, or None. `rows` names the field of the rows whose
        state the tokens go to."""
        fields = slot.fields
        places = fields[rows][which]
        tables = self._rows.automata if wants.automata else None
        # A mask says itself which ids a row never says: a thought ends with one that answers do not have.
        is_masked = words is not None or tables is not None
        kernels = self._masked_kernels if is_masked else self._kernels
        owns = kernels is not None and isinstance(which, slice) and choices().own_outputs
        # Only torch's own operations need the rows as 64-bit indexes.
        is_bare = owns and not (wants.adjusted or wants.automata or wants.spatial)
        index = places if is_bare else places.long()
        raw = logits
        if wants.adjusted:
            logits = self._adjust(slot, which, logits, index)
        if tables is not None:
            own = tables.words(index)
            words = own if words is None else words & own
        if isinstance(which, slice):
            out = slot.outputs[which]
        else:
            out = torch.zeros((logits.shape[0], OUTPUT_FIELDS), dtype=torch.int32, device=logits.device)
        draw = [fields[name][which] for name in ("temperature", "top_k", "top_p", "min_p", "uniform")]
        if kernels is not None:
            sinks = (places, self._rows.last_ids, out) if owns else None
            ids, bad = kernels.sample(logits, draw, words, sinks)
            if logits is not raw:
                bad = ~torch.isfinite(raw.max(dim=-1).values)
        else:
            ids, bad = self._plain(raw, logits, words, draw if wants.random else None)
        if not owns:
            self._rows.last_ids.index_copy_(0, index, ids)
            out[:, 0] = ids
        if not owns or logits is not raw:
            out[:, 1] = bad
        if tables is not None:
            tables.advance(index, ids)
        if wants.adjusted:
            self._rows.count(index, ids)
        if wants.spatial:
            if wants.num_top >= 0:
                values, scores = self._model.score_values(hidden, ids)
                out[:, 5:7] = scores.view(torch.int32)
            else:
                values = self._model.decode_values(hidden, ids)
            self._rows.last_values.index_copy_(0, index, values)
            out[:, 2:4] = values.view(torch.int32)
        if wants.num_top >= 0:
            self._logprobs(slot, which, raw, ids, out, wants.num_top)
        if not isinstance(which, slice):
            slot.outputs.index_copy_(0, which, out)

    def _plain(
        self, raw: Tensor, logits: Tensor, words: Tensor | None, draw: list[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """(ids, bad) with torch's own operations; `draw` None: every row is greedy."""
        most, best = self._largest(raw)
        bad = ~torch.isfinite(most)
        if len(self._suppress) and words is None:
            logits = logits.index_fill(1, self._suppress, -torch.inf)
        if words is not None:
            logits = apply_mask(logits, words)
        if draw is not None:
            return stochastic(logits, *draw), bad
        return (best if logits is raw else self._largest(logits)[1]), bad

    def _largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit of each row and its id. By `max`, because `argmax` is several times slower on a CPU."""
        if self._native is not None:
            return self._native.largest(logits)
        most, best = logits.max(dim=-1)
        return most, best

    def _adjust(self, slot: Slot, which: Which, logits: Tensor, rows: Tensor) -> Tensor:
        tables, fields = self._rows, slot.fields
        assert tables.bias is not None and tables.stop_bias is not None
        assert tables.counts is not None and tables.seen is not None
        needs = (fields[n][which] for n in ("presence", "frequency", "repetition"))
        logits = penalise(logits, tables.counts[rows], tables.seen[rows], *needs)
        logits = logits + tables.bias[rows]
        banned = fields["ban_stop"][which].unsqueeze(1) > 0
        return torch.where(banned, logits + tables.stop_bias[rows], logits)

    def _logprobs(
        self, slot: Slot, which: Which, raw: Tensor, ids: Tensor, out: Tensor, num_top: int
    ) -> None:
        logprobs = raw.log_softmax(dim=-1)
        out[:, 4] = logprobs.gather(1, ids.unsqueeze(1)).squeeze(1).contiguous().view(torch.int32)
        if not num_top:
            return
        half = slot.shape.max_logprobs
        values, top_ids = logprobs.topk(min(half, logprobs.shape[-1]), dim=-1)
        top = torch.zeros((len(ids), 2 * half), dtype=torch.int32, device=ids.device)
        top[:, : top_ids.shape[1]] = top_ids
        top[:, half : half + values.shape[1]] = values.view(torch.int32)
        slot.top[which] = top
