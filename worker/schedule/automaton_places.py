"""Owns which token tables lie in which place of the device's table memory. Pure; decode thread.

Tables are taken at admission and given back at release, so a place is never overwritten while a step in flight
may read it (I5). Place 0 is the table that allows everything, for rows without a constraint.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker.constraints.automaton import TokenTables


@dataclass(frozen=True, slots=True)
class TableLimits:
    """Room for one constraint's tables on the device; larger ones are enforced by the host."""

    num_places: int = 17
    max_states: int = 1024
    max_classes: int = 256
    max_masks: int = 256

    def fits(self, tables: TokenTables) -> bool:
        """Whether the tables may live on the device."""
        states, classes = tables.next_state.shape
        return (
            states <= self.max_states and classes <= self.max_classes and len(tables.masks) <= self.max_masks
        )


class AutomatonPlaces:
    """Counts who uses which tables. Unused tables stay until their place is needed: schemas repeat."""

    __slots__ = ("_held", "_idle", "_place_of", "limits")

    def __init__(self, limits: TableLimits) -> None:
        self.limits = limits
        self._place_of: dict[int, tuple[int, TokenTables]] = {}  # by identity; the tuple keeps them alive
        self._held: dict[int, int] = {}  # place → sequences using it
        self._idle: list[int] = list(range(limits.num_places - 1, 0, -1))  # reused from the end

    def take(self, tables: TokenTables) -> tuple[int, bool] | None:
        """Hold the tables' place: (place, whether they must be uploaded), or None when there is no room."""
        known = self._place_of.get(id(tables))
        if known is not None:
            place = known[0]
            if place in self._idle:
                self._idle.remove(place)
            self._held[place] = self._held.get(place, 0) + 1
            return place, False
        if not self._idle or not self.limits.fits(tables):
            return None
        place = self._idle.pop()
        for key in [key for key, (other, _) in self._place_of.items() if other == place]:
            del self._place_of[key]
        self._place_of[id(tables)] = (place, tables)
        self._held[place] = 1
        return place, True

    def drop(self, place: int) -> None:
        """One user fewer."""
        self._held[place] -= 1
        if not self._held[place]:
            del self._held[place]
            self._idle.insert(0, place)

    @property
    def num_held(self) -> int:
        """Places in use."""
        return len(self._held)
