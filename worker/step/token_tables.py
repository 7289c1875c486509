"""Owns token automata on the device: tables by place, one state a row. Decode thread.

Constrained rows whose automaton lives here need no host in the loop: the mask of the next token and the state
after it are two gathers on the compute stream, before the host has seen the token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.constraints.automaton import TokenTables
from worker.device.contract import pin
from worker.schedule.automaton_places import TableLimits


class DeviceTables:
    """Packed tables; a global state is `place · max_states + state`. State 0 stays, and allows every id
    that the model may ever say.

    Allocated when the first constraint comes, in one go: about 2.3 MB + 2.2 KB · vocabulary / 8 · places.
    """

    def __init__(
        self,
        limits: TableLimits,
        max_rows: int,
        vocab_size: int,
        device: torch.device,
        suppress_ids: Sequence[int] = (),
    ) -> None:
        self._limits = limits
        self._device = device
        states, places = limits.max_states, limits.num_places
        words = (vocab_size + 31) // 32

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._next = zeros(places * states, limits.max_classes)
        self._mask_of = zeros(places * states)
        self._masks = zeros(places * limits.max_masks, words)
        self._class_of = zeros(places, vocab_size)
        self._states = zeros(max_rows + 1)
        self._masks[0] = -1
        for token_id in suppress_ids:
            bit = 1 << token_id % 32
            self._masks[0, token_id // 32] &= ~(bit - (1 << 32) if bit >> 31 else bit)
        self._constrained: set[int] = set()  # rows whose state is not 0

    def upload(self, place: int, tables: TokenTables) -> None:
        """Put tables into a place that nothing in flight reads. Queued on the current stream."""
        limits = self._limits
        states, classes = tables.next_state.shape
        base = place * limits.max_states
        # A refused move keeps the state: only a zombie's token can be refused, and its state is not used.
        moves = torch.from_numpy(tables.next_state)
        own = torch.arange(states, dtype=torch.int32).unsqueeze(1)
        moves = torch.where(moves < 0, own, moves) + base
        first = place * limits.max_masks
        self._next[base : base + states, :classes].copy_(pin(moves, self._device), non_blocking=True)
        mask_of = torch.from_numpy(tables.mask_of + first)
        self._mask_of[base : base + states].copy_(pin(mask_of, self._device), non_blocking=True)
        masks = torch.from_numpy(tables.masks)
        self._masks[first : first + len(masks)].copy_(pin(masks, self._device), non_blocking=True)
        self._class_of[place].copy_(pin(torch.from_numpy(tables.class_of), self._device), non_blocking=True)

    def set_row(self, row: int, place: int, state: int) -> None:
        """Give a row its sequence's state (place 0: no constraint). Queued on the current stream."""
        if place:
            self._states[row] = place * self._limits.max_states + state
            self._constrained.add(row)
        elif row in self._constrained:
            self._states[row] = 0
            self._constrained.remove(row)

    def words(self, rows: Tensor) -> Tensor:
        """(R, ceil(V/32)) int32, the bits of the ids that each row may have now. rows (R,) int64."""
        return self._masks[self._mask_of[self._states[rows]]]

    def advance(self, rows: Tensor, token_ids: Tensor) -> None:
        """Move each row's state by its sampled id: rows (R,) int64, token_ids (R,) int64."""
        states = self._states[rows]
        classes = self._class_of[states // self._limits.max_states, token_ids]
        self._states[rows] = self._next[states, classes]
