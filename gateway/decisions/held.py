"""Owns what the gateway believes a worker's cache of pictures' features to hold. Pure; gateway's loop.

A mirror of the worker's own cache: least recently used first out, bounded by the bytes that the worker announced. It may be
wrong, where several gateways share a worker: a picture that is believed to be there is sent as pixels, which are encoded
once more if it is not.
"""

from __future__ import annotations


class Held:
    """The pictures of one worker's life, by content."""

    __slots__ = ("_max_bytes", "_num_bytes", "_sizes")

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._sizes: dict[bytes, int] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes

    def add(self, key: bytes, num_bytes: int) -> None:
        """The worker is given this picture, or uses it again."""
        self._num_bytes += num_bytes - self._sizes.pop(key, 0)
        self._sizes[key] = num_bytes
        while self._num_bytes > self._max_bytes and len(self._sizes) > 1:
            oldest = next(iter(self._sizes))
            self._num_bytes -= self._sizes.pop(oldest)
