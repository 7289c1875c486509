"""How many of what, the file of costs, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadtest.bench.simulate import app
from loadtest.capacity.cluster import Cluster, Load
from loadtest.capacity.command import cluster
from loadtest.capacity.costs import BUILT_IN, CostsError, profiles, read_costs
from loadtest.capacity.planning import Shape, is_met, plan
from loadtest.capacity.simulation import Objective, simulate

B200 = read_costs(None, "b200-moondream2")
if not app.registered_commands:
    app.command(name="cluster")(cluster)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["cluster", *arguments], env={"COLUMNS": "160", "TERM": "dumb"})
    return result.exit_code, result.output


@pytest.mark.parametrize("shape", [Shape(), Shape(encoders=True), Shape(True, True)])
def test_a_found_cluster_meets_the_objective_and_half_of_it_does_not(shape: Shape) -> None:
    load, objective = Load(300.0, 30, 30, picture_share=0.5), Objective(300, 8)
    found = plan(load, B200, shape, objective)
    assert is_met(found)
    chosen = found.cluster
    assert bool(chosen.encoders) == shape.encoders and bool(chosen.prefills) == shape.prefills
    half = replace(
        chosen,
        gateways=max(1, chosen.gateways // 2),
        workers=chosen.workers // 2,
        encoders=max(int(shape.encoders), chosen.encoders // 2),
        prefills=max(int(shape.prefills), chosen.prefills // 2),
        decodes=chosen.decodes // 2 or int(shape.prefills),
    )
    assert not is_met(simulate(load, half, B200, objective))


def test_a_tight_gap_takes_more_workers_than_rows_do() -> None:
    load = Load(500.0, 30, 30)
    loose, tight = (plan(load, B200, Shape(), Objective(1000, gap_ms)) for gap_ms in (100, 3.2))
    assert is_met(tight) and tight.cluster.workers > loose.cluster.workers


def test_more_members_are_not_tried_for_ever_where_they_do_not_help() -> None:
    said: list[str] = []
    found = plan(Load(50.0, 4000, 20), B200, Shape(prefills=True), Objective(70, 5), say=said.append)
    assert not is_met(found)  # the pages of 4000 tokens take 79 ms to move, before the first token
    assert 3 <= len(said) <= 12


@pytest.mark.parametrize(
    ("load", "objective", "message"),
    [
        (Load(10.0), Objective(gap_ms=1), "--gap-ms is 1 and a row alone takes 2.6 ms"),
        (Load(10.0, 100_000), Objective(ttft_ms=100), "--ttft-ms is 100 and a request alone takes"),
        (Load(0.0), Objective(), "--rate is 0; .* would work"),
        (Load(10.0, 1e6), Objective(0, 0), "workers: memory: not one sequence fits"),
    ],
)
def test_what_no_cluster_meets_is_said(load: Load, objective: Objective, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(load, B200, Shape(), objective)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Cluster(), "nobody to decode"),
        (Cluster(workers=1, prefills=1, decodes=1), "give either them"),
        (Cluster(prefills=1), "nobody to decode"),
        (Cluster(gateways=0, workers=1), "--gateways is 0; 1 to"),
        (Cluster(workers=-1), "--workers is -1; 0 to"),
        (Cluster(workers=1, queue=-1), "--queue is -1"),
    ],
)
def test_clusters_that_cannot_be(asked: Cluster, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(Load(10.0), asked, B200)


def test_every_profile_that_ships_says_where_it_comes_from() -> None:
    for name in profiles(None):
        costs = read_costs(None, name)
        assert costs.device.source and costs.gateway.source and costs.link.source
        steps = [costs.device.step_s(rows) for rows in range(1, costs.device.max_rows + 1)]
        assert steps == sorted(steps) and costs.device.rows(800) >= 1


def test_steps_lie_on_lines_between_known_rows() -> None:
    device = replace(B200.device, step_ms={1: 1.0, 3: 2.0, 5: 5.0})
    assert [round(device.step_s(rows) * 1e3, 6) for rows in (0, 1, 2, 3, 4, 5, 6)] == [
        1,
        1,
        1.5,
        2,
        3.5,
        5,
        6.5,
    ]
    assert replace(B200.device, step_ms={4: 2.0}).step_s(64) == 2e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no table"),
        ("profile = 3", "no table"),
        ("[profile.mine]\nprefill_us_per_token = 1", "step_ms must be rows"),
        ("[profile.mine]\nstep_ms = {0 = 1.0}", "rows count from 1"),
        ("[profile.mine]\nstep_ms = {one = 1.0}", "are not rows"),
        ("[profile.mine]\nstep_ms = {1 = 1.0}", "missing"),
        ("[profile.mine]\nstep_ms = {1 = 1.0}\nprefil_ms = 1", "prefil_ms is not known"),
        ("[profile.mine]\nstep_ms = {1 = 1.0}\nkv_gb = -1", "kv_gb must be a number of at least 0"),
        ("[profile.mine]\nstep_ms = {1 = 1.0}\nkv_gb = 0", "kv_gb must be more than 0"),
        ("[gatway]\n[profile.mine]\nstep_ms = {1 = 1.0}", r"\[gatway\] is no table"),
        ("[profile.other]\nstep_ms = {1 = 1.0}", "no profile 'mine'; there are: other"),
        ("mine", "is no TOML"),
    ],
)
def test_files_that_cannot_be_used_say_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "costs.toml"
    path.write_text(text)
    with pytest.raises(CostsError, match=message):
        read_costs(path, "mine")


def test_a_file_of_ones_own_needs_the_device_only(tmp_path: Path) -> None:
    path = tmp_path / "costs.toml"
    path.write_text(
        "[profile.mine]\nstep_ms = { 1 = 10, 4 = 16.5 }\nprefill_us_per_token = 2\nkv_bytes_per_token = 1000\nkv_gb = 1\n"
    )
    costs = read_costs(path, "mine")
    assert costs.device.step_s(4) == 0.0165 and costs.gateway == B200.gateway
    code, said = run("--costs", str(path), "--profile", "mine", "--rate", "5", "--json")
    assert code == 0 and json.loads(said)[0]["profile"] == "mine"


def test_the_command_says_what_breaks_first() -> None:
    code, said = run("--rate", "600", "--workers", "1")
    assert code == 1 and "What breaks first: workers (rows)" in said and "breaks first" in said
    code, said = run("--rate", "40", "--workers", "1", "--json")
    (found,) = json.loads(said)
    assert code == 0 and found["is_met"] and found["breaks_first"] == "workers"
    assert [stage["name"] for stage in found["stages"]] == ["gateways", "workers"]


def test_the_command_finds_lists_and_prints() -> None:
    code, said = run("--rate", "1000", "--find", "--json")
    assert code == 0 and json.loads(said)[0]["cluster"]["workers"] >= 5
    code, said = run("--profiles")
    assert code == 0 and all(name in said for name in profiles(None))
    code, said = run("--print-costs")
    assert code == 0 and said == BUILT_IN.read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--rate", "0"),
        ("--find", "--workers", "3"),
        ("--find", "--split", "all"),
        ("--costs", "/nowhere/costs.toml"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(arguments: tuple[str, ...]) -> None:
    code, said = run(*arguments)
    assert code == 2 and "Error" in said
