"""The feature cache holds no more memory than its bound says, however pictures were encoded together."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.gpu.random_models import random_model
from shared.protocol import FeatureFormat, Sheet
from worker.device.choices import without
from worker.device.contract import Event
from worker.device.cpu import CpuDevice, CpuStream
from worker.models.contract import Model
from worker.models.moondream import Moondream
from worker.schedule.sequence import Picture, Run
from worker.step.features import FeatureCache
from worker.step.picture_encoder import TorchEncoder

SIDE = 70


@pytest.fixture(scope="module")
def model() -> Moondream:
    with torch.inference_mode():
        made = random_model("tiny-moondream", torch.device("cpu"), torch.float32).model
    assert isinstance(made, Moondream)
    return made


def picture(number: int) -> Picture:
    pixels = bytes([number]) * (SIDE * SIDE * 3)
    sheets = [Sheet(1, 1, SIDE, SIDE)] * 2
    return Picture((Run(1, 25, 0),), sheets, [pixels] * 2, hashlib.sha256(pixels).digest())


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
        one = FeatureCache(model, 1 << 30, CpuDevice()).get([("a", picture(0), 0)])
        each = next(iter(one.values())).nbytes
        cache = FeatureCache(model, most * each, CpuDevice())
        for batch in batches:
            wanted = [("a", picture(number), 0) for number in batch]
            found = cache.get(wanted)
            assert set(found) == {("a", p.digest, 0) for _, p, _ in wanted}
            assert held_bytes(cache) <= most * each
            for tenant, shown, unit in wanted:
                alone = model.encode_images([cache._upload(shown, unit)])[0]
                torch.testing.assert_close(found[tenant, shown.digest, unit], alone)


class Streamed(CpuStream):
    """A stream that writes down what it is told."""

    def __init__(self, name: str, told: list[tuple[str, str]]) -> None:
        super().__init__(late=False)
        self._name, self._told = name, told

    def record(self, event: Event | None = None) -> Any:
        self._told.append((self._name, "record"))
        return super().record(event)

    def wait(self, event: Event) -> None:
        self._told.append((self._name, "wait"))

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        self._told.append((self._name, "begin"))
        yield
        self._told.append((self._name, "end"))


class TwoStreams(CpuDevice):
    """A device whose pictures have a stream of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, str]] = []
        self.compute, self.aside = Streamed("compute", self.told), Streamed("aside", self.told)

    def hand_over(self, tensor: torch.Tensor) -> None:
        self.told.append((str(tensor.untyped_storage().data_ptr()), "handed over"))


def test_pictures_are_encoded_beside_the_compute_stream_which_waits_before_it_reads(model: Moondream) -> None:
    device = TwoStreams()

    def encode(crops: torch.Tensor) -> torch.Tensor:
        device.told.append(("encoder", "run"))
        return model.vision.features(crops)

    with torch.inference_mode():
        cache = FeatureCache(model, 1 << 30, device, encode)
        found = cache.get([("a", picture(1), 0), ("a", picture(2), 0)])
        kept = [(str(features.untyped_storage().data_ptr()), "handed over") for features in found.values()]
        order = [("aside", "begin"), ("encoder", "run"), ("aside", "end"), ("aside", "record")]
        assert device.told == [*order, ("compute", "wait"), *kept]
        device.told.clear()
        cache.get([("a", picture(2), 0)])
        assert device.told == [], "nothing is waited for where nothing is encoded"
        with without("vision_stream"):
            cache.get([("a", picture(3), 0)])
        assert device.told == [("compute", "begin"), ("encoder", "run"), ("compute", "end")]


@pytest.mark.slow
def test_what_another_process_encoded_is_what_would_be_encoded_here(model: Moondream) -> None:
    device = CpuDevice()
    encoder = TorchEncoder(model, device, weights="w", feature_bytes=1 << 20, step_crops=4)
    own = FeatureCache(model, 1 << 20, device, format=encoder.format)
    shown = picture(3)
    data = encoder.encode("a", shown, lambda: None)
    assert len(data) == 25 * encoder.format.columns * 4
    came = Picture(shown.runs, shown.sheets, (), shown.digest, features=data)
    with torch.inference_mode():
        alone = model.encode_images([own._upload(shown, 0)])[0]
        found = own.get([("a", came, 0)])["a", shown.digest, 0]
        assert torch.equal(found, alone) and own.bytes_given_total == len(data)
        again = own.get([("a", shown, 0)])["a", shown.digest, 0]
    assert again is found and own.num_hits == 1, "kept like one that was encoded here"
    encoder.encode("a", shown, lambda: None)
    assert encoder.num_hits == 1


def test_a_unit_of_a_picture_that_came_encoded_is_its_own_rows() -> None:
    no_model = cast(Model, SimpleNamespace(device=torch.device("cpu")))
    own = FeatureCache(no_model, 1 << 20, CpuDevice(), format=FeatureFormat("float16", 3, "w"))
    rows = torch.arange(24, dtype=torch.float16).reshape(8, 3)
    came = Picture((Run(1, 8, 0),), (), (), b"d", unit_tokens=4, features=rows.numpy().tobytes())
    found = own.get([("a", came, 1), ("a", came, 0)])
    assert torch.equal(found["a", b"d", 1], rows[4:]) and torch.equal(found["a", b"d", 0], rows[:4])
