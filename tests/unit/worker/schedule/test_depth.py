"""The depth in force follows what the device loses at each: idle time against zombie rows."""

from __future__ import annotations

import pytest

from tests.unit.worker.loop.simulation import Simulation
from worker.schedule.depth import WINDOW_STEPS, WINDOWS_BETWEEN_TRIALS, DepthGovernor


def run(governor: DepthGovernor, windows: int, idle: dict[int, float], zombies: dict[int, int]) -> list[int]:
    """Depth in force in each window, with these idle shares and zombies of 100 rows at each depth."""
    depths = []
    for _ in range(windows):
        depths.append(governor.depth)
        for _ in range(WINDOW_STEPS):
            share = idle[governor.depth]
            governor.on_commit(1.0 - share, share, 100, zombies[governor.depth])
    return depths


def test_stays_at_two_where_nothing_is_idle() -> None:
    governor = DepthGovernor(3)
    assert set(run(governor, 100, {2: 0.005, 3: 0.0}, {2: 0, 3: 0})) == {2}


def test_goes_deeper_where_the_host_is_late_and_looks_again() -> None:
    governor = DepthGovernor(3)
    depths = run(governor, 2 * WINDOWS_BETWEEN_TRIALS, {2: 0.05, 3: 0.0}, {2: 1, 3: 2})
    assert depths[0] == 2 and depths.count(2) == 2, "one window at two for each comparison"


def test_comes_back_where_zombies_cost_more_than_the_bubble() -> None:
    governor = DepthGovernor(3)
    depths = run(governor, 2 * WINDOWS_BETWEEN_TRIALS, {2: 0.05, 3: 0.0}, {2: 10, 3: 20})
    assert depths[1] == 3 and depths.count(3) == 2


def test_follows_a_change_of_the_load() -> None:
    governor = DepthGovernor(4)
    run(governor, 3, {2: 0.05, 4: 0.0}, {2: 1, 4: 2})
    assert governor.depth == 4
    run(governor, WINDOWS_BETWEEN_TRIALS + 2, {2: 0.05, 4: 0.0}, {2: 10, 4: 30})
    assert governor.depth == 2


def test_two_is_no_choice() -> None:
    with pytest.raises(ValueError, match="safe value is 3"):
        DepthGovernor(2)


def test_the_loop_obeys_and_feeds_it() -> None:
    governor = DepthGovernor(3)
    sim = Simulation(depth=3, num_slots=3, max_rows=2, late_launch=False, governor=governor)
    streams = [sim.submit([30, 31 + i], 60) for i in range(2)]
    deepest = 0
    for _ in range(40):
        sim.tick()
        deepest = max(deepest, sim.engine.metrics.depth)
    assert deepest == 2 and governor._num_steps > 0
    governor.depth = 3
    for _ in range(40):
        sim.tick()
        deepest = max(deepest, sim.engine.metrics.depth)
    assert deepest == 3
    sim.run()
    assert all(stream.finish is not None for stream in streams)
