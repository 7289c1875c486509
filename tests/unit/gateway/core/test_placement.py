"""Which of several workers a newcomer gets, between two heartbeats."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.core.placement import Placement, Worker
from gateway.decisions.admission import Admission
from gateway.generation import RequestError

MODEL = cast(Any, SimpleNamespace())


def placement(num_workers: int, *, rows: int = 4, queue: int = 4) -> Placement:
    admission = Admission(max_queue=queue, max_wait_s=30.0)
    made = Placement(admission, on_refused=lambda code: None)
    for key in range(num_workers):
        ready = SimpleNamespace(role="all", features=None, model=SimpleNamespace(model_id="sim"))
        link = SimpleNamespace(endpoint=f"ipc:///{key}", ready=ready, beat=None, refusal="")
        worker = Worker(key, cast(Any, link), cast(Any, None), admission.occupancy(rows, queue), MODEL)
        made.add(worker)
    return made


def beat(worker: Worker, num_held: int, *, num_gateways: int) -> None:
    """What the worker tells of all gateways' requests, as the service passes it on."""
    cast(Any, worker.link).beat = SimpleNamespace(num_running=num_held, num_waiting=0, draining=False)
    worker.occupancy.share(num_gateways, num_held)


def test_a_worker_that_has_drained_since_its_heartbeat_is_the_one_to_take() -> None:
    made = placement(2)
    first, second = made.workers
    for worker in made.workers:
        for _ in range(6):
            worker.occupancy.enter("")
        beat(worker, 6, num_gateways=1)
    for _ in range(6):
        second.occupancy.leave("", 1.0)  # and no heartbeat yet says so
    assert [made.place(MODEL, "", 1) for _ in range(3)] == [second] * 3
    assert first.num_active == 6 and second.num_active == 0


def test_what_other_gateways_hold_counts() -> None:
    made = placement(2)
    first, second = made.workers
    beat(first, 5, num_gateways=2)
    beat(second, 2, num_gateways=2)
    assert made.place(MODEL, "", 1) is second


def test_a_fuller_worker_with_a_place_left_goes_before_the_least_loaded_without() -> None:
    made = placement(2)
    first, second = made.workers
    for _ in range(4):
        second.occupancy.enter("")
    first.occupancy.bound = 0  # the other gateway's part is what is left
    assert first.load < second.load and first.occupancy.num_free == 0 < second.occupancy.num_free
    assert made.place(MODEL, "", 1) is second


def test_a_full_house_refuses_with_a_time() -> None:
    made = placement(2)
    for worker in made.workers:
        for _ in range(8):
            worker.occupancy.enter("")
    with pytest.raises(RequestError) as refusal:
        made.place(MODEL, "", 1)
    assert refusal.value.retry_after_s and refusal.value.retry_after_s > 0
