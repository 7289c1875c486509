"""Owns `degas bench decode` and `degas bench pocket`: the embedded model's speed and its accuracy. Main thread.

Speed stands beside transformers' `generate` on a model of equal shape (Phi has Moondream's text block: parallel
residuals, one LayerNorm, half-rotary attention), turn about in the same process on one compute thread.
"""

from __future__ import annotations

import statistics
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import torch

from loadtest.decode_bench import DegasSide, TransformersSide

WEIGHTS = Path(str(files("worker.pocket") / "weights"))


def write_phi(folder: Path, text: dict[str, Any], dtype: torch.dtype) -> int:
    """A random Phi checkpoint of the text model's shape; returns its number of parameters."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    config = PhiConfig(
        hidden_size=text["dim"],
        intermediate_size=text["ff_dim"],
        num_hidden_layers=text["n_layers"],
        num_attention_heads=text["n_heads"],
        num_key_value_heads=text.get("n_kv_heads", text["n_heads"]),
        vocab_size=text["vocab_size"],
        max_position_embeddings=2048,
        partial_rotary_factor=0.5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = PhiForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())


def measure_decode(rows: int, new_tokens: int, repeats: int, dtype: torch.dtype) -> dict[str, Any]:
    """Decode rates at `rows` rows: medians, and the median of the neighbouring runs' ratios."""
    torch.set_num_threads(1)
    text = msgspec.json.decode((WEIGHTS / "config.json").read_bytes())["config"]["text"]
    generator = torch.Generator().manual_seed(1)

    def draw() -> list[list[int]]:
        ids: list[list[int]] = torch.randint(20, text["vocab_size"], (rows, 48), generator=generator).tolist()
        return ids

    with tempfile.TemporaryDirectory(prefix="degas-bench-") as name:
        num_parameters = write_phi(Path(name), text, dtype)
        theirs = TransformersSide(Path(name), dtype)
    ours = DegasSide(WEIGHTS, dtype, rows, 48 + new_tokens, 48, 2)
    ours.run(draw(), new_tokens)
    theirs.choose_cache(draw(), new_tokens)
    pairs = [(ours.run(draw(), new_tokens), theirs.run(draw(), new_tokens)) for _ in range(repeats)]
    return {
        "rows": rows,
        "dtype": str(dtype).removeprefix("torch."),
        "text_parameters": num_parameters,
        "degas_tokens_per_s": statistics.median(a.tokens_per_s for a, _ in pairs),
        "transformers_tokens_per_s": statistics.median(b.tokens_per_s for _, b in pairs),
        "ratio": statistics.median(a.tokens_per_s / b.tokens_per_s for a, b in pairs),
        "cpu_ratio": statistics.median(a.tokens_per_cpu_s / b.tokens_per_cpu_s for a, b in pairs),
    }
