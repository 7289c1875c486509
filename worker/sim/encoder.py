"""Owns encoding pictures on the simulated device: what a position of one holds, after the time that it takes. Decode thread."""

from __future__ import annotations

from typing import Final

import numpy as np

from shared.protocol import FeatureFormat
from worker.schedule.sequence import Picture
from worker.sim.profiles import Profile
from worker.sim.runner import image_mark
from worker.sim.timeline import Clock
from worker.step.contract import GraphCounts, Progress

SIM_FEATURES: Final = FeatureFormat("int64", 1, "sim")
"""A position's mark, as `worker.sim.runner` writes it into paged memory."""


class SimEncoder:
    """Implements `loop.encoding.PictureEncoder`."""

    format = SIM_FEATURES

    def __init__(self, clock: Clock, profile: Profile) -> None:
        self._clock = clock
        self._profile = profile
        self.graph_counts = GraphCounts()
        self.num_hits = 0

    def encode(self, tenant: str, picture: Picture, progress: Progress) -> bytes:
        """The marks of the picture's positions."""
        self._clock.sleep_until(self._clock.now() + picture.num_crops * self._profile.crop_s)
        progress()
        num = picture.features_before(picture.end)
        return np.array([image_mark(picture.digest, i) for i in range(num)], np.uint64).tobytes()
