"""The simulation against what queueing theory knows: Erlang's formulas, processor sharing, saturation."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from loadtest.capacity.cluster import Cluster, Load, breaks_first, erlang_c, mean_wait_s, stages
from loadtest.capacity.costs import Costs, DeviceCosts, GatewayCosts, LinkCosts
from loadtest.capacity.members import Emptiest, Station
from loadtest.capacity.simulation import Objective, part_of, simulate

FREE = GatewayCosts(request_us=0.0, token_us=0.0, refusal_us=0.0, picture_ms=0.0)


def costs(step_ms: dict[int, float], *, rows: int = 8, prefill_us: float = 0.0, **more: float) -> Costs:
    device = DeviceCosts(step_ms, prefill_us, 1.0, 1e3, max_rows=rows, **more)  # type: ignore[arg-type]
    return Costs("given", device, FREE, LinkCosts(1e9, 0.0))


@pytest.mark.parametrize(
    ("servers", "offered", "chance"), [(1, 0.5, 0.5), (2, 1.0, 1 / 3), (10, 8.0, 0.409180), (3, 3.0, 1.0)]
)
def test_erlangs_formula(servers: int, offered: float, chance: float) -> None:
    assert erlang_c(servers, offered) == pytest.approx(chance, rel=1e-5)


def test_erlangs_formula_of_thousands_does_not_overflow() -> None:
    assert 0 < erlang_c(5000, 4900.0) < 1
    assert mean_wait_s(4900.0, 1.0, 5000) < 0.01
    assert mean_wait_s(10.0, 1.0, 10) == float("inf")


@pytest.mark.parametrize(("servers", "rate"), [(1, 0.7), (4, 3.2), (16, 14.0)])
def test_a_station_waits_as_m_m_c(servers: int, rate: float) -> None:
    rng = random.Random(5)
    station = Station(servers)
    at_s, waits, num = 0.0, 0.0, 60_000
    for _ in range(num):
        at_s += rng.expovariate(rate)
        work_s = rng.expovariate(1.0)
        waits += station.take(at_s, work_s) - work_s - at_s
    assert waits / num == pytest.approx(mean_wait_s(rate, 1.0, servers), rel=0.12)
    assert station.done_s(at_s) / at_s / servers == pytest.approx(rate / servers, rel=0.03)


def test_rows_that_share_a_step_are_processor_sharing() -> None:
    """A step in proportion to its rows is M/G/1-PS: a mean stay of service / (1 - load), whatever the lengths' spread."""
    shared = costs({1: 1.0, 200: 200.0}, rows=200)
    load = Load(rate=30.0, prompt_tokens=1, output_tokens=21)  # 20 steps of 1 ms each: a load of 0.6
    for fixed in (False, True):
        seen = simulate(replace(load, fixed_lengths=fixed), Cluster(workers=1), shared, num_requests=15_000)
        assert seen.total_ms["mean"] == pytest.approx(20 / (1 - 0.6), rel=0.15)


def test_rows_that_do_not_slow_each_other_take_their_own_time() -> None:
    seen = simulate(Load(50.0, 1, 30), Cluster(workers=4), costs({1: 2.0}, rows=64), num_requests=8000)
    assert seen.gap_ms["p99"] == pytest.approx(2.0, rel=1e-6)
    assert seen.total_ms["mean"] == pytest.approx(29 * 2.0, rel=0.05)
    assert seen.rows == pytest.approx(50 * 29 * 2e-3 / 4, rel=0.05)  # Little


@pytest.mark.parametrize("workers", [1, 3, 40])
def test_a_flooded_cluster_serves_its_closed_form_capacity_and_refuses_the_rest(workers: int) -> None:
    given = costs({1: 2.5, 8: 3.2}, rows=8, prefill_us=10.0)
    cluster = Cluster(workers=workers, queue=8)
    capacity = breaks_first(stages(Load(1.0, 50, 20), cluster, given)).capacity
    assert capacity == pytest.approx(workers / (21.5 * 3.2e-3 / 8 + 50 * 10e-6))
    seen = simulate(Load(3 * capacity, 50, 20), cluster, given)
    assert seen.answered_per_s == pytest.approx(capacity, rel=0.07)
    assert seen.refused_share == pytest.approx(2 / 3, abs=0.06)


def test_what_breaks_first_is_the_stage_that_is_asked_most() -> None:
    given = costs({1: 2.5, 32: 4.0}, rows=32, prefill_us=4.0, crop_ms=1.0, picture_tokens=729)
    given = replace(given, gateway=GatewayCosts(300.0, 8.0, picture_ms=25.0, image_processes=2))
    load = Load(100.0, 30, 30, picture_share=1.0, crops=9)
    few_gateways = stages(load, Cluster(gateways=1, workers=10), given)
    assert (
        breaks_first(few_gateways).name == "image processes" and breaks_first(few_gateways).use(100) == 1.25
    )
    few_workers = stages(load, Cluster(gateways=4, workers=1), given)
    assert breaks_first(few_workers).name == "workers"
    few_encoders = stages(load, Cluster(gateways=4, workers=10, encoders=1), given)
    assert breaks_first(few_encoders).name == "workers" or few_encoders[2].name == "encoders"
    assert {stage.name: stage.capacity for stage in few_encoders}["encoders"] == pytest.approx(1000 / 9)
    small = replace(given, device=replace(given.device, kv_gb=1e-9))
    assert breaks_first(stages(load, Cluster(workers=1), small)).capacity == 0
    assert simulate(load, Cluster(gateways=4, workers=1), small, num_requests=500).refused_share > 0.98


def test_stages_apart_take_their_work_from_the_decoding_workers() -> None:
    given = costs({1: 2.5, 32: 4.0}, rows=32, prefill_us=20.0)
    load = Load(100.0, 1000, 30)
    together = simulate(load, Cluster(workers=4), given)
    apart = simulate(load, Cluster(prefills=3, decodes=4), given)
    assert apart.gap_ms["mean"] < together.gap_ms["mean"]
    assert apart.use["prefills"] == pytest.approx(100 * 1000 * 20e-6 / 3, rel=0.08)
    assert apart.answered_per_s == pytest.approx(100, rel=0.05)


def test_a_part_has_the_use_of_the_whole() -> None:
    given = costs({1: 2.5, 32: 4.0}, rows=32, prefill_us=4.0, crop_ms=1.0)
    given = replace(given, gateway=GatewayCosts(300.0, 8.0, picture_ms=25.0))
    whole = Cluster(gateways=37, workers=0, encoders=90, prefills=150, decodes=1000)
    load = Load(20_000.0, 30, 30, picture_share=0.3)
    part, smaller, factor = part_of(whole, given)
    assert part.decodes <= 64 and factor == pytest.approx(1000 / 64, rel=0.1)
    for before, after in zip(
        stages(load, whole, given), stages(replace(load, rate=load.rate / factor), part, smaller), strict=True
    ):
        assert after.use(load.rate / factor) == pytest.approx(before.use(load.rate), rel=1e-3), before.name
    assert part_of(Cluster(workers=3), given)[2] == 1.0


def test_a_cluster_of_thousands_at_a_hundred_thousand_requests_a_second() -> None:
    given = costs({1: 2.5, 32: 4.0}, rows=32)
    given = replace(given, gateway=GatewayCosts(300.0, 8.0))
    seen = simulate(
        Load(100_000.0, 30, 30),
        Cluster(gateways=100, workers=4000),
        given,
        Objective(50, 10),
        num_requests=8000,
    )
    assert seen.answered_per_s == pytest.approx(100_000, rel=0.1)
    assert seen.good_per_s == pytest.approx(seen.answered_per_s, rel=0.01)
    assert seen.first.name == "gateways" and seen.simulated_part == pytest.approx(64 / 4000)


def test_the_emptiest_member_is_found_as_loads_change() -> None:
    emptiest = Emptiest(3)
    loads = [0, 0, 0]
    rng = random.Random(1)
    for _ in range(500):
        which = emptiest.lowest()
        assert loads[which] == min(loads)
        grows = rng.random() < 0.6
        which = which if grows else max(range(3), key=lambda member: loads[member])
        change = 1 if grows or not loads[which] else -1
        emptiest.change(which, loads[which], loads[which] + change)
        loads[which] += change
