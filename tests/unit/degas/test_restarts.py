"""When a dead child is started again, and when no more: pure."""

from __future__ import annotations

from degas.restarts import RestartLimits, Restarts


def test_delay_doubles_to_its_bound() -> None:
    restarts = Restarts(RestartLimits(max_quick_deaths=100))
    delays = [restarts.on_death(10.0) for _ in range(8)]
    assert delays == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]


def test_health_resets_the_delay() -> None:
    restarts = Restarts(RestartLimits())
    for _ in range(4):
        restarts.on_death(30.0)
    assert restarts.on_death(60.0) == 0.2
    assert restarts.on_death(30.0) == 0.4


def test_five_quick_deaths_in_a_row_are_a_crash_loop() -> None:
    restarts = Restarts(RestartLimits())
    assert [restarts.on_death(None) for _ in range(5)][-1] is None
    assert restarts.num_deaths == 5


def test_a_life_of_some_seconds_breaks_the_row() -> None:
    restarts = Restarts(RestartLimits())
    for _ in range(3):
        assert restarts.on_death(0.5) is not None and restarts.on_death(None) is not None
        assert restarts.on_death(6.0) is not None
    assert restarts.quick_deaths == 0
