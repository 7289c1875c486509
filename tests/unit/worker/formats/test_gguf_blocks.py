"""Unpacked blocks equal the reference's (the `gguf` package) to the last bit, for each type."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from worker.formats.gguf_blocks import unpacker
from worker.formats.gguf_container import BLOCK_TYPES

OWN = [
    "F16",
    "BF16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
]
PACKAGE = ["IQ2_XXS", "IQ3_S", "TQ1_0", "TQ2_0", "MXFP4"]
# Where a block holds 16-bit floats: any other byte may be anything.
HALVES = {
    "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "F16": [0],
    "IQ2_XXS": [0], "IQ3_S": [0], "TQ1_0": [52], "TQ2_0": [64], "BF16": [0], "MXFP4": [],
}  # fmt: skip


def random_blocks(name: str, num_blocks: int) -> np.ndarray:
    random = np.random.default_rng(5)
    num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]][1]
    blocks = random.integers(0, 256, (num_blocks, num_bytes), dtype=np.uint8)
    for start in HALVES[name]:
        scales = (random.standard_normal(num_blocks) / 50).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks


@pytest.mark.parametrize("name", OWN + PACKAGE)
def test_unpacked_values_are_the_reference(name: str) -> None:
    blocks = random_blocks(name, 300)
    unpack = unpacker(name)
    assert unpack is not None
    found = unpack(torch.from_numpy(blocks))
    want = dequantize(blocks, GGMLQuantizationType[name])
    assert found.dtype == torch.float32 and tuple(found.shape) == want.shape
    assert np.array_equal(found.numpy(), want)


def test_the_table_of_types_is_the_reference() -> None:
    for number, block in BLOCK_TYPES.items():
        kind = GGMLQuantizationType(number)
        assert (kind.name, *GGML_QUANT_SIZES[kind]) == (block.name, block.num_values, block.num_bytes)


def test_types_nobody_knows() -> None:
    assert unpacker("Q9_X") is None and unpacker("I32") is None
