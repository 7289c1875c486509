"""Two gateways and three workers: places and tokens are shared fairly between gateways and tenants, and nobody starves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.unit.wire.crowd import Asker, Crowd

ROWS, QUEUE = 4, 12
FLOOD = 200  # more than all workers hold together


@contextmanager
def crowd(num_tenants: int, num_gateways: int = 2, num_workers: int = 3, **options: Any) -> Iterator[Crowd]:
    made = Crowd(
        num_gateways=num_gateways,
        num_workers=num_workers,
        num_tenants=num_tenants,
        max_queue=QUEUE,
        max_rows=ROWS,
        num_pages=200,
        prefix_cache=False,
        **options,
    )
    try:
        yield made
    finally:
        made.close()


def gained(made: Crowd, askers: list[Asker], rounds: int) -> list[int]:
    """Tokens of each asker in so many rounds."""
    before = [asker.tokens for asker in askers]
    made.serve(askers, rounds)
    return [asker.tokens - start for asker, start in zip(askers, before, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("num_gateways", [1, 2])
def test_three_workers_serve_three_times_what_one_does(num_gateways: int) -> None:
    """With answers so short that a worker's queue drains and fills several times between two of its heartbeats."""
    served = []
    for num_workers in (1, 3):
        askers = [Asker("", number, FLOOD) for number in range(num_gateways)]
        with crowd(1, num_gateways, num_workers) as made:
            made.serve(askers, 60)
            served.append(sum(gained(made, askers, 150)))
            made.stop(askers)
    assert served[1] >= 2.9 * served[0]


@pytest.mark.slow
def test_gateways_get_equal_parts_of_what_both_want() -> None:
    """One with five times as many clients, and there before the other, holds no more once shares have met."""
    askers = [Asker("", 0, FLOOD), Asker("", 1, 40, starts_after=110)]
    with crowd(1, num_workers=1) as made:
        first = gained(made, askers, 200)
        assert first[1] > 0, "some places are kept for whoever comes"
        made.serve(askers, 700)  # eight heartbeats
        one, other = gained(made, askers, 150)
        assert min(one, other) > 0.45 * (one + other)
        assert made.most_held <= ROWS + QUEUE + 2, "together they keep the bound"
        made.stop(askers)
    assert all(not asker.seen for asker in askers), "refused before acceptance, never after"


@pytest.mark.slow
def test_gateways_that_begin_at_the_same_moment_come_back_to_the_bound() -> None:
    """Neither knows of the other until the first heartbeat: each takes all places then, and gives back what is too much."""
    askers = [Asker("", 0, FLOOD), Asker("", 1, FLOOD)]
    with crowd(1) as made:
        made.serve(askers, 40)
        assert made.most_held == 2 * (ROWS + QUEUE)
        made.serve(askers, 110)
        made.most_held = 0
        made.serve(askers, 60)
        assert made.most_held <= ROWS + QUEUE + 2
        made.stop(askers)


@pytest.mark.slow
def test_a_tenant_who_floods_both_gateways_starves_nobody() -> None:
    """Another one, at one gateway only and with few requests at once, gets in at once and gets its half."""
    askers = [Asker("a", 0, FLOOD), Asker("a", 1, FLOOD), Asker("b", 1, 4 * ROWS, starts_after=60)]
    with crowd(2) as made:
        made.serve(askers, 110)
        *flood, small = gained(made, askers, 200)
        assert small > 0.45 * (sum(flood) + small)
        assert askers[2].first_refusals == 0, "some places are kept"
        made.stop(askers)


@pytest.mark.slow
def test_three_tenants_at_different_gateways_share_alike() -> None:
    askers = [
        Asker("a", 0, FLOOD),
        Asker("b", 1, FLOOD),
        Asker("c", 0, 2 * ROWS, starts_after=40),
        Asker("c", 1, 2 * ROWS, starts_after=40),
    ]
    with crowd(3) as made:
        made.serve(askers, 110)
        one, other, *third = gained(made, askers, 150)
        assert min(one, other, sum(third)) > 0.25 * (one + other + sum(third))
        made.stop(askers)


@pytest.mark.slow
def test_many_small_tenants_are_all_served_beside_a_flood() -> None:
    small = [Asker(f"small-{number}", number % 2, 1, starts_after=30 + number) for number in range(12)]
    askers = [Asker("big", 0, FLOOD), Asker("big", 1, FLOOD), *small]
    with crowd(13) as made:
        made.serve(askers, 250)
        assert all(asker.ended > 5 for asker in small), [asker.ended for asker in small]
        made.stop(askers)


@pytest.mark.slow
def test_a_lone_tenant_uses_nearly_all_places_and_rows() -> None:
    """What is kept for others costs a few places of the queue, and no row."""
    askers = [Asker("a", 0, FLOOD), Asker("a", 1, FLOOD)]
    with crowd(2) as made:
        made.serve(askers, 60)
        assert all(made.held(worker) >= ROWS + QUEUE // 2 for worker in made.workers)
        assert all(not worker.sim.scheduler.free_rows for worker in made.workers)
        made.stop(askers)
