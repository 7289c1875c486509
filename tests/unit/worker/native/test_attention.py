"""Compiled attention of rows and chunks against a plain loop in fp64, on every instruction set that this machine runs."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from tests.unit.worker.models.paged_driver import relative_error
from tests.unit.worker.native.attention_case import Case, Heads, Sequence, random_heads, random_sequences
from tests.unit.worker.native.kinds import library_of, other_kinds
from worker.models.crop_attention import crop_attention
from worker.native.library import load, use_threads
from worker.native.operations import Operations, operations

CPU = torch.device("cpu")
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]
# Of the largest expected magnitude. fp32: sums of some thousand products, of scores that are e^x's exponents up to 20 or so,
# so that an error of 2^-24 in each adds up to a few times 1e-6. bf16 activations: the result is rounded (2^-9), and where there
# are matrix registers also queries (2^-9 of scores up to 20: a weight is off by up to 4 in 100 where one key weighs most, and
# the mean of values by what is left between the keys) and weights (2^-9).
BOUND = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
SEEDS = 40


@pytest.fixture(
    scope="module",
    params=["own", *(pytest.param(kind, marks=pytest.mark.slow) for kind in other_kinds())],
)
def library(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    found = load() if request.param == "own" else library_of(request.param)
    if found is None:
        pytest.skip("no C++ compiler")
    yield found
    found.use_threads(1)


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES, ids=str)
@pytest.mark.timeout(600)
def test_any_step_against_a_plain_loop(
    library: ctypes.CDLL, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    native = Operations(library)
    for seed in range(SEEDS):
        rng = random.Random(seed)
        heads, sequences = random_heads(rng), random_sequences(rng)
        case = Case(heads, sequences, dtype, kv_dtype, seed)
        got = case.attend(native)
        assert got.isfinite().all(), (heads, sequences)
        assert relative_error(got, case.expected()) < BOUND[dtype], (heads, sequences)
        library.use_threads(2 + seed % 2)
        assert torch.equal(case.attend(native), got), ("by threads", heads, sequences)
        library.use_threads(1)
        for number, one in enumerate(sequences):  # alone, and in the company of the others
            alone = Case(heads, [one], dtype, kv_dtype)
            alone.pages, alone.keys, alone.values = [case.pages[number]], case.keys, case.values
            start = sum(other.count for other in sequences[:number])
            alone.qkv = case.qkv[start : start + one.count]
            assert torch.equal(alone.attend(native), got[start : start + one.count]), (heads, one)


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES, ids=str)
@pytest.mark.timeout(600)
def test_chunks_of_any_length_give_the_same_bits(
    library: ctypes.CDLL, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    native = Operations(library)
    for seed in range(12):
        rng = random.Random(seed)
        heads, count = random_heads(rng), rng.choice((40, 300, 1500))
        prefix = rng.choice((0, 0, rng.randint(1, count)))
        whole = Case(heads, [Sequence(0, count, prefix)], dtype, kv_dtype, seed)
        want = whole.attend(native)
        done = 0
        while done < count:
            most = min(count - done, rng.choice((1, 3, 16, 17, 64, 257, 1024)))
            size = max(most, prefix - done)  # a prefix is not cut
            part = Case(heads, [Sequence(done, size, prefix)], dtype, kv_dtype, seed)
            part.pages, part.keys, part.values = whole.pages, whole.keys, whole.values
            part.qkv = whole.qkv[done : done + size]
            assert torch.equal(part.attend(native), want[done : done + size]), (heads, done, size)
            done += size


@pytest.mark.parametrize("is_chunk", [True, False])
def test_a_faulty_token_reaches_no_page(library: ctypes.CDLL, is_chunk: bool) -> None:
    native = Operations(library)
    sequences = [Sequence(40, 1, is_chunk=False), Sequence(40, 20 if is_chunk else 1, is_chunk=is_chunk)]
    case = Case(Heads(4, 2, 64, 16), sequences, torch.float32, torch.float32)
    case.qkv[1, ::7] = torch.inf
    case.qkv[1, 3] = torch.nan
    assert case.attend(native).isfinite().all()
    assert case.keys.isfinite().all() and case.values.isfinite().all()
    assert relative_error(case.attend(native)[:1], case.expected()[:1]) < BOUND[torch.float32]


def test_scores_of_any_size(library: ctypes.CDLL) -> None:
    """Weights are taken relative to the largest: scores in the thousands overflow nothing, on either side."""
    native = Operations(library)
    for scale in (0.0, 1e-20, 30.0, -30.0):
        sequences = [Sequence(1200, 1, is_chunk=False), Sequence(1100, 130)]
        case = Case(Heads(3, 1, 64, 16), sequences, torch.float32, torch.float32)
        case.qkv[:, : 3 * 64] *= scale
        # An error of 2^-24 in a score of 1,000 is one of 1e-4 in its weight.
        assert relative_error(case.attend(native), case.expected()) < 1e-3


@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(150, 3, 80), (1100, 1, 64)])
def test_a_picture_in_bf16_is_as_near_as_torch(tokens: int, heads: int, head_dim: int) -> None:
    """One crop whose patches all see each other, of which there are more than a part takes: off from fp64 by no more than torch's."""
    attention = crop_attention(CPU, heads, head_dim, torch.bfloat16)
    if attention is None:
        pytest.skip("no C++ compiler")
    torch.manual_seed(3)
    qkv = torch.randn(tokens, 3 * heads * head_dim).bfloat16()
    q, k, v = qkv.view(tokens, 3, heads, head_dim).permute(1, 2, 0, 3)
    torchs, want = (
        F.scaled_dot_product_attention(*(part[None].to(dtype) for part in (q, k, v)))[0]
        .transpose(0, 1)
        .flatten(1)
        for dtype in (torch.bfloat16, torch.float64)
    )
    error, torchs_error = (float((got - want).norm()) for got in (attention.attend(qkv, 1), torchs))
    assert error < 1.2 * torchs_error


def test_threads_are_set_for_all_operations() -> None:
    if operations(CPU) is None:
        pytest.skip("no C++ compiler")
    case = Case(Heads(9, 3, 64, 16), [Sequence(3000, 4)], torch.float32, torch.float32)
    native = operations(CPU)
    assert native is not None
    alone = case.attend(native)
    try:
        use_threads(3)
        assert torch.equal(case.attend(native), alone)
    finally:
        use_threads(1)
