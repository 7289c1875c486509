"""Owns the figures of a model's products on a GPU: cuBLAS at their true shapes and few rows, with and without bias. Main thread.

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

from loadtest.gpu.decode import measure_bandwidth
from loadtest.gpu.kernels import Bench, Work

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


@dataclass(frozen=True, slots=True)
class Line:
    """One product at one row count, in µs; heads give fp32 sums and have no bias here."""

    name: str
    rows: int
    plain_us: float
    biased_us: float
    floor_us: float


def measure(bench: Bench, name: str, inputs: int, outputs: int, rows: int, bytes_per_s: float) -> Line:
    """Both ways over enough weights that none is read from a cache."""
    x = bench.randn(rows, inputs)
    bias = bench.randn(outputs)
    is_head = name.endswith("head") and bench.device.type == "cuda"
    num_bytes = inputs * outputs * bench.dtype.itemsize
    plain: list[Work] = []
    biased: list[Work] = []
    for _ in range(bench.sets(num_bytes)):
        weight = bench.randn(outputs, inputs)
        if is_head:
            plain.append(lambda w=weight: torch.mm(x, w.t(), out_dtype=torch.float32))  # type: ignore[misc]
        else:
            plain.append(lambda w=weight: F.linear(x, w))  # type: ignore[misc]
            biased.append(lambda w=weight: F.linear(x, w, bias))  # type: ignore[misc]
    plain_s = bench.time_s(plain)
    biased_s = bench.time_s(biased) if biased else 0.0
    return Line(name, rows, plain_s * 1e6, biased_s * 1e6, num_bytes / bytes_per_s * 1e6)


HEADING = f"{'product':22} rows   plain µs  ×floor  biased µs  ×floor  floor µs"


def to_line(line: Line) -> str:
    """One line of the table under `HEADING`."""
    biased = f"{line.biased_us:10.2f} {line.biased_us / line.floor_us:7.2f}" if line.biased_us else " " * 18
    return (
        f"{line.name:22} {line.rows:4} {line.plain_us:10.2f} {line.plain_us / line.floor_us:7.2f} {biased} "
        f"{line.floor_us:9.2f}"
    )


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
