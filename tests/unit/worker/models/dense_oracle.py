"""Owns tiny random checkpoints of every family written by transformers, and its answers to compare with."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.unit.worker.models.paged_driver import Driver, Row, quiet, relative_error
from worker.formats.open_source import open_source
from worker.models.contract import Model
from worker.models.registry import load_model

CPU = torch.device("cpu")
TOLERANCE = 1e-4
SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / heads: 6 heads are wider than the residual stream
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# By the names that cards have: what transformers calls the family, and what its models need beside `SIZES`.
# Heads are wider than the residual stream where the family allows it.
_NARROW: dict[str, Any] = {"hidden_size": 96, "head_dim": None}
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", _NARROW),
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "ministral": ("Ministral", {"sliding_window": 12}),
    "smollm3": ("SmolLM3", _NARROW | {"no_rope_layers": [1, 0, 1]}),
    "phi3": ("Phi3", _NARROW),
    "gemma2": ("Gemma2", {"sliding_window": 12}),
    "gemma3": ("Gemma3", {"sliding_window": 12}),
    "olmo2": ("Olmo2", _NARROW),
    "granite": ("Granite", _NARROW),
    "stablelm": ("StableLm", _NARROW),
    "lfm2": (
        "Lfm2",
        _NARROW
        | {
            "num_hidden_layers": 5,
            "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"],
            "block_multiple_of": 16,
        },
    ),
}


def write(folder: Path, family: str, *, shard_size: str = "5GB", **settings: Any) -> Any:
    """Save a random fp32 checkpoint into `folder`; returns transformers' own model of it."""
    kind, needed = _KINDS[family]
    config_kind = getattr(transformers, f"{kind}TextConfig" if family == "gemma3" else f"{kind}Config")
    model_kind = getattr(transformers, f"{kind}ForCausalLM")
    torch.manual_seed(5)
    given = {**SIZES, "initializer_range": 0.25, **needed, **settings}
    given = {name: value for name, value in given.items() if value is not None or name == "sliding_window"}
    # Wide enough that the most likely token stands out; transformers draws no norms and biases, so that is done here.
    oracle = model_kind(config_kind(**given)).eval()
    low = -0.5 if family.startswith("gemma") else 0.5  # Gemma's norms multiply by 1 + weight
    with torch.no_grad():
        for name, weight in oracle.named_parameters():
            if "norm" in name and name.endswith("weight"):
                weight.uniform_(low, low + 1.0)
            elif name.endswith("bias"):
                weight.normal_(std=0.2)
            elif family.startswith("gemma") and "embed" in name:
                weight *= 0.02  # scaled and tied, larger ones would say the last token again and again
    oracle.save_pretrained(folder, max_shard_size=shard_size)
    oracle.generation_config.eos_token_id = None  # `min_new_tokens` would ban it
    return oracle


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change entries of the folder's config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


def respell(folder: Path) -> Path:
    """Write config.json as the hub's older folders have it: `rope_theta`, `rope_scaling`, `torch_dtype`."""
    config = json.loads((folder / "config.json").read_text())
    changes: dict[str, Any] = {"rope_parameters": None, "dtype": None, "torch_dtype": config.get("dtype")}
    turns = config["rope_parameters"]
    if "full_attention" in turns:
        changes["rope_local_base_freq"] = turns["sliding_attention"]["rope_theta"]
        turns = turns["full_attention"]
    turns = dict(turns)
    changes["rope_theta"] = turns.pop("rope_theta")
    changes["partial_rotary_factor"] = turns.pop("partial_rotary_factor", None)
    kind = turns.pop("rope_type")
    turns.pop("max_position_embeddings", None)
    changes["rope_scaling"] = None if kind == "default" else {"type": kind, **turns}
    return edit_config(folder, **changes)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    return load_model(open_source(folder), CPU, dtype, quiet)


def draw(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(4, SIZES["vocab_size"]) for _ in range(length)]


def oracle_logits(oracle: Any, ids: list[int]) -> Tensor:
    """(S, V) fp32 of one sequence run whole."""
    logits: Tensor = oracle(torch.tensor([ids])).logits[0].float()
    return logits


def oracle_greedy(oracle: Any, prompt: list[int], num: int) -> list[int]:
    out = oracle.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=num, min_new_tokens=num, pad_token_id=0
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def check_prefill(model: Model, oracle: Any, length: int = 75) -> None:
    """A whole prompt, and the same in uneven chunks over its cached pages."""
    ids = draw(length, 1)
    expected = oracle_logits(oracle, ids)
    embedded = model.embed(torch.tensor(ids))
    _, hidden = Driver(model).prefill(embedded, 0)
    assert relative_error(model.logits(hidden), expected) < TOLERANCE
    driver, row, parts, at = Driver(model), Row(), [], 0
    for size in (1, 15, 16, 5, 30, length):
        piece = embedded[at : at + size]
        at += len(piece)
        parts.append(driver.step([], [(row, piece, 0)]))
    assert relative_error(model.logits(torch.cat(parts)), expected) < TOLERANCE


def check_greedy(model: Model, oracle: Any, num: int = 64) -> None:
    """Greedy decoding through shuffled pages: every step's logits, and every token.

    The oracle reads what was said in one run. Where its choice behind each token is the token that follows, it would
    have said the same by itself.
    """
    prompt = draw(21, 2)
    driver = Driver(model)
    row, hidden = driver.prefill(model.embed(torch.tensor(prompt)), 0)
    logits = [model.logits(hidden[-1:])]
    for _ in range(num - 1):
        token = logits[-1].argmax(-1)
        nothing = torch.zeros(1, 2), torch.zeros(1, dtype=torch.bool)
        logits.append(model.logits(driver.step([(row, model.embed_next(token, *nothing))])))
    found = torch.cat(logits)
    said = found.argmax(-1).tolist()
    assert len(set(said)) > 5, "the random model repeats itself, or this test shows little"
    whole = oracle_logits(oracle, prompt + said)[len(prompt) - 1 : -1]
    assert relative_error(found, whole) < TOLERANCE
    assert whole.argmax(-1).tolist() == said


def check_batch(model: Model, oracle: Any) -> None:
    """Rows of different lengths, padding rows, and a prompt chunk in the same steps."""
    prompts = [draw(length, 10 + length) for length in (3, 16, 33, 47)]
    driver = Driver(model)
    rows = [driver.prefill(model.embed(torch.tensor(prompt)), 0)[0] for prompt in prompts]
    texts = [list(prompt) for prompt in prompts]
    late, late_row, found = draw(24, 99), Row(), []
    for step in range(8):
        tokens = draw(len(rows), 200 + step)
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        embedded = model.embed(torch.tensor(tokens))
        decode = [(row, embedded[i : i + 1]) for i, row in enumerate(rows)]
        piece = model.embed(torch.tensor(late[3 * step : 3 * step + 3]))
        found.append(model.logits(driver.step(decode, [(late_row, piece, 0)], padding=step % 3)))
    for i, text in enumerate(texts):
        whole = oracle_logits(oracle, text)[len(prompts[i]) :]
        for step, logits in enumerate(found):
            assert relative_error(logits[i], whole[step]) < TOLERANCE, (step, i)
    whole = oracle_logits(oracle, late)
    for step, logits in enumerate(found):
        assert relative_error(logits[len(rows) :], whole[3 * step : 3 * step + 3]) < TOLERANCE, step
