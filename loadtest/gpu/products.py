"""Owns the figures of a model's products on a GPU at few rows: cuBLAS with and without bias, our own kernel. Main thread.

They are most of a decode step. `python -m loadtest.gpu.products --out FOLDER`; the floor is a weight's bytes over the copy
bandwidth of the same run. `--smoke` proves on a CPU that the script runs.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

from loadtest.gpu.devices import measure_bandwidth
from loadtest.gpu.kernel_cases import Bench, Work
from worker.kernels.few_rows_product import LAYOUTS, few_rows_product

ROWS = (1, 2, 4, 8, 16, 32)
SHAPES = {
    "moondream2 qkv": (2048, 6144),
    "moondream2 fc1": (2048, 8192),
    "moondream2 qkv+fc1": (2048, 14336),
    "moondream2 out": (10240, 2048),
    "moondream2 head": (2048, 51200),
    "qwen3-0.6b qkv": (1024, 4096),
    "qwen3-0.6b out": (2048, 1024),
    "qwen3-0.6b gate+up": (1024, 6144),
    "qwen3-0.6b down": (3072, 1024),
    "qwen3-0.6b head": (1024, 151936),
}
"""Inputs and outputs of each product."""
LAID_OUT = {
    ("moondream2 qkv+fc1", 1),
    ("moondream2 qkv+fc1", 32),
    ("moondream2 out", 1),
    ("moondream2 out", 32),
}
"""Where our own kernel is measured in every layout: each costs a second of compiling."""


@dataclass(frozen=True, slots=True)
class Line:
    """One product at one row count, in µs; heads give fp32 sums and have no bias here."""

    name: str
    rows: int
    plain_us: float
    biased_us: float
    own_us: dict[str, float]  # by `worker.kernels.few_rows_product`, by layout, with the bias
    floor_us: float


def measure(bench: Bench, name: str, inputs: int, outputs: int, rows: int, bytes_per_s: float) -> Line:
    """Both ways over enough weights that none is read from a cache."""
    x = bench.randn(rows, inputs)
    bias = bench.randn(outputs)
    is_head = name.endswith("head") and bench.device.type == "cuda"
    num_bytes = inputs * outputs * bench.dtype.itemsize
    plain: list[Work] = []
    biased: list[Work] = []
    own: dict[str, list[Work]] = {
        layout: [] for layout in LAYOUTS if layout == "served" or (name, rows) in LAID_OUT or bench.smoke
    }
    sums = torch.float32 if is_head else None
    arrivals = torch.zeros(-(-outputs // 16), dtype=torch.int32, device=bench.device)
    for _ in range(bench.sets(num_bytes)):
        weight = bench.randn(outputs, inputs)
        if is_head:
            plain.append(lambda w=weight: torch.mm(x, w.t(), out_dtype=torch.float32))  # type: ignore[misc]
        else:
            plain.append(lambda w=weight: F.linear(x, w))  # type: ignore[misc]
            biased.append(lambda w=weight: F.linear(x, w, bias))  # type: ignore[misc]
        for layout, works in own.items():
            works.append(
                lambda w=weight, y=LAYOUTS[layout]: few_rows_product(  # type: ignore[misc]
                    x, w, arrivals, bias, out_dtype=sums, layout=y
                )
            )
    plain_s = bench.time_s(plain)
    biased_s = bench.time_s(biased) if biased else 0.0
    own_us = {layout: bench.time_s(works) * 1e6 for layout, works in own.items()}
    return Line(name, rows, plain_s * 1e6, biased_s * 1e6, own_us, num_bytes / bytes_per_s * 1e6)


HEADING = f"{'product':22} rows   plain µs  ×floor  biased µs  ×floor    own µs  ×floor  floor µs"


def to_line(line: Line) -> str:
    """One line of the table under `HEADING`."""
    biased = f"{line.biased_us:10.2f} {line.biased_us / line.floor_us:7.2f}" if line.biased_us else " " * 18
    served = line.own_us["served"]
    others = ", ".join(f"{layout} {us:.2f}" for layout, us in line.own_us.items() if layout != "served")
    return (
        f"{line.name:22} {line.rows:4} {line.plain_us:10.2f} {line.plain_us / line.floor_us:7.2f} {biased} "
        f"{served:9.2f} {served / line.floor_us:7.2f} {line.floor_us:9.2f}  {others}"
    ).rstrip()


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("gpu-results"),
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny sizes on the CPU.")] = False,
) -> None:
    """Measure, print the table, write `products.json`."""
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if smoke else "cuda")
    bench = Bench(device, smoke=smoke)
    shapes, rows = (SHAPES, ROWS) if not smoke else ({"tiny": (64, 96)}, (1, 2))
    lines: list[Line] = []
    with torch.inference_mode():
        bytes_per_s = measure_bandwidth(device, 64 << 20 if smoke else 4 << 30)
        for name, (inputs, outputs) in shapes.items():
            lines += [measure(bench, name, inputs, outputs, count, bytes_per_s) for count in rows]
            record = {"copy_bytes_per_s": bytes_per_s, "figures": [asdict(line) for line in lines]}
            (out / "products.json").write_text(json.dumps(record, indent=1))
    print(HEADING)
    print("\n".join(to_line(line) for line in lines))


if __name__ == "__main__":
    typer.run(main)
