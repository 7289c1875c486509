"""Owns which workers a name stands for, from the answers of a name service. Pure; gateway's loop.

An answer only tells where to look. Name services may leave addresses out (a limit on answers, a probe that failed once), so
an address is forgotten only when it was missing from several answers in a row and nobody is reached there any more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

MISSING_ANSWERS: Final = 3  # in a row, after which an address may be forgotten
MOST_ADDRESSES: Final = 1024  # of one name; each has a socket of its own


class Membership:
    """The endpoints found under one name."""

    def __init__(self) -> None:
        self._missing: dict[str, int] = {}  # by endpoint: answers in a row that left it out

    @property
    def endpoints(self) -> list[str]:
        """Those known now, oldest first."""
        return list(self._missing)

    def on_answer(
        self, found: Collection[str], is_idle: Callable[[str], bool]
    ) -> tuple[list[str], list[str]]:
        """An answer's endpoints → those that are new, and those to forget: `is_idle` says that nobody is reached there.

        Of more than `MOST_ADDRESSES` the last in order are left out.
        """
        for endpoint in self._missing:
            self._missing[endpoint] = 0 if endpoint in found else self._missing[endpoint] + 1
        gone = [
            endpoint
            for endpoint, missing in self._missing.items()
            if missing >= MISSING_ANSWERS and is_idle(endpoint)
        ]
        for endpoint in gone:
            del self._missing[endpoint]
        new = [endpoint for endpoint in sorted(found) if endpoint not in self._missing]
        new = new[: max(0, MOST_ADDRESSES - len(self._missing))]
        self._missing.update(dict.fromkeys(new, 0))
        return new, gone
