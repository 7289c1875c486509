"""Owns per-row state that lives on the device between steps: last tokens, biases, penalty counts. Decode thread.

It belongs to the *sequence* that holds the row (I9): admission overwrites all of it. Row `max_rows` is the
padding row of captured graphs. Tables as wide as the vocabulary are allocated when first asked for, or all at start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from worker.constraints.automaton import TokenAutomaton, TokenTables
from worker.device.contract import to_device
from worker.schedule.automaton_places import TableLimits
from worker.schedule.sequence import Sequence
from worker.step.token_tables import DeviceTables


class RowTables:
    """Device tensors indexed by row."""

    def __init__(
        self,
        max_rows: int,
        vocab_size: int,
        device: torch.device,
        limits: TableLimits,
        suppress_ids: list[int],
    ) -> None:
        self._limits = limits
        self._suppress_ids = suppress_ids
        self.automata: DeviceTables | None = None
        self._shape = (max_rows + 1, vocab_size)
        self._device = device
        self.last_ids = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)
        self.last_values = torch.zeros((max_rows + 1, 2), dtype=torch.float32, device=device)
        self.bias: Tensor | None = None  # added to the logits
        self.stop_bias: Tensor | None = None  # added while min_tokens is not reached
        self.counts: Tensor | None = None  # generated so far, in-flight tokens included
        self.seen: Tensor | None = None  # in prompt or output
        self._adjusted: set[int] = set()  # rows whose biases are not all zero

    def allocate(self) -> None:
        """Make every table now: captured steps need memory that is allocated at start and does not move."""
        self._allocate_automata()
        self._allocate_adjustments()

    def _allocate_automata(self) -> DeviceTables:
        if self.automata is None:
            max_rows, vocab_size = self._shape[0] - 1, self._shape[1]
            self.automata = DeviceTables(self._limits, max_rows, vocab_size, self._device, self._suppress_ids)
        return self.automata

    def _allocate_adjustments(self) -> None:
        if self.bias is None:
            self.bias = torch.zeros(self._shape, dtype=torch.float32, device=self._device)
            self.stop_bias = torch.zeros_like(self.bias)
            self.counts = torch.zeros(self._shape, dtype=torch.int16, device=self._device)
            self.seen = torch.zeros(self._shape, dtype=torch.bool, device=self._device)

    def upload(self, slot: int, tables: TokenTables) -> None:
        """Put a constraint's tables into a slot. Queued on the current stream."""
        self._allocate_automata().upload(slot, tables)

    def admit(self, seq: Sequence) -> None:
        """Overwrite the row's state with the sequence's. Queued on the current stream."""
        if self.automata is not None:
            state = seq.constraint.state if isinstance(seq.constraint, TokenAutomaton) else 0
            self.automata.set_row(seq.row, seq.table_place, state)
        row, sampling = seq.row, seq.sampling
        if not seq.is_adjusted and row not in self._adjusted:
            return
        self._allocate_adjustments()
        assert self.bias is not None and self.stop_bias is not None
        assert self.counts is not None and self.seen is not None
        bias, stop_bias = self.bias[row], self.stop_bias[row]
        bias.zero_()
        stop_bias.zero_()
        if not seq.is_adjusted:
            self._adjusted.discard(row)
            return
        self._adjusted.add(row)
        # Whole lists are copied from pinned memory: assigning token by token would be a launch each, and a Python list as
        # an index is uploaded while the host waits.
        if sampling.logit_bias:
            values = to_device(
                torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32), self._device
            )
            bias.index_copy_(0, self._ids(list(sampling.logit_bias)), values)
        if sampling.suppress_ids:
            bias.index_fill_(0, self._ids(sampling.suppress_ids), -torch.inf)
        if sampling.min_tokens and seq.stop_ids:
            stop_bias.index_fill_(0, self._ids(sorted(seq.stop_ids)), -torch.inf)
        counts, seen = self.counts[row], self.seen[row]
        counts.zero_()
        seen.zero_()
        seen.index_fill_(0, self._ids([t for t in seq.tokens if t >= 0]), True)
        generated = self._ids(seq.tokens[seq.num_prompt :])
        if len(generated):
            counts.index_add_(0, generated, torch.ones_like(generated, dtype=torch.int16))

    def _ids(self, token_ids: list[int]) -> Tensor:
        return to_device(torch.tensor(token_ids, dtype=torch.int64), self._device)

    def count(self, rows: Tensor, token_ids: Tensor) -> None:
        """Take freshly sampled tokens into the penalty tables. rows (R,) int64, token_ids (R,) int64."""
        assert self.counts is not None and self.seen is not None
        one = torch.ones_like(token_ids, dtype=torch.int16)
        self.counts.index_put_((rows, token_ids), one, accumulate=True)
        self.seen[rows, token_ids] = True
