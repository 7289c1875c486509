"""Owns the figures that others have published and that Degas is compared with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """Photon decoding moondream2: milliseconds a step, and the gain in per cent."""

    forward_ms: float
    sample_ms: float
    pipelined_ms: float
    blocking_ms: float
    gain_pct: float

    @property
    def host_ms(self) -> float:
        """The host's time that pipelining hides (published as 0.48, 0.74 and 1.57 ms on the B200's host)."""
        return self.blocking_ms - self.pipelined_ms

    @property
    def tail_ms(self) -> float:
        """The device's time of a step beyond the forward: sampling, and idle time between steps."""
        return self.pipelined_ms - self.forward_ms


PHOTON = {
    ("rtx3090", 1): PublishedRow(4.87, 0.20, 5.10, 5.44, 6.5),
    ("rtx3090", 8): PublishedRow(6.66, 0.27, 6.97, 7.52, 7.8),
    ("rtx3090", 32): PublishedRow(10.24, 0.26, 10.52, 11.74, 11.6),
    ("b200", 1): PublishedRow(2.45, 0.14, 2.63, 3.11, 17.6),
    ("b200", 8): PublishedRow(3.12, 0.14, 3.30, 4.04, 21.9),
    ("b200", 32): PublishedRow(3.80, 0.14, 3.98, 5.55, 35.4),
}
"""Moondream, "pipelined decoding" (2026): steady state, median; about 110 output tokens a request."""

OUTPUT_TOKENS = 110
