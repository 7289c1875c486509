"""Owns the checkpoint that every engine loads: random Llama weights and a tokenizer all of them can read. Main thread.

The tokenizer is a byte-level BPE over printable ASCII. Lower-case letters take part in no merge, so a text of n of
them is n tokens for every server; all other tokens are runs of capitals, so every token is visible text at once.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch

from loadtest.gpu.random_models import SHAPES as RANDOM_SHAPES
from loadtest.gpu.random_models import random_model
from loadtest.peers.catalog import CONTEXT_TOKENS, MODEL_ID, SHAPES

CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def vocabulary(size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """`size` tokens in the order of their ids, and the merges that make the longer ones.

    Raises ValueError when `size` is below the 96 single characters.
    """
    tokens = [chr(code) for code in range(33, 127)] + [
        "Ġ",
        "Ċ",
    ]  # space and line feed, as byte-level BPE has them
    if size < len(tokens):
        raise ValueError(f"a vocabulary of {size} tokens has no room for {len(tokens)} characters")
    merges = list(islice(_merges(), size - len(tokens)))
    return tokens + [left + right for left, right in merges], merges


def _merges() -> Iterator[tuple[str, str]]:
    """Pairs of capitals, then a pair and a capital, then three and one, …"""
    for length in range(1, 5):
        for letters in product(string.ascii_uppercase, repeat=length):
            for last in string.ascii_uppercase:
                yield "".join(letters), last


def tokenizer_json(size: int) -> dict[str, Any]:
    """The tokenizer.json of `vocabulary(size)`."""
    tokens, merges = vocabulary(size)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [list(merge) for merge in merges],
        },
    }


def write_checkpoint(folder: Path, shape: str, dtype: torch.dtype = torch.bfloat16) -> int:
    """Write the random checkpoint `SHAPES[shape]` in the layout of Hugging Face; returns its number of parameters."""
    with torch.inference_mode():
        made = random_model(
            SHAPES[shape], torch.device("cpu"), dtype, context_tokens=CONTEXT_TOKENS, folder=folder
        )
    raw = json.loads((folder / "config.json").read_bytes())
    raw |= {
        "bos_token_id": None,
        "eos_token_id": None,  # explicit, because transformers would otherwise take 2 for the end, and the others would not
        "dtype": str(dtype).removeprefix("torch."),
        "degas": raw["degas"] | {"model_id": MODEL_ID},
    }
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(raw["vocab_size"])))
    fast = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(fast))
    return made.model.weight_bytes // dtype.itemsize


def vocab_size(shape: str) -> int:
    """The number of token ids of a shape."""
    return int(RANDOM_SHAPES[SHAPES[shape]]["vocab_size"])


def random_prompts(rng: random.Random, rows: int, num_tokens: int, vocab_size: int) -> list[list[int]]:
    """`rows` prompts of `num_tokens` random token ids each."""
    return [[rng.randrange(vocab_size) for _ in range(num_tokens)] for _ in range(rows)]


def random_text(rng: random.Random, num_tokens: int) -> str:
    """A text of exactly `num_tokens` tokens, hardly ever the same twice."""
    return "".join(rng.choices(string.ascii_lowercase, k=num_tokens))
