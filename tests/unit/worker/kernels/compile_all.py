"""Owns compiling every kernel for an H200 (sm_90) on a machine without a GPU. Run as a script, without the interpreter.

Triton brings its own assembler, so what it would refuse on the GPU it refuses here. Prints one line a kernel: its name,
warps, dtype, bytes of shared memory; and of decode attention and products of few rows registers a thread and bytes of
its stack, else zeros.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from worker.kernels import (
    activation,
    experts,
    few_rows_product,
    head_scale,
    mask,
    norm,
    paged_decode_attention,
    prefill_attention,
    quantised_linear,
    rotary_kv_write,
    routing,
    sample,
    sample_histogram,
)

Variant = paged_decode_attention.Variant
VARIANTS = paged_decode_attention.VARIANTS
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
    "rows_ptr": "*i32",
    "last_ids_ptr": "*i64",
    "outputs_ptr": "*i32",
    "bests_ptr": "*fp32",
    "best_ids_ptr": "*i32",
    "raw_bests_ptr": "*fp32",
    "nans_ptr": "*i32",
    "counts_ptr": "*i32",
    "masses_ptr": "*i64",
    "taken_ptr": "*i32",
    "taken_x_ptr": "*fp32",
    "counters_ptr": "*i32",
    "table_ptr": "*i32",
    "shares_ptr": "*fp32",
    "alpha_ptr": "*fp32",
    "log_ptr": "*fp32",
    "arrivals_ptr": "*i32",
}
LISTER = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def registers(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of its stack, where what has no register is spilled) of assembled code; (0, 0) without the
    program that tells."""
    if not LISTER.exists():
        return 0, 0
    with tempfile.TemporaryDirectory() as folder:
        assembled = Path(folder) / "kernel.cubin"
        assembled.write_bytes(cubin)
        command = [str(LISTER), "-res-usage", str(assembled)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert used is not None, told
    return int(used[1]), int(used[2])


def compile_for(
    kernel: Any,
    warps: int,
    constants: dict[str, Any],
    *,
    dtype: str = "bf16",
    stages: int = 3,
    most_registers: int | None = None,
    counts: bool = False,
    dependent: bool = False,
    round_strides: bool = False,
    **pointers: str,
) -> tuple[int, int]:
    """Compile one kernel; every pointer not named is of `dtype`, scale and eps are fp32, the rest int32, strides among them
    multiples of 16 if `round_strides`. `counts`: return what `registers` tells. `dependent`: for a launch before its inputs
    are there."""
    if "DEPENDENT" in kernel.arg_names:
        constants = constants | {"DEPENDENT": dependent}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = pointers.get(name) or POINTERS.get(name, f"*{dtype}")
        else:
            signature[name] = "fp32" if name in ("scale", "cap", "eps") else "i32"
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if signature[n].startswith("*") or (round_strides and n.endswith("_stride"))
    }
    source = ASTSource(kernel, signature, places, aligned)
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": most_registers, "launch_pdl": dependent}
    built = triton.compile(source, target=TARGET, options=options)
    assert built.metadata.launch_pdl is dependent
    check_waits(built.asm["ptx"], kernel.__name__, dependent=dependent)
    if constants.get("JOINS") or constants.get("SPLITS", 1) > 1:
        check_arrival(built.asm["ptx"], kernel.__name__)
    assert built.metadata.shared <= 227 << 10, f"{kernel.__name__} wants {built.metadata.shared} bytes shared"
    used, spilled = registers(built.asm["cubin"]) if counts else (0, 0)
    print(kernel.__name__, warps, dtype, built.metadata.shared, used, spilled)
    return used, spilled


def check_waits(ptx: str, name: str, *, dependent: bool) -> None:
    """A dependent kernel waits once before all it stores, counts and multiplies, and then lets the next one begin; others do
    neither."""
    waits = [found.start() for found in re.finditer(r"griddepcontrol\.wait", ptx)]
    lets = [found.start() for found in re.finditer(r"griddepcontrol\.launch_dependents", ptx)]
    if not dependent:
        assert not waits and not lets, name
        return
    work = re.search(r"st\.global|cp\.async\.c|atom\.global|mma", ptx)
    assert work is not None and len(waits) == len(lets) == 1 and waits[0] < lets[0] < work.start(), name
    before = re.findall(r"ld\.global", ptx[: waits[0]])
    assert not before or name == "_norm_row", f"{name} reads something before what it waits for"


def check_arrival(ptx: str, name: str) -> None:
    """What programs leave for the last of them: written, all threads meet, one counts with acquire and release, all meet, and
    what others wrote is read past the L1."""
    counted = re.search(r"atom\.global\.gpu\.acq_rel\.add", ptx)
    assert counted is not None, name
    before, after = ptx[: counted.start()], ptx[counted.end() :]
    written, read = before.rfind("st.global"), after.find("ld.global.cg")
    assert written >= 0 and "bar.sync" in before[written:], name
    assert read >= 0 and "bar.sync" in after[:read] and not re.search(r"ld\.global\.(?!cg)", after[:read]), (
        name
    )


def product(
    outputs: int,
    inputs: int,
    gate: int = 0,
    turned: int = 0,
    layout: few_rows_product.Layout = few_rows_product.SERVED,
    *,
    biased: bool = False,
    dtype: str = "bf16",
    dependent: bool = False,
    out_ptr: str | None = None,
) -> tuple[int, int]:
    """A product of few rows as its launcher lays it out, `outputs` counted behind a gate; returns what `registers` tells."""
    splits, share = few_rows_product.choose_share(outputs, inputs, 132, layout)
    stages = max(2, layout.stages // 2) if gate else layout.stages
    return compile_for(
        few_rows_product._few_rows,
        layout.num_warps,
        {
            "INPUTS": inputs, "OUTPUTS": outputs, "SPLITS": splits, "SHARE": share, "GATE": gate,
            "GELU_FROM": outputs - turned, "HAS_BIAS": biased, "HAS_RESIDUAL": not biased and not gate, "ROWS": 32,
            "BLOCK_OUT": layout.block_out, "BLOCK_IN": layout.block_in, "STAGES": stages, "WIDEN": dtype == "fp32",
            "AHEAD": few_rows_product.lines_ahead(layout, stages),
        },
        dtype=dtype,
        stages=stages,
        counts=True,
        dependent=dependent,
        round_strides=True,
        out_ptr=out_ptr or f"*{dtype}",
    )  # fmt: skip


def attention(
    kv_heads: int,
    group: int,
    dim: int,
    splits: int,
    variant: Variant | None = None,
    *,
    dtype: str = "bf16",
    window: int = 0,
    capped: bool = False,
    joins: bool = False,
    dependent: bool = False,
) -> tuple[int, int]:
    """Decode attention as its launcher lays it out, in `variant` or as served; returns what `registers` tells."""
    variant = variant or paged_decode_attention.served(group, is_wide=dtype == "fp32")
    single = group == 1 and not variant.dots
    return compile_for(
        paged_decode_attention._attend_split,
        variant.num_warps,
        {
            "KV_HEADS": kv_heads, "GROUP": group, "BLOCK_GROUP": 1 if single else 16, "HEAD_DIM": dim,
            "PAGE_TOKENS": 16, "NUM_SPLITS": splits, "BLOCK": variant.block_tokens, "WIDEN": dtype == "fp32",
            "WINDOW": window, "CAPPED": capped, "HEADS_FIRST": variant.heads_first,
            "STAGES": variant.stages if variant.staged else None, "JOINS": joins,
        },
        dtype=dtype,
        stages=variant.stages,
        most_registers=variant.most_registers,
        counts=True,
        dependent=dependent,
    )  # fmt: skip


def products(dtypes: tuple[str, ...]) -> None:
    """Products of few rows at the models' shapes: moondream2's, then those of Qwen3-0.6B; nothing may be spilled."""
    for outputs, inputs, gate, turned, biased in [
        (14336, 2048, 0, 8192, True),
        (2048, 10240, 0, 0, True),
        (51200, 2048, 0, 0, True),
        (4096, 1024, 0, 0, False),
        (3072, 1024, 1, 0, False),
        (1024, 3072, 0, 0, False),
        (6912, 1152, 2, 0, False),
    ]:
        out_ptr = "*fp32" if outputs == 51200 else None
        _, spilled = product(
            outputs, inputs, gate, turned, biased=biased, dependent=gate == 1, out_ptr=out_ptr
        )
        assert not spilled
    for dtype in dtypes[1:]:
        for layout in few_rows_product.LAYOUTS.values():
            product(14336, 2048, 0, 8192, layout, biased=True, dependent=True)
            product(3072, 1024, 1, 0, layout, dependent=True)
        for outputs, inputs, gate in [(14336, 2048, 0), (2048, 10240, 0), (3072, 1024, 1), (65, 300, 2)]:
            product(outputs, inputs, gate, biased=True, dtype=dtype)


def routed(dtype: str) -> None:
    """The kernels of Moondream 3.1's experts, as their launcher lays them out for few and for many rows."""
    for layout in (experts.FEW, experts.MANY):
        shape = {"INNER": 1024, "ROWS": layout.block_rows, "BLOCK_OUT": layout.block_out}
        shape |= {"BLOCK_IN": layout.block_in, "WIDEN": dtype == "fp32"}
        compile_it = partial(compile_for, dtype=dtype, stages=layout.stages, round_strides=True)
        first = shape | {"CHOSEN": 8, "INPUTS": 2048, "GATE": experts.GATES["gelu_plus_1"]}
        compile_it(experts._first_product, layout.num_warps, first, dependent=True)
        compile_it(experts._second_product, layout.num_warps, shape | {"DIM": 2048}, dependent=True)
    scaled = {"HEADS": 32, "HEAD_DIM": 64, "BLOCK_HEADS": 32, "BLOCK_DIM": 64}
    compile_for(head_scale._scale_heads, 4, scaled, dtype=dtype, dependent=True)
    chosen = {"EXPERTS": 64, "CHOSEN": 8, "BLOCK": 64, "BLOCK_CHOSEN": 8}
    for over_chosen in (True, False):
        by = chosen | {"OVER_CHOSEN": over_chosen}
        compile_for(routing._choose, 1, by, ids_ptr="*i32", dependent=True)
    compile_for(experts._group, 4, {"BLOCK": 256}, ids_ptr="*i64", dependent=True)
    compile_for(experts._sum_choices, 4, {"DIM": 2048, "CHOSEN": 8, "BLOCK": 1024}, dependent=True)


def main() -> None:
    """Every kernel as it serves, at the sizes of the models served; with `--fp32` also what the tests on a GPU run, and the
    variants of attention that the load test measures beside those that serve."""
    dtypes = ("bf16", "fp32") if "--fp32" in sys.argv else ("bf16",)
    if "fp32" in dtypes:
        # How many programs there are is no part of the code.
        for variant in {replace(variant, programs=0) for variant in VARIANTS.values()}:
            attention(32, 1, 64, 8, variant)
    for joins in (False, True):
        _, spilled = attention(32, 1, 64, 8, joins=joins, dependent=True)
        assert not spilled
    for kv_heads, group, dim in [(8, 2, 128), (8, 4, 64)]:
        _, spilled = attention(kv_heads, group, dim, 8, dependent=True)
        assert not spilled
    products(dtypes)
    for dtype in dtypes:
        routed(dtype)
        attention(32, 1, 64, 1, dtype=dtype)
        attention(8, 2, 128, 8, dtype=dtype)
        attention(8, 4, 64, 16, dtype=dtype)
    if "fp32" in dtypes:
        attention(2, 2, 32, 8, dtype="fp32")
    for kv_heads, group, dim, window, capped, dtype in [
        (32, 1, 64, 0, False, "bf16"),
        (8, 2, 128, 0, False, "bf16"),
        (8, 4, 64, 0, False, "bf16"),
        (4, 2, 256, 4096, True, "bf16"),
        (1, 4, 256, 512, False, "bf16"),
        (32, 1, 64, 0, False, "fp32"),
        (8, 2, 128, 0, False, "fp32"),
    ]:
        if dtype not in dtypes:
            continue
        if dim == 256:
            attention(kv_heads, group, dim, 8, window=window, capped=capped)
        shape = {"KV_HEADS": kv_heads, "GROUP": group, "HEAD_DIM": dim, "PAGE_TOKENS": 16}
        shape |= {"WINDOW": window, "CAPPED": capped, "WIDEN": dtype == "fp32"}
        blocks = {"BLOCK_Q": 64, "BLOCK_K": 64}
        compile_for(prefill_attention._attend_chunk, 4, shape | blocks, dtype=dtype, stages=2)
    compile_for(
        paged_decode_attention._join_splits,
        2,
        {"NUM_HEADS": 32, "HEAD_DIM": 64, "NUM_SPLITS": 8},
        dependent=True,
    )
    heads = {"NUM_HEADS": 16, "KV_HEADS": 8, "HEAD_DIM": 128, "ROTARY_DIM": 128, "BLOCK": 8}
    for flag in (True, False):
        compile_for(
            rotary_kv_write._rotate_and_write,
            4,
            heads | {"PAIRS": flag, "QK_NORM": flag},
            weight_ptr="*fp32",
            dependent=flag,
        )
        normed = {"DIM": 2048, "BLOCK": 2048, "CENTRED": flag, "RESIDUAL": flag}
        compile_for(norm._norm_row, 8, normed, dependent=flag)
        activated = {"DIM": 8192, "SILU": flag, "GATED": flag, "BLOCK": 1024}
        compile_for(activation._activate, 4, activated, dependent=flag)
        compile_for(
            sample._sample_row,
            16,
            {"VOCAB": 51200, "MASKED": flag, "SUPPRESSED": flag, "OWN": flag, "BLOCK": 4096},
        )
        row = {"VOCAB": 51200, "SLICES": 8, "MASKED": flag, "SUPPRESSED": flag, "BLOCK": 2048}
        for scan in (sample_histogram._scan_slice, sample_histogram._count_slice):
            compile_for(scan, 8, row | {"SLICE": 8192})
        drawn = row | {"OWN": flag, "TAKE_BLOCK": 2048 if flag else sample_histogram.TAKE_BLOCK}
        _, spilled = compile_for(sample_histogram._draw_row, 16, drawn, counts=True)
        assert spilled < 256
    joined = {"NUM_HEADS": 32, "KV_HEADS": 32, "HEAD_DIM": 64, "ROTARY_DIM": 32, "BLOCK": 8, "PAIRS": True}
    joined |= {"QK_NORM": False, "HEAD_BLOCKS": 12, "DIM": 8192, "DIM_BLOCK": 1024}
    for dtype in dtypes:
        compile_for(
            rotary_kv_write._rotate_write_and_gelu,
            4,
            joined,
            dtype=dtype,
            weight_ptr="*fp32",
            write_index_ptr="*i32" if dtype == "bf16" else "*i64",
            dependent=dtype == "bf16",
        )
        compile_for(
            norm._norm_row, 8, {"DIM": 2048, "BLOCK": 2048, "CENTRED": True, "RESIDUAL": True}, dtype=dtype
        )
    for dtype in dtypes[1:]:
        small = {"DIM": 1024, "SILU": True, "GATED": True, "BLOCK": 1024}
        compile_for(activation._activate, 4, small, dtype=dtype)
    compile_for(mask._mask_row, 4, {"VOCAB": 51200, "BLOCK": 2048})
    compile_for(activation._activate, 4, {"DIM": 6912, "SILU": False, "GATED": True, "BLOCK": 1024})
    made = {"INPUTS": 2048, "OUTPUTS": 8192, "UNITS": 64, "UNIT": 32, "AHEAD": 4, "TILE": 64}
    for bits, kind in ((8, "*i8"), (4, "*u8")):
        compile_it = partial(compile_for, weight_ptr=kind, scales_ptr="*fp16", least_ptr="*fp16")
        for offset in (False, True):
            of = made | {"BITS": bits, "HAS_LEAST": offset}
            shared = {"HAS_BIAS": True, "ROWS": 32, "WIDEN": False, "SPLITS": 4, "SHARE": 16, "STAGES": 3}
            _, spilled = compile_it(
                quantised_linear._few_integers, 4, of | shared, counts=True, dependent=True
            )
            assert not spilled
        compile_it(quantised_linear._expand, 4, made | {"BITS": bits, "HAS_LEAST": True})


if __name__ == "__main__":
    main()
