"""Owns the kernels' figures on a GPU: each beside its torch reference and its floor, at the sizes models use. Main thread.

`python -m loadtest.gpu.kernels --out FOLDER`; docs/gpu.md says how the figures are taken. `--smoke` proves on a CPU
that the script runs.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from loadtest.gpu.devices import measure_bandwidth
from loadtest.gpu.kernel_cases import Bench, Case


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of the table. `error` is ‖kernel − reference‖ / ‖reference‖, or for ids the share that differs."""

    name: str
    kernel_us: float
    again_us: float  # the same measured again: a difference smaller than between these two is noise
    reference_us: float
    floor_us: float
    error: float


def measure_products(device: torch.device, size: int) -> float:
    """Operations a second of a large bf16 product of random values."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in "ab")
    rates: list[float] = []
    for _ in range(8):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.mm(a, b)
        stop.record()
        stop.synchronize()
        rates.append(2.0 * size**3 / (start.elapsed_time(stop) / 1e3))
    return statistics.median(rates[3:])


def measure(bench: Bench, case: Case, bytes_per_s: float, flops_per_s: float) -> Measured:
    """Check one case once, then time it twice and its reference once."""
    found, expected = case.kernel[0]().clone(), case.reference[0]().clone()
    if case.exact:
        error = float((found != expected).double().mean())
    else:
        finite = expected.isfinite()  # masked logits are -inf on both sides
        difference = (found.double() - expected.double())[finite]
        error = float(difference.norm() / expected.double()[finite].norm())
    floor_s = max(case.num_bytes / bytes_per_s, case.flops / flops_per_s)
    kernel_s = bench.time_s(case.kernel)
    reference_s = bench.time_s(case.reference)
    again_s = bench.time_s(case.kernel)
    return Measured(case.name, kernel_s * 1e6, again_s * 1e6, reference_s * 1e6, floor_s * 1e6, error)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("gpu-results"),
    only: Annotated[
        str, typer.Option(help="Cases whose name contains one of these, separated by commas.")
    ] = "",
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Tiny sizes on the CPU, interpreted kernels.")
    ] = False,
) -> None:
    """Measure every case, print the table, write `kernels.json`."""
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if smoke else "cuda")
    bytes_per_s = measure_bandwidth(device, 64 << 20 if smoke else 4 << 30)
    flops_per_s = 1e12 if smoke else measure_products(device, 8192)
    bench = Bench(device, smoke=smoke)
    lines: list[Measured] = []
    failures: list[str] = []
    with torch.inference_mode():
        for make in bench.cases():
            case = make()
            if not any(part in case.name for part in only.split(",")):
                continue
            try:
                lines.append(measure(bench, case, bytes_per_s, flops_per_s))
            except Exception as error:  # if one kernel does not compile, the others are still measured
                failures.append(f"{case.name}: {type(error).__name__}: {str(error)[:300]}")
            record = {
                "copy_bytes_per_s": bytes_per_s,
                "product_flops_per_s": flops_per_s,
                "cases": [asdict(line) for line in lines],
                "failures": failures,
            }
            (out / "kernels.json").write_text(json.dumps(record, indent=1))
    print(f"copy {bytes_per_s / 1e12:.2f} TB/s, product {flops_per_s / 1e12:.0f} TFLOP/s")
    print(f"{'kernel':58} {'µs':>9} {'again':>9} {'torch µs':>9} {'floor µs':>9} {'error':>9}")
    for m in lines:
        print(
            f"{m.name:58} {m.kernel_us:9.2f} {m.again_us:9.2f} {m.reference_us:9.2f} {m.floor_us:9.2f} {m.error:9.1e}"
        )
    for failure in failures:
        print(f"FAILED {failure}")
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
