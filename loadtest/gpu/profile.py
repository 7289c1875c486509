"""Owns profiles of pipelined decode steps on a GPU: which kernels their time goes to. Main thread.

`python -m loadtest.gpu.profile moondream2:1 moondream2:32 --out FOLDER` prints a table by kernel for each SHAPE:ROWS and
writes a trace for chrome://tracing or Perfetto. `--smoke` proves on a CPU that the script runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from loadtest.gpu.decode import make_runner, run_rows
from loadtest.gpu.devices import open_device
from loadtest.gpu.random_models import random_model
from worker.device.contract import Device


def profile(shape: str, device: Device, rows: int, context: int, steps: int, folder: Path) -> None:
    """Kernel times of pipelined decode steps, without the prefill before them: a table to the screen, a trace to
    `folder`."""
    dtype = torch.bfloat16 if device.torch_device.type == "cuda" else torch.float32
    made = random_model(shape, device.torch_device, dtype)
    runner, _ = make_runner(made, device, [rows], 2, context + 100)
    named: dict[str, Any] = {
        "context": context,
        "steps": min(30, steps),
        "bytes_per_s": 1.0,
        "sampled": False,
        "shape": shape,
        "path": "fused",
    }
    run_rows(runner, made, rows, 2, **named)
    on_gpu = device.torch_device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    profiled = torch.profiler.profile(activities=kinds)
    try:
        run_rows(runner, made, rows, 2, on_steady=profiled.start, **named)
    finally:
        device.synchronize()
        profiled.stop()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))
    profiled.export_chrome_trace(str(folder / f"trace-{shape}-{rows}.json.gz"))


def main(
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="SHAPE:ROWS", help="By default moondream2:1.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of context a row.")] = 850,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("gpu-results"),
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny shape on the CPU.")] = False,
) -> None:
    """Profile every pair asked for."""
    out.mkdir(parents=True, exist_ok=True)
    device = open_device(smoke=smoke)
    steps = 30
    if smoke:
        pairs, context, steps = ["tiny-moondream:2"], 20, 3
    with torch.inference_mode():
        for what in pairs or ["moondream2:1"]:
            shape, rows = what.split(":")
            profile(shape, device, int(rows), context, steps, out)


if __name__ == "__main__":
    typer.run(main)
