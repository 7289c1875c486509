"""Owns how many of what a load needs: closed forms to begin with, then simulations until the objective is met. No clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from loadtest.capacity.cluster import MOST_MEMBERS, Cluster, Load, stages
from loadtest.capacity.costs import Costs
from loadtest.capacity.simulation import Objective, Outcome, simulate

TARGET_USE: Final = 0.7  # of every stage, before anything is simulated
MAX_ROUNDS: Final = 16
PATIENCE: Final = 3  # rounds without a gain
WORTH_IT: Final = 0.002
GOOD_SHARE: Final = 0.99  # of the requests must meet the objective


@dataclass(frozen=True, slots=True)
class Shape:
    """Which stages stand apart."""

    encoders: bool = False
    prefills: bool = False


Say = Callable[[str], None]


def plan(
    load: Load,
    costs: Costs,
    shape: Shape,
    objective: Objective,
    *,
    queue: int = 128,
    say: Say = lambda line: None,
) -> Outcome:
    """The smallest cluster found that serves the load with 99 % good; the best one tried where none does.

    Begins with every stage at 70 % of its closed-form capacity, then gives the stage with the highest use more
    members until the simulation is content. Raises ValueError where no number of members would do: a step or a prompt alone
    takes longer than the objective allows.
    """
    load.check()
    _check_possible(load, costs, objective)
    cluster = _begin(load, costs, shape, queue)
    outcome = simulate(load, cluster, costs, objective)
    best, num_idle = outcome, 0
    for _ in range(MAX_ROUNDS):
        if is_met(outcome):
            return outcome
        if num_idle == PATIENCE:
            break  # what is missed does not come from too few members: a move of pages, a single long step
        found = stages(load, cluster, costs)
        # The gap between tokens and the wait for a row are the decoding workers' alone.
        late_gap = outcome.gap_ms and objective.gap_ms and outcome.gap_ms["p99"] > objective.gap_ms
        most = (
            found[-1]
            if late_gap or outcome.refused_share
            else max(found, key=lambda stage: stage.use(load.rate))
        )
        cluster = _more(cluster, most.name)
        say(f"{most.name} → {_members(cluster, most.name)}: {_good_share(outcome):.1%} were good before")
        outcome = simulate(load, cluster, costs, objective)
        if _good_share(outcome) > _good_share(best) + WORTH_IT:
            best, num_idle = outcome, 0
        else:
            num_idle += 1
    return outcome if is_met(outcome) else best


def _good_share(outcome: Outcome) -> float:
    """Of what arrived: arrivals are random, so not of the asked rate."""
    if not outcome.answered_per_s:
        return 0.0
    return outcome.good_per_s / outcome.answered_per_s * (1 - outcome.refused_share)


def is_met(outcome: Outcome) -> bool:
    """Whether as many were good as should be."""
    return (
        outcome.good_per_s >= GOOD_SHARE * outcome.answered_per_s and outcome.refused_share <= 1 - GOOD_SHARE
    )


def _check_possible(load: Load, costs: Costs, objective: Objective) -> None:
    device = costs.device
    alone_ms = device.step_s(1) * 1e3
    if objective.gap_ms and alone_ms > objective.gap_ms:
        raise ValueError(
            f"--gap-ms is {objective.gap_ms:g} and a row alone takes {alone_ms:.1f} ms a step: no cluster of these devices meets it"
        )
    prompt_s = device.prefill_s(load.prompt_tokens) + device.step_s(1)
    if load.picture_share:
        prompt_s += device.encode_s(load.crops) + device.prefill_s(device.picture_tokens)
        prompt_s += costs.gateway.picture_ms / 1e3
    if objective.ttft_ms and prompt_s * 1e3 > objective.ttft_ms:
        raise ValueError(
            f"--ttft-ms is {objective.ttft_ms:g} and a request alone takes {prompt_s * 1e3:.1f} ms to its first token: no "
            "cluster of these devices meets it"
        )


def _begin(load: Load, costs: Costs, shape: Shape, queue: int) -> Cluster:
    one = Cluster(
        gateways=1,
        workers=0 if shape.prefills else 1,
        encoders=int(shape.encoders),
        prefills=int(shape.prefills),
        decodes=int(shape.prefills),
        queue=queue,
    )
    counts: dict[str, int] = {}
    for stage in stages(load, one, costs):
        if not stage.capacity:
            raise ValueError(f"{stage.name}: {stage.unit}; the profile's kv_gb or the lengths must change")
        needed = math.ceil(load.rate / (stage.capacity * TARGET_USE))
        name = "gateways" if stage.name == "image processes" else stage.name
        counts[name] = max(counts.get(name, 1), needed)
        if counts[name] > MOST_MEMBERS:
            raise ValueError(
                f"{counts[name]} {name} would be needed; at most {MOST_MEMBERS} can be simulated"
            )
    return replace(one, **counts)


def _members(cluster: Cluster, stage: str) -> int:
    name = "gateways" if stage == "image processes" else stage
    return int(getattr(cluster, name))


def _more(cluster: Cluster, stage: str) -> Cluster:
    name = "gateways" if stage == "image processes" else stage
    count = int(getattr(cluster, name))
    return replace(cluster, **{name: count + max(1, count // 12)})
