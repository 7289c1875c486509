"""Owns which token tables lie in which slot of the device's table memory. Pure; decode thread.

Tables are taken at admission and given back at release, so a slot is never overwritten while a step in flight
may read it (I5). Slot 0 is the table that allows everything, for rows without a constraint.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker.constraints.automaton import TokenTables


@dataclass(frozen=True, slots=True)
class TableLimits:
    """Room for one constraint's tables on the device; larger ones are enforced by the host."""

    num_slots: int = 17
    max_states: int = 1024
    max_classes: int = 256
    max_masks: int = 256

    def fits(self, tables: TokenTables) -> bool:
        """Whether the tables may live on the device."""
        states, classes = tables.next_state.shape
        return (
            states <= self.max_states and classes <= self.max_classes and len(tables.masks) <= self.max_masks
        )


class AutomatonSlots:
    """Counts who uses which tables. Unused tables stay until their slot is needed: schemas repeat."""

    __slots__ = ("_held", "_idle", "_slot_of", "limits")

    def __init__(self, limits: TableLimits) -> None:
        self.limits = limits
        self._slot_of: dict[int, tuple[int, TokenTables]] = {}  # by identity; the tuple keeps them alive
        self._held: dict[int, int] = {}  # slot → sequences using it
        self._idle: list[int] = list(range(limits.num_slots - 1, 0, -1))  # reused from the end

    def take(self, tables: TokenTables) -> tuple[int, bool] | None:
        """Hold the tables' slot: (slot, whether they must be uploaded), or None when there is no room."""
        known = self._slot_of.get(id(tables))
        if known is not None:
            slot = known[0]
            if slot in self._idle:
                self._idle.remove(slot)
            self._held[slot] = self._held.get(slot, 0) + 1
            return slot, False
        if not self._idle or not self.limits.fits(tables):
            return None
        slot = self._idle.pop()
        for key in [key for key, (other, _) in self._slot_of.items() if other == slot]:
            del self._slot_of[key]
        self._slot_of[id(tables)] = (slot, tables)
        self._held[slot] = 1
        return slot, True

    def drop(self, slot: int) -> None:
        """One user fewer."""
        self._held[slot] -= 1
        if not self._held[slot]:
            del self._held[slot]
            self._idle.insert(0, slot)

    @property
    def num_held(self) -> int:
        """Slots in use."""
        return len(self._held)
