"""Kills under load, the short form; the long run is `degas bench chaos`."""

from __future__ import annotations

import signal

import pytest

from loadtest.bench.chaos import Blow, Plan, _schedule, _slope, run_chaos
from loadtest.bench.chaos_client import Asked
from loadtest.bench.chaos_server import absence


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_kill_under_load_leaves_nobody_without_an_end_and_nothing_behind() -> None:
    report = run_chaos(Plan(clients=20, seconds=5, kill_every_s=2.5, stops=0))
    assert len(report.kills) == 1 and report.stayed > 20
    kept = report.promises()
    kept.pop("begun streams are told within a second")  # times are for the command
    kept.pop("ready again within 3 s")
    kept.pop("memory does not grow")
    assert all(kept.values()), report


def asked(sent_s: float, first_s: float = 0.0, end_s: float = 0.0, code: str = "", **more: bool) -> Asked:
    return Asked("sse", sent_s, first_s, end_s, code, int(end_s > 0), **more)


def test_what_a_kill_met_is_counted_by_what_became_of_it() -> None:
    blow = Blow("SIGKILL", 10.0, felt_s=10.1, ready_s=11.5)
    blow.count(
        [
            asked(9.0, 9.1, 9.9),  # over before
            asked(10.5, 10.6, 10.9),  # came after
            asked(9.0, 9.5, 10.2, "worker_lost"),
            asked(9.0, 9.5, 10.0001),  # its end was on its way
            asked(9.0, 12.0, 13.0),
            asked(9.0, 12.0, 17.1, "worker_lost"),  # begun again, and met by the next kill
            asked(9.0, 0.0, 40.0, "worker_lost"),
            asked(9.0),
            asked(9.0, 0.0, 10.1, "loading"),  # never accepted
            asked(9.0, hung_up=True),
        ]
    )
    assert blow.terminal_s == [pytest.approx(0.2)]
    assert (blow.unstarted, blow.served) == (4, 2)
    assert blow.unserved == {"worker_lost": 1, "no terminal event": 1}
    assert blow.ready_again_s == pytest.approx(1.5)
    assert Blow("SIGKILL", 10.0).ready_again_s == float("inf")


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ([(9.9, True), (10.1, False), (10.2, False), (11.0, True), (11.1, True)], (10.1, 11.0)),
        ([(9.9, True), (10.1, False)], (10.1, 0.0)),
        ([(9.9, True), (10.1, True)], None),  # not noticed so far
        (
            [(9.9, True), (10.1, True), (10.7, True), (10.8, True), (12.1, True)],
            (10.1, 10.7),
        ),  # between two answers
    ],
)
def test_absences_are_found(answers: list[tuple[float, bool]], found: tuple[float, float] | None) -> None:
    assert absence(answers, 10.0, 1.0 if len(answers) == 5 and answers[1][1] else 2.0) == found


def test_blows_fit_and_the_stops_are_among_them() -> None:
    kinds = [kind.name for kind in _schedule(Plan())]
    assert kinds == ["SIGKILL"] * 3 + ["SIGSTOP"] + ["SIGKILL"]
    assert _schedule(Plan(seconds=5, kill_every_s=2.5)) == [signal.SIGKILL]
    assert _schedule(Plan(seconds=3, kill_every_s=7)) == []


def test_the_slope_is_that_of_a_line() -> None:
    assert _slope([(i * 0.5, 1000 + 50 * i) for i in range(20)]) == pytest.approx(100.0)
    assert _slope([(0.0, 1), (1.0, 2)]) == 0.0


@pytest.mark.parametrize("plan", [Plan(model="none"), Plan(clients=0), Plan(clients=5000), Plan(seconds=1)])
def test_plans_that_cannot_be_run_say_what_would_work(plan: Plan) -> None:
    with pytest.raises(ValueError, match="would work"):
        run_chaos(plan)
