"""Owns how long a simulated device takes for a step. Pure; decode thread."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Profile:
    """Step costs of one GPU and model. Times in seconds; `forward_s` maps decode rows to forward time."""

    name: str
    forward_s: dict[int, float]
    sample_s: float
    copy_s: float = 15e-6
    prefill_token_s: float = 4e-6
    crop_s: float = 1e-3

    def forward(self, num_rows: int, num_prefill_tokens: int, num_crops: int) -> float:
        """Forward time of a step: decode rows interpolated linearly, prefill tokens and crops on top."""
        return (
            (self._decode(num_rows) if num_rows or not num_prefill_tokens else self._decode(1))
            + num_prefill_tokens * self.prefill_token_s
            + num_crops * self.crop_s
        )

    def _decode(self, num_rows: int) -> float:
        known = sorted(self.forward_s)
        if num_rows <= known[0]:
            return self.forward_s[known[0]]
        i = min(bisect_left(known, num_rows), len(known) - 1)
        low, high = known[i - 1], known[i]
        slope = (self.forward_s[high] - self.forward_s[low]) / (high - low)
        return self.forward_s[low] + slope * (num_rows - low)


# Forward and sampling times of moondream2 decoding as published for Photon (milliseconds a step at 1, 8 and 32
# streams): the published table itself is in docs/performance.md beside what Degas does under it.
RTX_3090 = Profile("rtx3090", {1: 4.87e-3, 8: 6.66e-3, 32: 10.24e-3}, 0.25e-3)
B200 = Profile("b200", {1: 2.45e-3, 8: 3.12e-3, 32: 3.80e-3}, 0.14e-3)
# A 0.6B-parameter model on an H200: about 1.2 GB of weights at 4.3 TB/s and some launch overhead.
SMALL = Profile("small", {1: 0.45e-3, 8: 0.46e-3, 32: 0.50e-3, 128: 0.65e-3}, 0.03e-3)
# For tests on a virtual clock: costs that make interleavings interesting.
TEST = Profile("test", {1: 1.0e-3, 32: 2.0e-3}, 0.1e-3, prefill_token_s=1e-5, crop_s=1e-4)

PROFILES = {profile.name: profile for profile in (RTX_3090, B200, SMALL, TEST)}
