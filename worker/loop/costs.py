"""Owns what the device's time and energy come to, as figures for the heartbeat. Decode thread; it reads numbers only."""

from __future__ import annotations

from typing import Protocol


class Meter(Protocol):
    """Something that knows the energy used so far."""

    @property
    def joules(self) -> float | None:
        """Joules since the start; None: not known any more."""
        ...


class Costs:
    """The price of an hour of the device, and its meter. What is not known has no figure, which is not a zero."""

    def __init__(self, price_per_hour: float | None = None, meter: Meter | None = None) -> None:
        self._price_per_hour = price_per_hour
        self._meter = meter

    def figures(self, loop_s: float) -> dict[str, float]:
        """Figures by name after the loop has run for `loop_s` seconds, idle ones included: they are paid for."""
        found: dict[str, float] = {}
        if self._price_per_hour is not None:
            found["price_per_hour"] = self._price_per_hour
            found["cost_total"] = self._price_per_hour * loop_s / 3600
        if self._meter is not None and (joules := self._meter.joules) is not None:
            found["energy_joules_total"] = joules
        return found
