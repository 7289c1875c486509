"""Owns compiling every kernel for an H200 (sm_90) on a machine without a GPU. Run as a script, without the interpreter.

Triton brings its own assembler, so what it would refuse on the GPU it refuses here. Prints one line a kernel.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from worker.kernels import (
    activation,
    mask,
    norm,
    paged_decode_attention,
    prefill_attention,
    quantised_linear,
    rotary_kv_write,
    sample,
)

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {
    "tables_ptr": "*i32",
    "lengths_ptr": "*i32",
    "spans_ptr": "*i32",
    "part_ptr": "*fp32",
    "stats_ptr": "*fp32",
    "rotation_ptr": "*fp32",
    "write_index_ptr": "*i64",
    "logits_ptr": "*fp32",
    "words_ptr": "*i32",
    "allowed_ptr": "*i32",
    "temperature_ptr": "*fp32",
    "top_k_ptr": "*i32",
    "top_p_ptr": "*fp32",
    "min_p_ptr": "*fp32",
    "uniform_ptr": "*fp32",
    "ids_ptr": "*i64",
    "bad_ptr": "*i32",
    "scales_ptr": "*fp32",
}


def compile_for(kernel: Any, warps: int, constants: dict[str, Any], **pointers: str) -> None:
    """Compile one kernel; every pointer not named is bf16, scale and eps are fp32, the rest int32."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = pointers.get(name) or POINTERS.get(name, "*bf16")
        else:
            signature[name] = "fp32" if name in ("scale", "cap", "eps") else "i32"
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if signature[n].startswith("*")
    }
    source = ASTSource(kernel, signature, places, aligned)
    built = triton.compile(source, target=TARGET, options={"num_warps": warps, "num_stages": 3})
    assert built.metadata.shared <= 227 << 10, f"{kernel.__name__} wants {built.metadata.shared} bytes shared"
    print(kernel.__name__, built.metadata.shared)


def main() -> None:
    """Every kernel at the sizes of the models served."""
    for kv_heads, group, block, dim, splits, window, capped in [
        (32, 1, 1, 64, 8, 0, False),
        (8, 2, 16, 128, 8, 0, False),
        (8, 4, 16, 64, 1, 0, False),
        (4, 2, 16, 256, 8, 4096, True),
        (1, 4, 16, 256, 4, 512, False),
    ]:
        shape = {"KV_HEADS": kv_heads, "GROUP": group, "HEAD_DIM": dim, "PAGE_TOKENS": 16, "WIDEN": False}
        shape |= {"WINDOW": window, "CAPPED": capped}
        compile_for(
            paged_decode_attention._attend_split,
            4,
            shape | {"BLOCK_GROUP": block, "NUM_SPLITS": splits, "BLOCK": 64},
        )
        compile_for(prefill_attention._attend_chunk, 4, shape | {"BLOCK_Q": 64, "BLOCK_K": 64})
    compile_for(paged_decode_attention._join_splits, 2, {"NUM_HEADS": 32, "HEAD_DIM": 64, "NUM_SPLITS": 8})
    heads = {"NUM_HEADS": 16, "KV_HEADS": 8, "HEAD_DIM": 128, "ROTARY_DIM": 128, "BLOCK": 8}
    for flag in (True, False):
        compile_for(
            rotary_kv_write._rotate_and_write,
            4,
            heads | {"PAIRS": flag, "QK_NORM": flag},
            weight_ptr="*fp32",
        )
        compile_for(norm._norm_row, 8, {"DIM": 2048, "BLOCK": 2048, "CENTRED": flag, "RESIDUAL": flag})
        compile_for(activation._activate, 4, {"DIM": 8192, "SILU": flag, "GATED": flag, "BLOCK": 1024})
        compile_for(
            sample._sample_row, 16, {"VOCAB": 51200, "MASKED": flag, "SUPPRESSED": flag, "BLOCK": 4096}
        )
    compile_for(mask._mask_row, 4, {"VOCAB": 51200, "BLOCK": 2048})
    product = {"INPUTS": 2048, "OUTPUTS": 8192, "GROUP": 128, "HAS_BIAS": True, "ROWS": 16, "WIDEN": False}
    compile_for(activation._activate, 4, {"DIM": 6912, "SILU": False, "GATED": True, "BLOCK": 1024})
    for bits, kind in ((8, "*i8"), (4, "*u8")):
        compile_for(
            quantised_linear._product,
            4,
            product | {"BITS": bits, "BLOCK_OUT": 32, "BLOCK_IN": 128},
            weight_ptr=kind,
        )


if __name__ == "__main__":
    main()
