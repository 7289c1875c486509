"""Owns how long a simulated device takes for a step. Decode thread."""

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
    key_s: float = 0.0

    def forward(self, num_rows: int, num_prefill_tokens: int, num_crops: int, num_keys: int = 0) -> float:
        """Forward time of a step: decode rows interpolated linearly, prefill tokens, the keys that these attend to,
        and crops on top."""
        return (
            (self._decode(num_rows) if num_rows or not num_prefill_tokens else self._decode(1))
            + num_prefill_tokens * self.prefill_token_s
            + num_crops * self.crop_s
            + num_keys * self.key_s
        )

    def slowed(self, name: str, factor: float) -> Profile:
        """This profile with every time multiplied by `factor`."""
        return Profile(
            name,
            {rows: seconds * factor for rows, seconds in self.forward_s.items()},
            self.sample_s * factor,
            self.copy_s,
            self.prefill_token_s * factor,
            self.crop_s * factor,
            self.key_s * factor,
        )

    def _decode(self, num_rows: int) -> float:
        known = sorted(self.forward_s)
        if num_rows <= known[0]:
            return self.forward_s[known[0]]
        i = min(bisect_left(known, num_rows), len(known) - 1)
        low, high = known[i - 1], known[i]
        slope = (self.forward_s[high] - self.forward_s[low]) / (high - low)
        return self.forward_s[low] + slope * (num_rows - low)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as the cost model sees it."""

    name: str
    bandwidth_bytes_per_s: float  # as published by its maker


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model as the cost model sees it: bytes a decode step must read."""

    name: str
    weight_bytes: float
    kv_bytes_per_token: float  # K and V of all layers


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("rtx3090", 0.936e12),
        Gpu("a100", 2.039e12),
        Gpu("h100", 3.35e12),
        Gpu("h200", 4.8e12),
        Gpu("b200", 8.0e12),
    )
}
MOONDREAM2 = ModelShape("moondream2", 2.8e9, 2 * 24 * 2048 * 2)
QWEN3_06B = ModelShape("qwen3-0.6b", 1.2e9, 2 * 28 * 8 * 128 * 2)
SHAPES = {shape.name: shape for shape in (MOONDREAM2, QWEN3_06B)}

LAUNCH_S = 1.95e-3
"""The time of a step beyond moving bytes in the published runs, fitted to the six published forward times, which
it meets to 0.8 ms in the worst case (B200, 32 rows) and 0.2 ms at one row."""


def predict_forward_s(
    gpu: Gpu, shape: ModelShape, rows: int, context_tokens: int, launch_s: float = LAUNCH_S
) -> float:
    """Forward time of a decode step: fixed cost plus weights once and every row's KV, at the memory's speed."""
    num_bytes = shape.weight_bytes + rows * context_tokens * shape.kv_bytes_per_token
    return launch_s + num_bytes / gpu.bandwidth_bytes_per_s


def predicted_profile(gpu: Gpu, shape: ModelShape = MOONDREAM2, context_tokens: int = 850) -> Profile:
    """A profile from the cost model, for GPUs whose times nobody has published."""
    forward_s = {rows: predict_forward_s(gpu, shape, rows, context_tokens) for rows in (1, 8, 32, 64, 128)}
    return Profile(gpu.name, forward_s, 0.2e-3)


# Forward and sampling times of moondream2 decoding as published for Photon, at 1, 8 and 32 streams: the
# published table itself is in docs/performance.md beside what Degas does under it.
RTX_3090 = Profile("rtx3090", {1: 4.87e-3, 8: 6.66e-3, 32: 10.24e-3}, 0.25e-3)
B200 = Profile("b200", {1: 2.45e-3, 8: 3.12e-3, 32: 3.80e-3}, 0.14e-3)
A100 = predicted_profile(GPUS["a100"])
H100 = predicted_profile(GPUS["h100"])
H200 = predicted_profile(GPUS["h200"])
# A 0.6B-parameter model on an H200 at the memory's speed: the hardest case for a host.
SMALL = Profile("small", {1: 0.45e-3, 8: 0.46e-3, 32: 0.50e-3, 128: 0.65e-3}, 0.03e-3)
# For tests on a virtual clock: costs that make interleavings interesting.
TEST = Profile("test", {1: 1.0e-3, 32: 2.0e-3}, 0.1e-3, prefill_token_s=1e-5, crop_s=1e-4)

# A laptop's processor under a model of some hundred million weights.
LAPTOP = Profile("laptop", {1: 30e-3, 32: 150e-3}, 2e-3, prefill_token_s=2e-3, crop_s=0.5, key_s=5e-7)

PROFILES = {profile.name: profile for profile in (RTX_3090, A100, H100, H200, B200, SMALL, LAPTOP, TEST)}
