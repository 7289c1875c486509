"""The feature cache holds no more memory than its bound says, however pictures were encoded together."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.gpu.random_models import random_model
from worker.models.moondream import Moondream
from worker.schedule.sequence import Picture
from worker.step.features import FeatureCache

SIDE = 70


@pytest.fixture(scope="module")
def model() -> Moondream:
    with torch.inference_mode():
        made = random_model("tiny-moondream", torch.device("cpu"), torch.float32).model
    assert isinstance(made, Moondream)
    return made


def picture(number: int) -> Picture:
    pixels = bytes([number]) * (SIDE * SIDE * 3)
    return Picture(1, 25, 1, 1, SIDE, SIDE, hashlib.sha256(pixels).digest(), pixels, pixels)


def held_bytes(cache: FeatureCache) -> int:
    """Bytes of all memory that the kept features keep alive, each allocation counted once."""
    kept: dict[int, Any] = {}
    for features in cache._features.values():
        storage = features.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
    return sum(kept.values())


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(
    batches=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=6),
    most=st.integers(1, 6),
)
def test_what_is_kept_stays_within_the_bound(model: Moondream, batches: list[list[int]], most: int) -> None:
    with torch.inference_mode():
        one = FeatureCache(model, 1 << 30).get([("a", picture(0))])
        each = next(iter(one.values())).nbytes
        cache = FeatureCache(model, most * each)
        for batch in batches:
            wanted = [("a", picture(number)) for number in batch]
            found = cache.get(wanted)
            assert set(found) == {("a", p.digest) for _, p in wanted}
            assert held_bytes(cache) <= most * each
            for tenant, shown in wanted:
                alone = model.encode_images([cache._upload(shown)])[0]
                torch.testing.assert_close(found[tenant, shown.digest], alone)
