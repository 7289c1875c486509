"""Owns per-row state that lives on the device between steps: last tokens, biases, penalty counts. Decode thread.

It belongs to the *sequence* that holds the row (I9): admission overwrites all of it. Row `max_rows` is the
padding row of captured graphs. Tables as wide as the vocabulary are allocated when first asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from worker.automaton import TokenAutomaton, TokenTables
from worker.automaton_slots import TableLimits
from worker.sequence import Sequence
from worker.token_tables import DeviceTables


class RowTables:
    """Device tensors indexed by row."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device, limits: TableLimits) -> None:
        self._limits = limits
        self.automata: DeviceTables | None = None
        self._shape = (max_rows + 1, vocab_size)
        self._device = device
        self.last_ids = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)
        self.last_values = torch.zeros((max_rows + 1, 2), dtype=torch.float32, device=device)
        self.bias: Tensor | None = None  # added to the logits
        self.stop_bias: Tensor | None = None  # added while min_tokens is not reached
        self.counts: Tensor | None = None  # generated so far, in-flight tokens included
        self.seen: Tensor | None = None  # in prompt or output

    def upload(self, slot: int, tables: TokenTables) -> None:
        """Put a constraint's tables into a slot. Queued on the current stream."""
        if self.automata is None:
            max_rows, vocab_size = self._shape[0] - 1, self._shape[1]
            self.automata = DeviceTables(self._limits, max_rows, vocab_size, self._device)
        self.automata.upload(slot, tables)

    def admit(self, seq: Sequence) -> None:
        """Overwrite the row's state with the sequence's. Queued on the current stream."""
        if self.automata is not None:
            state = seq.constraint.state if isinstance(seq.constraint, TokenAutomaton) else 0
            self.automata.place(seq.row, seq.table_slot, state)
        adjusted = seq.is_adjusted
        if self.bias is None and not adjusted:
            return
        if self.bias is None:
            self.bias = torch.zeros(self._shape, dtype=torch.float32, device=self._device)
            self.stop_bias = torch.zeros_like(self.bias)
            self.counts = torch.zeros(self._shape, dtype=torch.int16, device=self._device)
            self.seen = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        assert self.stop_bias is not None and self.counts is not None and self.seen is not None
        row, sampling = seq.row, seq.sampling
        self.bias[row] = 0
        self.stop_bias[row] = 0
        if not adjusted:
            return
        for token_id, value in sampling.logit_bias.items():
            self.bias[row, token_id] = value
        if sampling.suppress_ids:
            self.bias[row, sampling.suppress_ids] = -torch.inf
        if sampling.min_tokens and seq.stop_ids:
            self.stop_bias[row, sorted(seq.stop_ids)] = -torch.inf
        self.counts[row] = 0
        self.seen[row] = False
        self.seen[row, self._ids([t for t in seq.tokens if t >= 0])] = True
        generated = self._ids(seq.tokens[seq.num_prompt :])
        if len(generated):
            self.counts[row].index_add_(0, generated, torch.ones_like(generated, dtype=torch.int16))

    def _ids(self, token_ids: list[int]) -> Tensor:
        """On the device, without holding the host until the stream is through."""
        host = torch.tensor(token_ids, dtype=torch.int64)
        return host if self._device.type == "cpu" else host.pin_memory().to(self._device, non_blocking=True)

    def count(self, rows: Tensor, token_ids: Tensor) -> None:
        """Take freshly sampled tokens into the penalty tables. rows (R,) int64, token_ids (R,) int64."""
        assert self.counts is not None and self.seen is not None
        one = torch.ones_like(token_ids, dtype=torch.int16)
        self.counts.index_put_((rows, token_ids), one, accumulate=True)
        self.seen[rows, token_ids] = True
