"""The simulated worker beside the real engine, scheduler and pipeline under the same Poisson load, on a virtual clock."""

from __future__ import annotations

import pytest

from loadtest.capacity.cluster import Cluster, Load
from loadtest.capacity.costs import Costs, DeviceCosts, GatewayCosts, LinkCosts
from loadtest.capacity.simulation import simulate
from tests.unit.loadtest.capacity.real_loop import RealLoop
from worker.sim.profiles import Profile

STEP_MS = {1: 2.5, 8: 3.2, 32: 4.0}
FREE = GatewayCosts(request_us=0.0, token_us=0.0, refusal_us=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "rate", "prompt", "prefill_us"),
    [(8, 30.0, 16, 4.0), (8, 80.0, 16, 4.0), (32, 100.0, 200, 20.0)],
    ids=["nearly idle", "two thirds", "long prompts"],
)
def test_a_worker_is_as_quick_as_the_real_loop(
    rows: int, rate: float, prompt: int, prefill_us: float
) -> None:
    profile = Profile("given", {n: ms / 1e3 for n, ms in STEP_MS.items()}, 1e-9, 0.0, prefill_us * 1e-6, 0.0)
    real = RealLoop(profile, rows=rows, rate=rate, prompt=prompt, output=20, num=500)
    real.run()
    device = DeviceCosts(STEP_MS, prefill_us, 1.0, 1e3, max_rows=rows)
    seen = simulate(
        Load(rate, prompt, 20),
        Cluster(workers=1),
        Costs("given", device, FREE, LinkCosts()),
        num_requests=8000,
    )
    assert seen.answered_per_s == pytest.approx(real.per_s(), rel=0.1)
    assert seen.gap_ms["mean"] == pytest.approx(real.gap_ms(), rel=0.15)
    assert seen.total_ms["mean"] == pytest.approx(real.total_ms(), rel=0.2)
    # To the first token it is a step or two; a wait for a row is as random as the load.
    assert seen.ttft_ms["mean"] == pytest.approx(real.ttft_ms(), rel=0.6)


@pytest.mark.slow
def test_a_flooded_worker_serves_what_the_real_loop_does() -> None:
    profile = Profile("given", {n: ms / 1e3 for n, ms in STEP_MS.items()}, 1e-9, 0.0, 4e-6, 0.0)
    real = RealLoop(profile, rows=8, rate=400.0, prompt=16, output=20, num=500)
    real.run()
    served_per_s = len(real.seen) / max(
        one.ended_s for one in real.seen
    )  # to the last of them: rows were never empty
    device = DeviceCosts(STEP_MS, 4.0, 1.0, 1e3, max_rows=8)
    seen = simulate(
        Load(400.0, 16, 20), Cluster(workers=1), Costs("given", device, FREE, LinkCosts()), num_requests=8000
    )
    assert seen.answered_per_s == pytest.approx(served_per_s, rel=0.1)
