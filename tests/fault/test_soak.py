"""The soak, some seconds of it, and what it counts as explained; the long run is `degas soak`."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest

from loadtest.calls import Tally
from loadtest.chaos.readings import Holding, Reading
from loadtest.chaos.soak import Blow, Leg, Plan, Soaked, leg_of, soak
from loadtest.chaos.soak_report import Verdict
from loadtest.client import Point, Result
from loadtest.scenarios import Scenario, Slo


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_some_seconds_of_everything_with_a_killed_worker_and_a_killed_gateway() -> None:
    verdict = Verdict(soak(Plan("sim", seconds=8.0, rate=6.0, blow_every_s=2.5)))
    soaked = verdict.soaked
    assert {(blow.post, blow.signal) for blow in soaked.blows} >= {
        ("worker", "SIGKILL"),
        ("gateway-2", "SIGKILL"),
    }
    assert sum(leg.ok for leg in soaked.legs) > 10
    said = json.loads(json.dumps(verdict.to_json()))
    kept = verdict.promises()
    assert [name for name, is_kept in kept.items() if is_kept is False] == [], said
    assert kept["memory ≤ 1 MB/h"] is None  # nothing is said of minutes
    assert set(soaked.lives.posts) == {"worker", "gateway", "gateway-2", "supervisor", "helpers"}


def reading(pages: int = 0, descriptors: int = 20) -> Reading:
    return Reading(0.0, {"gateway": Holding((1,), 50_000_000, descriptors)}, 0, pages, 0, 0)


def result(*points: Point) -> Result:
    made = Result(Scenario(kind="mixed"), started_at="")
    made.groups["all"] = Tally(Slo())
    made.points = list(points)
    return made


def point(due_s: float, total_s: float, code: str) -> Point:
    return Point(due_s, 0.0, total_s, "chat", code)


def test_a_failure_is_explained_by_a_blow_that_its_life_met() -> None:
    blow = Blow("worker", "SIGKILL", at_s=110.0, back_s=112.0)
    leg = leg_of(
        result(
            point(5.0, 6.0, "worker_lost"),  # begun before, ended by it
            point(11.0, 0.1, "loading"),  # came while nobody was there
            point(14.5, 0.1, "loading"),  # within a moment of its return
            point(2.0, 1.0, "worker_lost"),  # over before
            point(16.0, 1.0, "loading"),  # long after
            point(9.0, 5.0, "internal_error"),  # met by it, but no kill is an excuse for that
            point(3.0, 9.0, "ok"),
            point(3.0, 9.0, "left"),
        ),
        [blow],
        start_s=100.0,
        begun_s=90.0,
        rest=None,
    )
    assert leg.errors == Counter(loading=3, worker_lost=2, internal_error=1)
    assert leg.unexplained == Counter(worker_lost=1, loading=1, internal_error=1)
    assert leg.at_s == 10.0


def soaked(**changes: object) -> Soaked:
    """Two quiet hours."""
    made = Soaked(Plan("sim"), reading(), seconds=7200.0)
    for second in range(0, 7200, 10):
        made.lives.on_sample("gateway", (1,), second, 50_000_000)
    made.legs = [Leg(600.0 * n, 6000, 5990, 10, 8.0, 20.0, rest=reading()) for n in range(12)]
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def broken(verdict: Verdict) -> list[str]:
    return [name for name, kept in verdict.promises().items() if kept is False]


def test_two_quiet_hours_keep_everything() -> None:
    verdict = Verdict(soaked())
    assert verdict.is_clean and None not in verdict.promises().values()
    assert len(verdict.tables()) == 2


def test_what_grows_is_told() -> None:
    made = soaked()
    for second in range(7200, 14400, 10):
        made.lives.on_sample("gateway", (1,), second, 50_000_000 + 4000 * (second - 7200))
    made.legs = [
        dataclasses.replace(leg, ttft_p50_ms=8.0 + 3.0 * number) for number, leg in enumerate(made.legs)
    ]
    assert broken(Verdict(made)) == ["memory ≤ 1 MB/h", "first token's drift ≤ 20 %/h"]


def test_what_is_left_behind_is_told() -> None:
    made = soaked(blows=[Blow("worker", "SIGKILL", 10.0)], other_deaths=1)
    made.legs[-1].rest = reading(pages=3, descriptors=40)
    made.legs[3].rest = None
    made.legs[4].unexplained["internal_error"] += 1
    made.legs[5].stopped = "the server does not answer"
    found = broken(Verdict(made))
    assert found == [name for name in Verdict(made).promises() if not name.startswith(("memory", "first"))]


@pytest.mark.parametrize(
    "plan", [Plan("none"), Plan(seconds=1), Plan(rate=0), Plan(gateways=0), Plan(blow_every_s=1)]
)
def test_plans_that_cannot_be_run_say_what_would_work(plan: Plan) -> None:
    with pytest.raises(ValueError, match="would work"):
        soak(plan)
