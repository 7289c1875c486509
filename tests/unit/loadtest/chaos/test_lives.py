"""Slopes over the lives of processes."""

from __future__ import annotations

import pytest

from loadtest.chaos.lives import Lives, middle_slope, pooled_slope


def test_lives_have_their_slope_in_common_and_heights_of_their_own() -> None:
    lives = Lives()
    for second in range(0, 7200, 60):
        pid, height = (1, 50e6) if second < 3600 else (2, 20e6)  # killed after an hour, and smaller since
        lives.on_sample("worker", pid, second, int(height + 2e6 * (second % 3600) / 3600))
    slope = lives.slope("worker", 300.0, 1200.0)
    assert slope is not None and slope.num_lives == 2
    assert slope.mb_per_hour == pytest.approx(2.0, abs=0.001)
    assert slope.measured_s == pytest.approx(2 * (3600 - 60 - 300), abs=60)


def test_long_lives_count_alone() -> None:
    lives = Lives()
    for second in range(0, 3000, 10):
        pid, height = (1, 0.0) if second < 600 else (2, 50e6)
        lives.on_sample("worker", pid, second, int(height + (2e4 * second if pid == 1 else 0)))
    judged = lives.slope("worker", 100.0, 1200.0)
    assert judged is not None and judged.is_long and judged.mb_per_hour == pytest.approx(0.0, abs=1e-6)
    short = lives.slope("worker", 100.0, 9000.0)
    assert short is not None and not short.is_long and short.mb_per_hour > 0
    assert [len(life) for life in lives.curve("worker", 20)] == [20, 20] and lives.curve("nobody") == []


def test_a_warm_up_is_each_lifes_own_and_does_not_count() -> None:
    lives = Lives()
    for second in range(600):
        grown = min(second, 100) * 1e6  # 100 MB in the first 100 s, then nothing
        lives.on_sample("gateway", 7, second, int(grown))
    settled = lives.slope("gateway", 100.0, 10.0)
    assert settled is not None and settled.mb_per_hour == pytest.approx(0.0, abs=1e-6)
    cold = lives.slope("gateway", 0.0, 10.0)
    assert cold is not None and cold.mb_per_hour > 10


def test_lives_shorter_than_their_warm_up_say_nothing() -> None:
    lives = Lives()
    for second in range(10):
        lives.on_sample("worker", second, second, 5)  # another process each time
    assert lives.slope("worker", 1.0, 0.0) is None
    assert lives.slope("nobody", 0.0, 0.0) is None


def test_pooled_slope_needs_a_spread() -> None:
    assert pooled_slope([]) is None
    assert pooled_slope([[(1.0, 2.0), (1.0, 3.0)]]) is None
    assert pooled_slope([[(0, 0), (1, 1)], [(10, 100), (12, 102)]]) == pytest.approx(1.0)


def test_an_odd_leg_does_not_move_the_middle_slope() -> None:
    points = [(float(hour), 10.0 + 0.5 * hour) for hour in range(8)]
    points[3] = (3.0, 500.0)
    assert middle_slope(points) == pytest.approx(0.5)
    assert middle_slope([(1.0, 2.0)]) is None
