"""Owns what each GPU switch gains: a decode step's replays as it is served, and with each switch turned, in turns. Main thread.

`python -m loadtest.gpu.switches --shapes moondream2,qwen3-0.6b --rows 1,8,32 --out FOLDER`; docs/gpu.md ("Switches") says
what each should gain. `--smoke` proves on a CPU that the script runs; its figures mean nothing.
"""

from __future__ import annotations

import gc
import json
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from loadtest.gpu.decode import PAGE_TOKENS
from loadtest.gpu.devices import measure_bandwidth, open_device
from loadtest.gpu.random_models import RandomModel, random_model
from worker.device.choices import flipped, is_on, names
from worker.device.contract import Device, Graph
from worker.step.decode_graphs import Flavour, least_bucket
from worker.step.staging import StepShape, stage_padding
from worker.step.torch_runner import TorchRunner

SERVED = "as served"
TOGETHER = "+all"  # every switch on that is off by default
MOONDREAM_ALONE = {"one_product", "one_launch", "pair_rows"}
OUTSIDE_GRAPHS = {
    "upload_aside",
    "early_copy",
    "vision_stream",
    "vision_gelu",
}  # `run.sh serve` and `vision` compare these
AT_LOAD = {"narrow_weights"}  # `run.sh decode quantised` compares it
ROUNDS = 3


def turned_by(label: str) -> list[str]:
    """The switches that a line of the table turns."""
    if label == TOGETHER:
        return [name for name in names() if not is_on(name)]
    return [] if label == SERVED else [label]


def label_of(turned: str) -> str:
    """As the table names a line: with a plus where a switch was turned on."""
    return turned if turned in (SERVED, TOGETHER) or is_on(turned) else f"+{turned}"


@dataclass(frozen=True, slots=True)
class Line:
    """One shape, row count and switch. Milliseconds of a replay, medians over rounds."""

    shape: str
    rows: int
    turned: str  # the switch that was off or, with a plus, on
    greedy_ms: float
    drawn_ms: float
    floor_ms: float
    launches: int  # kernels and copies of the recorded step; 0 where they are not counted
    differs: int  # rows whose greedy token is another than as served


def make_runner(made: RandomModel, device: Device, rows: int, context: int) -> TorchRunner:
    """A runner with memory for these rows and no graphs."""
    pages = -(-(context + 1) // PAGE_TOKENS)
    shape = StepShape(
        max_rows=max(2, rows),
        max_sequence_tokens=min(2048, made.model.card.context_tokens),
        step_tokens=64,
        page_tokens=PAGE_TOKENS,
        num_pages=rows * pages + 1,
        vocab_size=made.model.card.vocab_size,
        num_slots=1,
        step_crops=1,
    )
    runner = TorchRunner(made.model, device, shape, buckets=[max(2, rows)], token_buckets=[], automata=False)
    if device.torch_device.type == "cpu":
        runner.sampler.use_kernels()
    for memory in (*runner.cache.keys, *runner.cache.values):
        memory.normal_()
    return runner


def stage(runner: TorchRunner, rows: int, context: int, *, drawn: bool) -> None:
    """Rows of so much context each, on pages of their own in shuffled order, and padding behind them."""
    host = runner.slots[0].host
    pages = -(-(context + 1) // PAGE_TOKENS)
    stage_padding(host, 0, host.shape.max_rows)
    order = torch.randperm(rows * pages, generator=torch.Generator().manual_seed(1)).numpy() + 1
    for row in range(rows):
        own = order[row * pages : (row + 1) * pages]
        host.tables[row, :pages] = own
        for name in ("rows", "graph_rows", "sample_rows"):
            host.ints[name][row] = row
        host.ints["positions"][row], host.ints["lengths"][row] = context, context + 1
        host.ints["write_index"][row] = own[context // PAGE_TOKENS] * PAGE_TOKENS + context % PAGE_TOKENS
    host.floats["temperature"][:rows] = 0.7 if drawn else 0.0
    host.floats["top_p"][:rows], host.floats["min_p"][:rows], host.ints["top_k"][:rows] = 0.9, 0.0, 0
    host.floats["uniform"][:rows] = [(row + 0.5) / rows for row in range(rows)]
    runner.slots[0].upload()


def replay_ms(device: Device, graph: Graph, replays: int) -> float:
    """Milliseconds of one replay of many queued back to back."""
    if replays > 1:
        graph.replay()  # the device is at work while the first of those measured is queued
    begun = device.compute.record()
    for _ in range(replays):
        graph.replay()
    ended = device.compute.record()
    ended.synchronize()
    return begun.elapsed_s(ended) / replays * 1e3


def run_shape(
    shape: str, device: Device, row_counts: list[int], context: int, bytes_per_s: float, replays: int
) -> list[Line]:
    """Every switch at every row count; the model and its memory are gone afterwards."""
    on_gpu = device.torch_device.type == "cuda"
    made = random_model(shape, device.torch_device, torch.bfloat16 if on_gpu else torch.float32)
    model = made.model
    model.fuses = model.fuses or not on_gpu
    tried = [name for name in names() if name not in OUTSIDE_GRAPHS | AT_LOAD]
    if "moondream" not in shape:
        tried = [name for name in tried if name not in MOONDREAM_ALONE]
    if not on_gpu:
        tried = [
            "own_products"
        ]  # the tests of the switches cover all; interpreted kernels take seconds a step
    lines: list[Line] = []
    for rows in row_counts:
        runner = make_runner(made, device, rows, context)
        slot = runner.slots[0]
        stage(runner, rows, context, drawn=False)
        graphs: dict[str, Graph] = {}
        tokens: dict[str, list[int]] = {}
        for off in [SERVED, *tried, *([TOGETHER] if on_gpu else [])]:
            if off == "pair_rows" and rows > 1:
                continue
            with flipped(*turned_by(off)):
                padded = max(rows, least_bucket(model))
                graphs[off] = device.capture(partial(runner.forward.decode, slot, padded, Flavour.TEXT))
            runner.rows.last_ids.fill_(8)
            graphs[off].replay()
            tokens[off] = slot.outputs[:rows, 0].tolist()
        times: dict[tuple[str, bool], list[float]] = {}
        for drawn in (False, True):
            stage(runner, rows, context, drawn=drawn)
            for _ in range(
                ROUNDS if on_gpu else 1
            ):  # in turns, so that a card that changes its clock changes it for all
                for off, graph in graphs.items():
                    times.setdefault((off, drawn), []).append(replay_ms(device, graph, replays))
        kv_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * model.kv_dtype.itemsize
        floor_ms = (made.decode_bytes + kv_bytes * rows * (context + 1)) / bytes_per_s * 1e3
        for off, graph in graphs.items():
            greedy, drawn_ms = (statistics.median(times[off, drawn]) for drawn in (False, True))
            differs = sum(a != b for a, b in zip(tokens[off], tokens[SERVED], strict=True))
            count = int(getattr(graph, "num_operations", 0))
            lines.append(Line(shape, rows, label_of(off), greedy, drawn_ms, floor_ms, count, differs))
            print(to_line(lines[-1], lines), flush=True)
        del runner, slot, graphs
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    return lines


HEADING = (
    "shape          rows turned            greedy ms  ×floor  gained µs  drawn ms  gained µs  other tokens"
)


def to_line(line: Line, lines: list[Line]) -> str:
    """One line of the table under `HEADING`; gained: by turning the switch, so a minus
    says that it stands as it should."""
    on = next(
        other for other in lines if (other.shape, other.rows, other.turned) == (line.shape, line.rows, SERVED)
    )
    return (
        f"{line.shape:14} {line.rows:4} {line.turned:17} {line.greedy_ms:9.4f} {line.greedy_ms / line.floor_ms:7.2f} "
        f"{(on.greedy_ms - line.greedy_ms) * 1e3:10.1f} {line.drawn_ms:9.4f} "
        f"{(on.drawn_ms - line.drawn_ms) * 1e3:10.1f} {line.differs:13}"
    )


def main(
    shapes: Annotated[str, typer.Option(help="Shapes, comma separated.")] = "moondream2,qwen3-0.6b",
    rows: Annotated[str, typer.Option(help="Batch sizes, comma separated.")] = "1,8,32",
    context: Annotated[int, typer.Option(help="Tokens of context a row.")] = 850,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("gpu-results"),
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A tiny shape on the CPU, interpreted kernels.")
    ] = False,
) -> None:
    """Measure, print the table, write `switches.json`."""
    out.mkdir(parents=True, exist_ok=True)
    device = open_device(smoke=smoke)
    replays = 100
    if smoke:
        shapes, rows, context, replays = "tiny-moondream", "1", 20, 1
    lines: list[Line] = []
    with torch.inference_mode(), device.compute.use():
        bytes_per_s = measure_bandwidth(device.torch_device, 64 << 20 if smoke else 4 << 30)
        for shape in shapes.split(","):
            lines += run_shape(
                shape, device, [int(n) for n in rows.split(",")], context, bytes_per_s, replays
            )
            record = {"copy_bytes_per_s": bytes_per_s, "figures": [asdict(line) for line in lines]}
            (out / "switches.json").write_text(json.dumps(record, indent=1))
    print(f"\n{HEADING}")
    print("\n".join(to_line(line, lines) for line in lines))


if __name__ == "__main__":
    typer.run(main)
