"""Owns the prefill figures of a GPU: a prompt's host and device time by its length, eager against captured. Main thread.

`python -m loadtest.gpu.prefill --shapes moondream2,qwen3-0.6b --out FOLDER`; docs/gpu.md says how the figures are
taken. `--smoke` proves on a CPU that the script runs; its figures mean nothing.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from loadtest.gpu.decode import PREFILL_TOKENS
from loadtest.gpu.devices import open_device
from loadtest.gpu.random_models import random_model
from shared.protocol import Sampling
from worker.device.contract import Device
from worker.models.contract import Model
from worker.schedule.plan import Chunk, StepPlan
from worker.schedule.sequence import Sequence
from worker.step.chunk_graphs import bucket_of
from worker.step.staging import StepShape
from worker.step.torch_runner import TorchRunner

PAGE_TOKENS = 16
MAX_ROWS = 8


@dataclass(frozen=True, slots=True)
class Line:
    """One length. Microseconds of the host and milliseconds of the device a step; None: there is no graph."""

    shape: str
    tokens: int
    chunks: int
    bucket: int  # 0: none
    eager_host_us: float
    eager_device_ms: float
    graph_host_us: float | None
    graph_device_ms: float | None


def plan_of(tokens: int, chunks: int, vocab: int) -> StepPlan:
    """A step of `chunks` prompts that together have so many tokens, all of which end."""
    made: list[Chunk] = []
    page = 1
    for number in range(chunks):
        size = tokens * (number + 1) // chunks - tokens * number // chunks
        prompt = [8 + (7 * i + number) % (vocab - 8) for i in range(size)]
        seq = Sequence(b"bench", number, str(number), prompt, size, 2, Sampling(), frozenset(), 0.0)
        seq.row = number
        seq.pages = list(range(page, page - (-size // PAGE_TOKENS)))
        page += len(seq.pages)
        made.append(Chunk(seq, 0, size, is_last=True))
    seqs = [chunk.seq for chunk in made]
    return StepPlan(1, [], [], made, seqs, [0] * chunks, [], seqs, [])


def time_step(runner: TorchRunner, plan: StepPlan, repeats: int) -> tuple[float, float]:
    """Median host µs and device ms of the step."""
    host: list[float] = []
    busy: list[float] = []
    for _ in range(repeats + 1):
        runner.device.synchronize()
        started_s = time.perf_counter()
        runner.launch_forward(0, plan, lambda: None)
        runner.launch_sampling(0, plan, list(range(len(plan.samples))), masked=False)
        runner.launch_copy(0, plan)
        host.append((time.perf_counter() - started_s) * 1e6)
        runner.wait(0, plan)
        busy.append(runner.device_times(0).busy_s * 1e3)
    return statistics.median(host[1:]), statistics.median(busy[1:])


def make_runner(model: Model, device: Device, token_buckets: list[int] | None) -> TorchRunner:
    """A runner with these chunk graphs captured, and no others."""
    runner = TorchRunner(
        model,
        device,
        StepShape(
            max_rows=MAX_ROWS,
            max_sequence_tokens=min(2048, model.card.context_tokens),
            step_tokens=PREFILL_TOKENS,
            page_tokens=PAGE_TOKENS,
            num_pages=PREFILL_TOKENS // PAGE_TOKENS + MAX_ROWS,
            vocab_size=model.card.vocab_size,
            num_slots=1,
            step_crops=1,
        ),
        token_buckets=token_buckets,
        automata=False,
    )
    for key in runner.chunk_graph_keys():
        runner.capture_chunk_graph(*key)
    device.synchronize()
    return runner


def run_shape(
    shape: str, device: Device, lengths: list[int], repeats: int, token_buckets: list[int] | None
) -> list[Line]:
    """All lines of one shape; the model and its memory are gone afterwards."""
    on_gpu = device.torch_device.type == "cuda"
    model = random_model(shape, device.torch_device, torch.bfloat16 if on_gpu else torch.float32).model
    model.fuses = model.fuses or not on_gpu
    started_s = time.perf_counter()
    runner = make_runner(model, device, token_buckets)
    graphs = runner.chunk_graphs
    assert graphs is not None
    captured = runner.graph_counts.captures_total.get("startup", 0)
    print(f"{shape}: {captured} graphs captured in {time.perf_counter() - started_s:.1f} s", flush=True)
    found = []
    for tokens in lengths:
        for chunks in (1, 4):
            plan = plan_of(tokens, chunks, model.card.vocab_size)
            bucket = bucket_of(tokens, graphs.buckets)
            best: dict[bool, tuple[float, float]] = {}
            for _ in range(2):
                for is_captured in [False, True] if bucket else [False]:
                    runner.chunk_graphs = graphs if is_captured else None
                    timed = time_step(runner, plan, repeats)
                    best[is_captured] = min(best.get(is_captured, timed), timed)
            line = Line(shape, tokens, chunks, bucket, *best[False], *best.get(True, (None, None)))
            print(to_line(line), flush=True)
            found.append(line)
    assert not runner.graph_counts.eager_steps_total, "a graph that was asked for was missing"
    del runner, graphs, model
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return found


HEADING = "shape          tokens chunks bucket  host µs: eager   graph  device ms: eager   graph"


def to_line(line: Line) -> str:
    """One line of the table under `HEADING`."""
    host = "-" if line.graph_host_us is None else f"{line.graph_host_us:.0f}"
    busy = "-" if line.graph_device_ms is None else f"{line.graph_device_ms:.3f}"
    return (
        f"{line.shape:14} {line.tokens:6} {line.chunks:6} {line.bucket:6} {line.eager_host_us:15.0f} {host:>7} "
        f"{line.eager_device_ms:17.3f} {busy:>7}"
    )


def main(
    shapes: Annotated[str, typer.Option(help="Shapes, comma separated.")] = "moondream2,qwen3-0.6b",
    tokens: Annotated[str, typer.Option(help="Lengths of prompts, comma separated.")] = "16,64,256,740",
    repeats: Annotated[int, typer.Option(help="Runs of each.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("gpu-results"),
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Tiny shapes on the CPU, interpreted kernels.")
    ] = False,
) -> None:
    """Measure, print the table, write `prefill.json`."""
    out.mkdir(parents=True, exist_ok=True)
    device = open_device(smoke=smoke)
    token_buckets: list[int] | None = None
    if smoke:
        shapes, tokens, repeats = "tiny-moondream", "7,20", 1
        token_buckets = [8, 16]
    lines: list[Line] = []
    with torch.inference_mode(), device.compute.use():
        for shape in shapes.split(","):
            lengths = [int(n) for n in tokens.split(",")]
            lines += run_shape(shape, device, lengths, repeats, token_buckets)
            # Written after every shape, so that a run that is cut off keeps its results.
            record = {
                "device": "cpu (smoke)" if smoke else torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "figures": [asdict(line) for line in lines],
            }
            (out / "prefill.json").write_text(json.dumps(record, indent=1))
    print(f"\n{HEADING}")
    print("\n".join(to_line(line) for line in lines))


if __name__ == "__main__":
    typer.run(main)
