"""A Llama and a Qwen3 through the real engine and runner: the same greedy tokens as transformers, at any depth."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.protocol import Sampling, Submit, pack_i32
from tests.unit.worker.loop.simulation import EPOCH, Stream
from tests.unit.worker.step.test_torch_runner import Harness
from worker.formats.open_source import open_source
from worker.models.contract import Model
from worker.models.registry import load_model

SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(3)
    folder: Path = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        oracle: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        oracle = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    oracle.eval().save_pretrained(folder)
    oracle.generation_config.eos_token_id = None  # `min_new_tokens` would ban it
    with torch.inference_mode():
        return load_model(open_source(folder), torch.device("cpu"), torch.float32, lambda *_: None), oracle


def submits(num: int, max_tokens: int, *, temperature: float = 0.0) -> list[tuple[Submit, list[bytes]]]:
    rng = random.Random(num)
    found: list[tuple[Submit, list[bytes]]] = []
    for number in range(num):
        prompt = [1, *(rng.randrange(4, 160) for _ in range(rng.randint(1, 70)))]
        sampling = Sampling(temperature=temperature, top_p=0.95, seed=rng.randrange(1 << 60))
        submit = Submit(EPOCH, number, str(number), pack_i32(prompt), max_tokens, sampling, ignore_eos=True)
        found.append((submit, []))
    return found


@pytest.mark.slow
def test_greedy_tokens_equal_transformers(pair: tuple[Model, Any]) -> None:
    model, oracle = pair
    streams: list[Stream] = Harness(model, depth=2).answer(submits(6, 40))
    for stream in streams:
        prompt = torch.frombuffer(bytearray(stream.submit.prompt), dtype=torch.int32).long()[None]
        whole = oracle.generate(prompt, do_sample=False, min_new_tokens=40, max_new_tokens=40, pad_token_id=0)
        assert stream.tokens == whole[0, prompt.shape[1] :].tolist()


@pytest.mark.slow
def test_depth_and_batch_change_no_sampled_token(pair: tuple[Model, Any]) -> None:
    model, _ = pair
    wanted = submits(5, 24, temperature=0.9)
    alone = [Harness(model, depth=1, max_rows=1, late=False).answer([one])[0] for one in wanted]
    for depth, max_rows in ((1, 5), (2, 3), (3, 5)):
        together = Harness(model, depth=depth, max_rows=max_rows).answer(wanted)
        assert [stream.tokens for stream in together] == [stream.tokens for stream in alone]
