"""Owns the list of all faults, in the order of the promises, and choosing from it."""

from __future__ import annotations

from collections.abc import Iterable

from loadtest.chaos import (
    fault_clients,
    fault_crowds,
    fault_gateways,
    fault_requests,
    fault_wire,
    fault_workers,
)
from loadtest.chaos.faults import Fault


def catalogue() -> list[Fault]:
    """Every fault."""
    return [
        *fault_clients.FAULTS,
        *fault_workers.FAULTS,
        *fault_requests.FAULTS,
        *fault_wire.FAULTS,
        *fault_gateways.FAULTS,
        *fault_crowds.FAULTS,
    ]


def choose(names: Iterable[str]) -> list[Fault]:
    """Those named, or all. Raises ValueError for an unknown name."""
    known = {fault.name: fault for fault in catalogue()}
    wanted = list(names)
    for name in wanted:
        if name not in known:
            raise ValueError(f"{name!r} is no fault; there are: {', '.join(known)}")
    return [known[name] for name in wanted] or list(known.values())
