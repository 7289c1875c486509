"""Sampling and masking kernels against `worker.step.sampler`, and sampled shares against the exact distribution."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from torch import Tensor

from worker.kernels.mask import mask_logits
from worker.kernels.sample import allowed_words
from worker.kernels.sample import sample as sample_by_search
from worker.kernels.sample_histogram import choose_slices, sample_by_histogram
from worker.step.sampler import apply_mask, stochastic

Sampler = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(params=["search", "histogram"])
def sample(request: pytest.FixtureRequest) -> Sampler:
    """Both kernels keep one definition."""
    return sample_by_search if request.param == "search" else sample_by_histogram


def settings(rows: int, **given: float) -> dict[str, Tensor]:
    """One value a row for every sampling setting, the same in all rows."""
    values = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0} | given
    made = {name: torch.full((rows,), values[name]) for name in ("temperature", "top_p", "min_p")}
    made["top_k"] = torch.full((rows,), int(given.get("top_k", 0)), dtype=torch.int32)
    made["uniforms"] = (torch.arange(rows) + 0.5) / rows
    return made


def mixed_settings(rows: int) -> dict[str, Tensor]:
    """Every combination that matters, a row each, with random uniforms."""
    made = settings(rows)
    cases = [
        (0.0, 0, 1.0, 0.0),
        (1.0, 0, 1.0, 0.0),
        (0.5, 0, 0.3, 0.0),  # Moondream's defaults
        (0.7, 20, 0.8, 0.0),
        (2.0, 1, 1.0, 0.0),
        (1.0, 5, 1.0, 0.05),
        (1.5, 0, 0.95, 0.02),
        (0.05, 0, 0.9, 0.0),
        (1.0, 100000, 1.0, 0.9),
        (1.0, 0, 1e-6, 0.0),
    ]
    for row in range(rows):
        temperature, top_k, top_p, min_p = cases[row % len(cases)]
        made["temperature"][row], made["top_k"][row] = temperature, top_k
        made["top_p"][row], made["min_p"][row] = top_p, min_p
    made["uniforms"] = torch.rand(rows)
    return made


@pytest.mark.parametrize(
    ("vocab", "spread", "coarse"),
    [(1, 1.0, False), (33, 0.5, True), (1000, 4.0, False), (1000, 0.5, True), (4200, 4.0, True)],
)
def test_equals_the_sorting_sampler(vocab: int, spread: float, coarse: bool, sample: Sampler) -> None:
    logits = torch.randn(10, vocab) * spread
    if coarse:  # as a bf16 product leaves them: many ties
        logits = logits.bfloat16().float()
    made = mixed_settings(10)
    ids, bad = sample(logits, **made)
    expected = stochastic(
        logits, made["temperature"], made["top_k"], made["top_p"], made["min_p"], made["uniforms"]
    )
    assert not bad.any()
    assert torch.equal(ids, expected)


@pytest.mark.parametrize(
    "given",
    [{}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.7, "min_p": 0.1}],
)
def test_ties_go_by_id_and_shares_are_exact(given: dict[str, float], sample: Sampler) -> None:
    """Uniforms on an even grid: every id is drawn as often as its probability says, within one row."""
    logits = torch.tensor([2.0, 1.0, 2.0, 0.0, 1.0, 1.0, -1.0, 2.0]).repeat(12, 1)
    made = settings(12, **given)
    ids, _ = sample(logits, **made)
    expected = stochastic(
        logits, made["temperature"], made["top_k"], made["top_p"], made["min_p"], made["uniforms"]
    )
    counts, wanted = torch.bincount(ids, minlength=8), torch.bincount(expected, minlength=8)
    assert (counts - wanted).abs().max() <= 1, (counts, wanted)


def test_bf16_logits_and_strided_rows(sample: Sampler) -> None:
    wide = (torch.randn(6, 700) * 3).bfloat16()
    made = mixed_settings(6)
    ids, _ = sample(wide[:, :650], **made)
    expected, _ = sample(wide[:, :650].float().contiguous(), **made)
    assert torch.equal(ids, expected)


def test_greedy_takes_the_lowest_of_equals(sample: Sampler) -> None:
    logits = torch.zeros(3, 9000)
    logits[1, [8000, 17, 4100]] = 1.0
    logits[2, 8999] = 1.0
    ids, _ = sample(logits, **settings(3, temperature=0.0))
    assert ids.tolist() == [0, 17, 8999] == logits.max(dim=-1).indices.tolist()


def test_bad_rows_are_reported_and_leave_others_alone(sample: Sampler) -> None:
    logits = torch.randn(6, 300)
    logits[1, 7] = float("nan")
    logits[2, 9] = float("inf")
    logits[3] = float("-inf")
    logits[4, 11] = float("-inf")  # one banned id is no fault
    made = mixed_settings(6)
    made["temperature"][:] = 1.0
    ids, bad = sample(logits, **made)
    assert bad.tolist() == [0, 1, 1, 1, 0, 0]
    assert ((ids >= 0) & (ids < 300)).all()
    assert bad.bool().tolist() == (~torch.isfinite(logits.max(dim=-1).values)).tolist()


@pytest.mark.parametrize("vocab", [50, 4099])
def test_masks(vocab: int, sample: Sampler) -> None:
    logits = torch.randn(8, vocab) * 3
    words = torch.randint(-(2**31), 2**31 - 1, (8, (vocab + 31) // 32), dtype=torch.int64).to(torch.int32)
    words[0] = 0
    words[0, vocab // 64] = 1  # one id left
    suppressed = [3, 40]
    allowed = allowed_words(suppressed, vocab, torch.device("cpu"))
    made = mixed_settings(8)
    ids, bad = sample(logits, **made, words=words, allowed=allowed)
    masked = apply_mask(logits, words)
    masked[:, suppressed] = float("-inf")
    expected = stochastic(
        masked, made["temperature"], made["top_k"], made["top_p"], made["min_p"], made["uniforms"]
    )
    assert torch.equal(ids, expected) and not bad.any()
    assert int(ids[0]) == vocab // 64 * 32


def test_a_mask_that_allows_nothing_ends(sample: Sampler) -> None:
    words = torch.zeros(2, 4, dtype=torch.int32)
    ids, bad = sample(torch.randn(2, 100), **settings(2), words=words)
    assert ids.tolist() == [0, 0] and not bad.any()


def test_nothing_suppressed_needs_no_words() -> None:
    assert allowed_words([], 100, torch.device("cpu")) is None


@pytest.mark.parametrize("vocab", [32, 45, 4100])
def test_mask_logits(vocab: int) -> None:
    logits = torch.randn(3, vocab)
    words = torch.randint(-(2**31), 2**31 - 1, (3, (vocab + 31) // 32), dtype=torch.int64).to(torch.int32)
    expected = apply_mask(logits, words)
    assert mask_logits(logits, words) is logits
    assert torch.equal(logits, expected)


@pytest.mark.slow
@settings_of_hypothesis(max_examples=4, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1 << 30),
    vocab=st.sampled_from([1, 7, 50, 300]),
    spread=st.sampled_from([0.0, 0.01, 0.5, 3.0, 30.0]),
    coarse=st.booleans(),
)
def test_the_histogram_draws_what_exact_arithmetic_draws(
    seed: int, vocab: int, spread: float, coarse: bool
) -> None:
    """Any filters together, flat and steep rows, ties or none; a draw on the very edge of two tokens may go either way."""
    rows = 8
    generator = torch.Generator().manual_seed(seed)

    def some(share: float, given: Tensor, other: float) -> Tensor:
        return torch.where(torch.rand(rows, generator=generator) < share, given, torch.tensor(other))

    logits = torch.randn(rows, vocab, generator=generator) * spread
    logits = logits.round() if coarse else logits
    temperature = 0.05 + 2 * torch.rand(rows, generator=generator)
    top_k = some(0.6, torch.randint(0, vocab + 3, (rows,), generator=generator).float(), 0.0).int()
    top_p = some(0.7, torch.rand(rows, generator=generator), 1.0)
    min_p = some(0.5, torch.rand(rows, generator=generator), 0.0)
    uniforms = torch.rand(rows, generator=generator)
    ids, bad = sample_by_histogram(logits, temperature, top_k, top_p, min_p, uniforms)
    exact = (t.double() for t in (top_p, min_p, uniforms))
    expected = stochastic(logits.double(), temperature.double(), top_k, *exact)
    assert not bad.any() and int((ids != expected).sum()) <= 1


def test_slices_follow_shapes_alone() -> None:
    assert choose_slices(1, 51200, 132) == 16
    assert choose_slices(128, 51200, 132) == 4
    assert choose_slices(1, 300, 132) == 1, "a short row leaves nothing to share out"
