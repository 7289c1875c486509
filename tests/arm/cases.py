"""Owns calls of every compiled operation, recorded for vectors of so many lanes, and how far two processors' results may differ."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.arm.tape import At, Record, Tape, record
from tests.unit.worker.native.attention_case import Case, Heads, Sequence
from tests.unit.worker.native.integer_case import random_blocks
from worker.forward import StepTokens
from worker.native.library import NAMES
from worker.native.products import _FORMATS, ADD, BF16, GATE, GELU, INT8_REAL, PLAIN, SAME, Linear
from worker.native.quantised import KINDS, Levels, Quantised
from worker.native.stack import GatedLayer, ParallelLayer, _Step
from worker.native.token_rows import token_rows

ROWS = (1, 2, 3, 4, 5, 6, 7, 13, 40)
ACTIVATION_BYTES = 1 << 17  # more than those of any rows here


@dataclass(frozen=True, slots=True)
class Result:
    """What calls leave at a place: `shape` of `dtype`, and by how much of the largest magnitude it may differ; 0: not a bit."""

    label: str
    at: At
    shape: tuple[int, ...]
    dtype: torch.dtype
    bound: float = 0.0

    def of(self, buffers: list[Tensor]) -> Tensor:
        """It, as some calls left it."""
        num_bytes = math.prod(self.shape) * self.dtype.itemsize
        buffer = buffers[self.at.buffer][self.at.offset : self.at.offset + num_bytes]
        return buffer.view(self.dtype).view(self.shape)


class Cases:
    """A tape and its results. `lanes` are the library's; `bytes_packed` (format, outputs, inputs) must be enough for any library."""

    def __init__(self, lanes: int, bytes_packed: Callable[[int, int, int], int]) -> None:
        self.lanes, self.tape, self.results = lanes, Tape(), list[Result]()
        self.bytes_packed = bytes_packed

    def out(self, label: str, shape: tuple[int, ...], dtype: torch.dtype, bound: float = 0.0) -> At:
        """Room for a result, without numbers: each must be written."""
        at = self.tape.put(torch.full(shape, math.nan if dtype.is_floating_point else -1, dtype=dtype))
        self.results.append(Result(label, at, shape, dtype, bound))
        return at

    def gate_order(self, outputs: int) -> Tensor:
        """As `Products.gate_order`, for these lanes."""
        return torch.arange(outputs).view(2, -1, self.lanes).transpose(0, 1).reshape(-1)

    def linear(self, weight: Tensor | Quantised, bias: Tensor | None = None, rounds: bool = False) -> Record:
        """A packed weight; a tensor is for fp32 activations."""
        outputs, inputs = weight.shape
        tape = self.tape
        if isinstance(weight, Tensor):
            kept_in = BF16 if weight.dtype == torch.bfloat16 else SAME
            packed = tape.room(self.bytes_packed(kept_in, outputs, inputs))
            name = "pack_bfloat16_for_float32" if kept_in == BF16 else "pack_float32"
            tape.call(name, outputs, inputs, tape.put(weight), packed)
        else:
            levels: Levels = weight.levels()
            kept_in = _FORMATS.get(weight.kind, INT8_REAL)
            packed = tape.room(self.bytes_packed(kept_in, outputs, inputs))
            least = None if levels.least is None else tape.put(levels.least)
            q, scale = tape.put(levels.q), tape.put(levels.scale)
            tape.call("pack_blocks", kept_in, outputs, inputs, q, scale, least, levels.scale_inputs, packed)
        return record(
            Linear,
            weight=packed,
            bias=None if bias is None else tape.put(bias),
            inputs=inputs,
            outputs=outputs,
            format=kept_in,
            rounds_inputs=int(rounds),
        )


def weights_of(outputs: int, inputs: int) -> dict[str, Tensor | Quantised]:
    """A weight of every format, by its name."""
    real = torch.randn(outputs, inputs)
    found: dict[str, Tensor | Quantised] = {"fp32": real, "bf16": real.bfloat16()}
    found.update({kind: random_blocks(kind, outputs, inputs) for kind in _FORMATS if inputs % 256 == 0})
    found.update({kind: random_blocks(kind, outputs, inputs) for kind in ("Q8_0", "Q4_0", "Q4_1")})
    levels = random_blocks("Q4_1", outputs, inputs).levels()
    return found | {"levels": levels.in_sixteens()}


def products(cases: Cases) -> None:
    """Every format, as it is and with inputs rounded to int8, by any number of rows."""
    for outputs, inputs in ((37, 256), (1, 32), (160, 96), (65, 768)):
        for kind, weight in weights_of(outputs, inputs).items():
            is_real = isinstance(weight, Tensor)
            for dtype in NAMES:
                for rounds in (False,) if is_real else (True,) if dtype == torch.bfloat16 else (False, True):
                    if is_real and dtype == torch.bfloat16:
                        continue
                    linear = cases.tape.put_records(cases.linear(weight, None, rounds))
                    for rows in ROWS:
                        x = torch.randn(rows, inputs) * torch.rand(rows, 1) * 4
                        x[0, : inputs // 2] = 0.0
                        label = f"{kind} {outputs} by {inputs}, {rows} rows, {dtype}, rounded: {rounds}"
                        out = cases.out(label, (rows, outputs), torch.float32)
                        given = cases.tape.put(x.to(dtype))
                        cases.tape.call(
                            f"multiply_{NAMES[dtype]}", linear, rows, given, None, out, outputs, PLAIN, 1
                        )


def extremes(cases: Cases) -> None:
    """The largest whole numbers everywhere, which sums in 16 bits must hold."""
    rows, outputs, inputs = 5, 20, 96
    x = torch.full((rows, inputs), 3.0)
    x[1], x[2, ::2], x[3, 1::3] = -3.0, -3.0, -3.0
    for kind in ("Q8_0", "Q4_0"):
        for level in (0x80, 0x7F, 0xFF, 0):
            weight = random_blocks(kind, outputs, inputs)
            _, num_bytes, _ = KINDS[kind]
            weight.blocks.view(-1, num_bytes)[:, 2:] = level
            linear = cases.tape.put_records(cases.linear(weight, None, True))
            out = cases.out(f"{kind} of {level}", (rows, outputs), torch.float32)
            cases.tape.call("multiply_float32", linear, rows, cases.tape.put(x), None, out, outputs, PLAIN, 1)


def finishes(cases: Cases) -> None:
    """What becomes of sums: bias, GELU, residual, gate."""
    outputs, inputs, rows = 96, 256, 7
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        weight, bias = random_blocks("Q4_1", outputs, inputs), torch.randn(outputs).to(dtype)
        x, residual = torch.randn(rows, inputs).to(dtype), torch.randn(rows, outputs).to(dtype)
        for kind, limit in ((PLAIN, 0.0), (ADD, 0.0), (GELU, bound), (GATE, bound)):
            order = cases.gate_order(outputs) if kind == GATE else torch.arange(outputs)
            linear = cases.tape.put_records(cases.linear(weight.ordered(order), bias[order], True))
            width = outputs // 2 if kind == GATE else outputs
            out = cases.out(f"finish {kind}, {dtype}", (rows, width), dtype, limit)
            more = cases.tape.put(residual) if kind == ADD else None
            given = cases.tape.put(x)
            cases.tape.call(f"multiply_{NAMES[dtype]}", linear, rows, given, more, out, width, kind, 0)


def roundings(cases: Cases) -> None:
    """Activations to int8, with rows of nothing, of huge numbers and of none."""
    rows, inputs = 6, 352
    for dtype in NAMES:
        x = torch.randn(rows, inputs)
        x[1] = 0.0
        x[2] *= 1e30
        x[3, 40], x[4, 100] = math.inf, math.nan
        x[5] = torch.arange(inputs) % 33 / 127 * 8  # ties
        at = cases.tape.room(ACTIVATION_BYTES)
        cases.results.append(Result(f"rounded {dtype}", at, (ACTIVATION_BYTES,), torch.uint8))
        cases.tape.call(
            f"quantise_rows_{NAMES[dtype]}", rows, inputs, cases.tape.put(x.to(dtype)), at, 0, rows
        )


def along_rows(cases: Cases) -> None:
    """Norms, the gate, the largest."""
    rows, dim = 5, 224
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        x, weight, bias = (torch.randn(size).to(dtype) for size in ((rows, dim), (dim,), (dim,)))
        at = [cases.tape.put(part) for part in (x, weight, bias)]
        name = NAMES[dtype]
        out = cases.out(f"rms_norm {dtype}", (rows, dim), dtype, bound)
        cases.tape.call(f"rms_norm_{name}", rows, dim, at[0], at[1], 1e-5, out)
        out = cases.out(f"layer_norm {dtype}", (rows, dim), dtype, bound)
        cases.tape.call(f"layer_norm_{name}", rows, dim, *at, 1e-5, out)
        out = cases.out(f"silu_gate {dtype}", (rows, dim // 2), dtype, bound)
        cases.tape.call(f"silu_gate_{name}", rows, dim // 2, at[0], out)
    x = torch.randn(4, 1003)
    x[1, 7] = x[1, 900] = 9.0
    out, places = cases.out("largest", (4,), torch.float32), cases.out("places", (4,), torch.int64)
    cases.tape.call("largest_float32", 4, 1003, cases.tape.put(x), 1003, out, places)


class Pages:
    """A step's rows and tables in a tape's buffers."""

    def __init__(self, tape: Tape, step: StepTokens) -> None:
        rows = token_rows(step)
        assert rows is not None
        decode = step.decode
        tables = ([] if decode is None else [decode.block_tables]) + [
            one.block_table for one in step.prefills
        ]
        self.num, self.lengths = rows.num, tape.put(rows.lengths)
        self.write_index = tape.put(step.write_index)
        self.runs, self.tables, self.stride = None, None, 0
        if rows.runs is None:
            assert decode is not None
            self.tables, self.stride = tape.put(decode.block_tables), decode.block_tables.stride(0)
            return
        kept = [(table.data_ptr(), table.nbytes, tape.put(table)) for table in tables]
        self.runs = tape.put(rows.runs)
        for number, address in enumerate(rows.runs[:, 1].tolist()):
            start, at = next((start, at) for start, size, at in kept if start <= address < start + size)
            tape.point(At(self.runs.buffer, number * 32 + 8), At(at.buffer, address - start))


LAYERS = (
    Heads(4, 2, 16, 16),
    Heads(3, 1, 64, 16, window=70),
    Heads(9, 3, 64, 5),
    Heads(5, 1, 80, 16, cap=20.0),
    Heads(2, 2, 96, 64),
    Heads(8, 1, 128, 16),
    Heads(1, 1, 32, 100, window=7, cap=0.7),
)
STEPS = (
    [Sequence(context, 1, is_chunk=False) for context in (0, 3, 150, 1100)],
    [Sequence(33, 1, is_chunk=False), Sequence(0, 9), Sequence(40, 13, 6), Sequence(0, 5, 5)],
    [Sequence(1030, 7)],
)


def attention(cases: Cases) -> list[tuple[Case, Result, Result, Result]]:
    """Rows and chunks over pages: each case, and where its result and the keys and values that it wrote are."""
    made: list[tuple[Case, Result, Result, Result]] = []
    for dtype in NAMES:
        for kept in NAMES:
            for number, heads in enumerate(LAYERS):
                case = Case(
                    heads, STEPS[(number + len(made) // len(LAYERS)) % len(STEPS)], dtype, kept, number
                )
                made.append((case, *_attend(cases, case)))
    return made


def _attend(cases: Cases, case: Case) -> tuple[Result, Result, Result]:
    tape, heads, dtype, kept = cases.tape, case.heads, case.qkv.dtype, case.keys.dtype
    pages = Pages(tape, case._tokens())
    label, width = f"attention {heads} {dtype} {kept}", heads.heads * heads.dim
    cases.out(label, (pages.num, width), dtype, 1e-5 if dtype == torch.float32 else 3e-2)
    found = cases.results[-1]
    keys = Result(f"{label}: keys", tape.put(case.keys), tuple(case.keys.shape), kept)
    values = Result(f"{label}: values", tape.put(case.values), tuple(case.keys.shape), kept)
    cases.results += [keys, values]
    rotation = tape.put(torch.view_as_real(torch.ones(pages.num, 1, 8, dtype=torch.complex64)))
    tape.call(
        f"attend_{NAMES[dtype]}_{NAMES[kept]}",
        *(pages.num, tape.put(case.qkv), keys.at, values.at, pages.write_index),
        *(pages.runs, pages.tables, pages.stride, pages.lengths, rotation, 16, None, 0.0),
        *(heads.heads, heads.kv_heads, heads.dim, heads.page_tokens, heads.window, heads.cap),
        *(found.at, width),
    )
    return found, keys, values


def layers(cases: Cases, threads: int) -> None:
    """Two layers in one call, of both kinds, with fp32 weights and with rounded inputs."""
    cases.tape.call("use_threads", threads)
    # Inputs that lie between two whole numbers may be rounded to either: half a step, of 127 for the largest.
    for dtype, rounds, bound in (
        (torch.float32, False, 1e-5),
        (torch.float32, True, 2e-2),
        (torch.bfloat16, True, 3e-2),
    ):
        for is_gated in (True, False):
            _layers(cases, dtype, rounds, is_gated, bound)
    cases.tape.call("use_threads", 1)


def _layers(cases: Cases, dtype: torch.dtype, rounds: bool, is_gated: bool, bound: float) -> None:
    tape, dim, inner = cases.tape, 64, 96
    heads = Heads(4, 2, 16, 16)
    case = Case(heads, STEPS[1], dtype, torch.float32)
    pages = Pages(tape, case._tokens())

    def linear(outputs: int, inputs: int, order: Tensor | None = None) -> Record:
        order = torch.arange(outputs) if order is None else order
        bias = None if is_gated else torch.randn(outputs).to(dtype)[order]
        if rounds:
            return cases.linear(random_blocks("Q4_0", outputs, inputs).ordered(order), bias, True)
        return cases.linear(torch.randn(outputs, inputs)[order] / inputs**0.5, bias)

    def norm() -> At:
        return tape.put((1 + torch.randn(dim) / 10).to(dtype))

    made = []
    for _ in range(2):
        shared: dict[str, At | int] = {
            "keys": tape.put(case.keys),
            "values": tape.put(case.values),
            "window": 0,
        }
        qkv, width = linear((4 + 2 * 2) * 16, dim), heads.heads * heads.dim
        if is_gated:
            qk_weight = tape.put(1 + torch.randn(6 * 16) / 10)
            made.append(
                record(
                    GatedLayer,
                    attention_norm=norm(),
                    qkv=qkv,
                    qk_weight=qk_weight,
                    out=linear(dim, width),
                    mlp_norm=norm(),
                    gate_up=linear(2 * inner, dim, cases.gate_order(2 * inner)),
                    **{"down": linear(dim, inner), **shared},
                )
            )
        else:
            made.append(
                record(
                    ParallelLayer,
                    norm=norm(),
                    norm_bias=norm(),
                    qkv=qkv,
                    fc1=linear(inner, dim),
                    **{"out": linear(dim, width + inner), **shared},
                )
            )
    angle = torch.rand(pages.num, 1, 8) * 6
    step = record(
        _Step,
        rows=pages.num,
        dim=dim,
        write_index=pages.write_index,
        runs=pages.runs,
        tables=pages.tables,
        table_stride=pages.stride,
        lengths=pages.lengths,
        rotary=16,
        eps=1e-5,
        qk_eps=1e-5,
        rotation=tape.put(torch.view_as_real(torch.polar(torch.ones_like(angle), angle))),
        heads=4,
        kv_heads=2,
        head_dim=16,
        page_tokens=16,
        keeps_float=1,
    )
    name = "gated" if is_gated else "parallel"
    shape = (pages.num, dim)
    hidden = tape.put(torch.randn(shape).to(dtype))
    cases.results.append(Result(f"{name} layers {dtype}, rounded: {rounds}", hidden, shape, dtype, bound))
    tape.call(f"{name}_layers_{NAMES[dtype]}", tape.put_records(step), tape.put_records(*made), 2, hidden)
