"""Owns how many bytes of unfinished requests are held for one tenant: bodies and messages that are still arriving. Pure."""

from __future__ import annotations


class Holdings:
    """The sums by tenant."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._sums: dict[str, int] = {}

    def of(self, tenant: str) -> int:
        """Bytes held for a tenant now."""
        return self._sums.get(tenant, 0)

    def holding(self, tenant: str) -> Holding:
        """A part of a tenant's sum, empty at first."""
        return Holding(self, tenant)

    def change(self, tenant: str, by_bytes: int) -> None:
        """Add to a tenant's sum."""
        total = self.of(tenant) + by_bytes
        if total:
            self._sums[tenant] = total
        else:
            self._sums.pop(tenant, None)


class Holding:
    """What one body or connection holds. `set(0)` when it ends."""

    __slots__ = ("_holdings", "_size_bytes", "tenant")

    def __init__(self, holdings: Holdings, tenant: str) -> None:
        self._holdings = holdings
        self._size_bytes = 0
        self.tenant = tenant

    def may_take(self, size_bytes: int) -> bool:
        """Whether it may hold so much, all of it together, beside what the tenant's others hold."""
        holdings = self._holdings
        return holdings.of(self.tenant) - self._size_bytes + size_bytes <= holdings.limit_bytes

    def set(self, size_bytes: int) -> None:
        """It holds so much now."""
        if size_bytes != self._size_bytes:
            self._holdings.change(self.tenant, size_bytes - self._size_bytes)
            self._size_bytes = size_bytes
