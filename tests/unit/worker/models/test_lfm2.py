"""LFM2's states through the whole loop: chunks, batches, cached prefixes, lost pages, captured rows; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.protocol import Sampling, Submit, pack_i32
from tests.unit.worker.loop.simulation import EPOCH
from tests.unit.worker.models.dense_oracle import draw, edit_config, load, oracle_greedy, write
from tests.unit.worker.models.paged_driver import Driver, relative_error
from tests.unit.worker.step.graph_device import GraphDevice
from tests.unit.worker.step.test_torch_runner import Harness
from worker.formats.source import CheckpointError
from worker.models.contract import Model
from worker.step.kv_memory import page_bytes
from worker.step.warm_up import warm_up

NUM = 48
LENGTHS = (3, 21, 48, 70, 33)
Pair = tuple[Model, Any]
Submits = list[tuple[Submit, list[bytes]]]


@pytest.fixture(scope="module", params=[3, 6])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Kernels of 3 positions, as released models have, and of more than divide a page."""
    folder = tmp_path_factory.mktemp("lfm2")
    torch.set_num_threads(1)
    with torch.inference_mode():
        return load_pair(folder, conv_L_cache=request.param)


def load_pair(folder: Path, **settings: Any) -> Pair:
    oracle = write(folder, "lfm2", **settings)
    return load(folder), oracle


def submit(number: int, ids: list[int], max_tokens: int = NUM) -> tuple[Submit, list[bytes]]:
    return Submit(EPOCH, number, str(number), pack_i32(ids), max_tokens, Sampling(), ignore_eos=True), []


def answers(pair: Pair, prompts: list[list[int]], num: int = NUM) -> list[list[int]]:
    with torch.inference_mode():
        expected = [oracle_greedy(pair[1], prompt, num) for prompt in prompts]
    assert min(len(set(tokens)) for tokens in expected) > 4, "the random model repeats itself"
    return expected


@pytest.mark.slow
def test_batches_chunks_and_cached_prefixes(pair: Pair) -> None:
    """Twice over, then with the answers and more behind the prompts, so that pages which decoding filled are taken up."""
    prompts = [draw(length, length) for length in LENGTHS]
    expected = answers(pair, prompts)
    longer = [prompt + tokens + draw(5, 7) for prompt, tokens in zip(prompts, expected, strict=True)]
    then = answers(pair, longer, 16)
    for mixed_tokens, depth in ((1600, 2), (24, 3)):
        harness = Harness(pair[0], depth=depth, mixed_tokens=mixed_tokens)
        for again in range(2):
            streams = harness.answer([submit(10 * again + i, ids) for i, ids in enumerate(prompts)])
            assert [stream.tokens for stream in streams] == expected
            for stream, ids in zip(streams, prompts, strict=True):
                assert stream.finish is not None
                assert not again or stream.finish.cached_tokens == (len(ids) - 1) // 16 * 16
        streams = harness.answer([submit(100 + i, ids, 16) for i, ids in enumerate(longer)])
        assert [stream.tokens for stream in streams] == then
        for stream, ids in zip(streams, longer, strict=True):
            assert stream.finish is not None and stream.finish.cached_tokens >= (len(ids) - 6) // 16 * 16


@pytest.mark.slow
def test_rows_that_lose_their_pages_go_on(pair: Pair) -> None:
    prompts = [draw(length, length) for length in LENGTHS]
    expected = answers(pair, prompts)
    for cache in (False, True):
        harness = Harness(pair[0], depth=2, num_pages=14, cache=cache, mixed_tokens=40)
        streams = harness.answer([submit(i, ids) for i, ids in enumerate(prompts)])
        assert [stream.tokens for stream in streams] == expected
        assert harness.engine.scheduler.num_preemptions > 0


@pytest.mark.slow
def test_rows_come_and_go(pair: Pair) -> None:
    """Short answers end while their row is in flight once more, and their pages go to the next in line."""
    prompts = [draw(14 + number % 5, number) for number in range(16)]
    lengths = [1 + number % 7 for number in range(16)]
    expected = answers(pair, prompts, 7)
    harness = Harness(pair[0], depth=3, max_rows=3, num_pages=12, mixed_tokens=20)
    streams = harness.answer(
        [submit(i, ids, num) for i, (ids, num) in enumerate(zip(prompts, lengths, strict=True))]
    )
    for stream, tokens, num in zip(streams, expected, lengths, strict=True):
        assert stream.tokens == tokens[:num]


@pytest.mark.slow
def test_by_torch_alone_and_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: decode rows replayed from recordings that take lengths and tables as data, chunks by torch."""
    monkeypatch.setattr("worker.native.library.load", lambda: None)
    with torch.inference_mode():
        pair = load_pair(tmp_path)
    harness = Harness(pair[0], depth=2, device=GraphDevice(), automata=False)
    assert warm_up(harness.runner) == 0
    prompts = [draw(length, length) for length in LENGTHS]
    streams = harness.answer([submit(i, ids, 16) for i, ids in enumerate(prompts)])
    assert [stream.tokens for stream in streams] == answers(pair, prompts, 16)


def test_what_pages_hold(tmp_path: Path) -> None:
    with torch.inference_mode():
        model, _ = load_pair(tmp_path)
    assert model.states is not None
    assert (model.num_layers, model.states.num_layers, model.states.num_inputs) == (2, 3, 2)
    assert page_bytes(model, 16) == 4 * (2 * 2 * 16 * 2 * 16 + 3 * 2 * 96)
    assert not model.fuses


@pytest.mark.slow
def test_as_released_folders_spell_it(tmp_path: Path) -> None:
    """Numbers of attending layers, the MLP's width before it is adjusted, and what is tied under another name."""
    with torch.inference_mode():
        model, _ = load_pair(tmp_path)
        ids = torch.tensor(draw(40, 3))
        expected = model.logits(Driver(model).prefill(model.embed(ids), 0)[1])
        edit_config(
            tmp_path,
            layer_types=None,
            full_attn_idxs=[2, 4],
            block_ff_dim=96,
            intermediate_size=7,
            tie_embedding=True,
            tie_word_embeddings=None,
            rope_parameters=None,
            rope_theta=1000000.0,
            conv_dim=96,
        )
        again = load(tmp_path)
        assert torch.equal(again.logits(Driver(again).prefill(again.embed(ids), 0)[1]), expected)


@pytest.mark.slow
def test_in_bf16_states_are_as_wide_as_activations(tmp_path: Path) -> None:
    with torch.inference_mode():
        model, _ = load_pair(tmp_path)
        ids = torch.tensor(draw(40, 3))
        expected = model.logits(Driver(model).prefill(model.embed(ids), 0)[1])
        narrow = load(tmp_path, torch.bfloat16)
        driver = Driver(narrow, kv_dtype=narrow.kv_dtype)
        assert driver.cache.states[0].dtype == torch.bfloat16
        found = narrow.logits(driver.prefill(narrow.embed(ids), 0)[1])
    assert relative_error(found, expected) < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["conv"] * 5}, "no layer attends"),
        ({"layer_types": ["conv", "mamba", "conv", "conv", "conv"]}, "'layer_types' has 'mamba'"),
        ({"layer_types": None, "full_attn_idxs": "2"}, "'full_attn_idxs' is '2'"),
        ({"conv_L_cache": 1}, "'conv_L_cache' is 1; convolutions of 2 to 16 positions"),
        ({"block_auto_adjust_ff_dim": 3}, "'block_auto_adjust_ff_dim'"),
    ],
    ids=str,
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, "lfm2")
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)
