"""What every engine loads: the tokenizer, the random weights, and their GGUF."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from loadtest.peers.checkpoint import random_text, tokenizer_json, vocabulary, write_checkpoint
from loadtest.peers.gguf_writer import gguf_name, interleave_rotary, read_bf16


@pytest.mark.parametrize("size", [96, 300, 8192])
def test_every_token_is_itself_and_visible(size: int) -> None:
    tokens, merges = vocabulary(size)
    assert len(tokens) == len(set(tokens)) == size and len(merges) == size - 96
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(size)))
    assert tokenizer.get_vocab_size() == size
    for token_id in {0, 5, 93, 94, 95, size // 2, size - 1}:
        text = tokenizer.decode([token_id])
        assert len(text) >= 1 and tokenizer.encode(text).ids == [token_id]


@pytest.mark.slow
def test_the_largest_vocabulary_is_reached() -> None:
    tokens, _ = vocabulary(151_936)
    assert len(set(tokens)) == 151_936


def test_a_vocabulary_without_room_for_characters_is_refused() -> None:
    with pytest.raises(ValueError, match="96 characters"):
        vocabulary(95)


def test_a_random_text_has_exactly_as_many_tokens_as_asked() -> None:
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(300)))
    for num_tokens in (1, 16, 32, 100):
        text = random_text(random.Random(num_tokens), num_tokens)
        assert len(tokenizer.encode(text).ids) == num_tokens
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.slow
def test_a_checkpoint_has_no_end_token_and_its_weights_are_read_as_bf16(tmp_path: Path) -> None:
    num_parameters = write_checkpoint(tmp_path, "tiny")
    config = json.loads((tmp_path / "config.json").read_bytes())
    assert config["eos_token_id"] is None and config["dtype"] == "bfloat16"
    tensors = dict(read_bf16(tmp_path / "model.safetensors"))
    assert sum(bits.size for bits in tensors.values()) == num_parameters
    assert {gguf_name(name) for name in tensors} >= {"token_embd.weight", "blk.1.ffn_down.weight"}
    norm = tensors["model.norm.weight"].astype(np.uint32) << 16
    assert (norm.view(np.float32) == 1.0).all()


def test_names_that_a_llama_does_not_have_are_refused() -> None:
    assert gguf_name("model.layers.11.self_attn.q_proj.weight") == "blk.11.attn_q.weight"
    with pytest.raises(KeyError):
        gguf_name("model.layers.0.self_attn.q_norm.weight")


def test_rotary_halves_become_pairs_in_each_head() -> None:
    weight = np.arange(2 * 6).reshape(12, 1)  # two heads of six rows
    assert interleave_rotary(weight, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_another_dtype_is_not_converted(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(ValueError, match="only BF16"):
        dict(read_bf16(tmp_path / "model.safetensors"))
