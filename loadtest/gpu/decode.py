"""Owns the decode figures of a GPU: random models of true shapes through the real engine and runner. Main thread.

`python -m loadtest.gpu.decode --shapes moondream2,qwen3-0.6b --rows 1,8,32,64,128 --out FOLDER`; docs/gpu.md says how
the figures are taken. `--smoke` proves on a CPU that the script runs; its figures mean nothing.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated

import torch
import typer

from loadtest.gpu.devices import measure_bandwidth, open_device
from loadtest.gpu.random_models import RandomModel, random_model
from loadtest.gpu.timed_runner import TimedRunner
from shared.protocol import FromWorker, Sampling, StepOutputs, Submit, pack_i32
from worker.device.contract import Device
from worker.loop.engine import Engine
from worker.loop.inbox import Inbox, Received
from worker.native.library import torch_alone
from worker.schedule.limits import SchedulerLimits
from worker.schedule.pages import PagePool
from worker.schedule.scheduler import Scheduler
from worker.step.decode_graphs import least_bucket
from worker.step.staging import StepShape

GATEWAY, EPOCH, PAGE_TOKENS = b"bench", 1, 16
PREFILL_TOKENS = 4096
WARM_STEPS = 10


class Silence:
    """Stands in for the I/O thread: ignores tokens, and raises an error on a refusal."""

    def send(self, gateway: bytes, message: FromWorker, payloads: list[bytes] | None = None) -> None:
        """For one gateway. Raises RuntimeError on a refusal or a row that ended in an error."""
        if not isinstance(message, StepOutputs):
            raise RuntimeError(f"the engine refused a row: {message}")
        for finish in message.finishes:
            if str(finish.reason) == "error":
                raise RuntimeError(f"a row ended in an error: {finish}")

    def broadcast(self, message: FromWorker) -> None:
        """Heartbeats are of no interest here."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Medians of one run. Times in ms unless the name says otherwise."""

    shape: str
    path: str
    rows: int
    depth: int
    sampled: bool
    context: int
    steps: int
    step_ms: float  # from commit to commit
    p99_ms: float
    busy_ms: float  # forward and sampling on the device
    idle_ms: float  # device idle before a step's forward, by its own events
    replay_ms: float  # one replay of many queued back to back
    bubble_ms: float  # step less replay: what the host and the uploads cost
    idle_share: float
    host_us: float  # the loop's own work a step, waiting excluded
    floor_ms: float
    first_token_ms: float  # of the whole burst: until the last row decodes


def run_rows(
    runner: TimedRunner,
    made: RandomModel,
    rows: int,
    depth: int,
    *,
    context: int,
    steps: int,
    bytes_per_s: float,
    sampled: bool,
    shape: str,
    path: str,
    on_steady: Callable[[], object] | None = None,
) -> Figures:
    """Decode `steps` tokens on each of `rows` rows behind `context` cached ones; the runner's graphs stay.
    `on_steady` is called when the first timed step is about to be launched."""
    model = made.model
    pool = PagePool(runner.cache.keys[0].shape[0], PAGE_TOKENS)
    limits = SchedulerLimits(
        max_rows=rows,
        step_tokens=PREFILL_TOKENS,
        mixed_tokens=PREFILL_TOKENS,
        max_sequence_tokens=model.card.context_tokens,
    )
    inbox: Inbox = SimpleQueue()
    engine = Engine(
        Scheduler(limits, pool),
        runner,
        model.card,
        inbox=inbox,
        outbox=Silence(),
        clock=time.perf_counter,
        epoch=EPOCH,
        depth=depth,
    )
    generator = torch.Generator().manual_seed(rows)
    sampling = Sampling(temperature=0.7, top_p=0.9, seed=1) if sampled else Sampling()
    warm = WARM_STEPS if steps > WARM_STEPS else 1
    # Rows join as their prompts are prefilled, so the first row needs tokens enough to last until the last row joins.
    spare = -(-rows * context // (PREFILL_TOKENS - rows)) + warm + 3
    for sequence_id in range(rows):
        prompt = torch.randint(8, model.card.vocab_size, (context,), generator=generator).tolist()
        submit = Submit(
            EPOCH,
            sequence_id,
            str(sequence_id),
            pack_i32(prompt),
            steps + spare,
            sampling=sampling,
            ignore_eos=True,
        )
        inbox.put(Received(GATEWAY, submit))
    runner.times.clear()
    begun_s = time.perf_counter()
    host_before_s, full_s = 0.0, 0.0
    timed_from = launched = 0
    while engine.tick():
        if not full_s and runner.times and runner.times[-1].is_decode and runner.times[-1].num_rows == rows:
            full_s = time.perf_counter()
            timed_from = len(runner.times) + warm
        if full_s and not host_before_s and len(runner.times) >= timed_from:
            host_before_s, launched = engine.metrics.host_seconds_total, engine.metrics.steps_total
            if on_steady is not None:
                on_steady()
        if host_before_s and len(runner.times) >= timed_from + steps:
            break
    host_s = engine.metrics.host_seconds_total - host_before_s
    replay_s = runner.time_replays(
        rows
    )  # behind whatever is in flight; the tokens left to decode are others then
    num_host = engine.metrics.steps_total - launched
    while engine.tick():  # the rest of the tokens: the runner must end empty
        pass
    times = runner.times[timed_from : timed_from + steps]
    assert all(t.is_decode and t.num_rows == rows for t in times), "steps with other work were timed"
    gaps = [b.committed_s - a.committed_s for a, b in itertools.pairwise(times)]
    kv_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * model.kv_dtype.itemsize
    floor_s = (made.decode_bytes + kv_bytes * rows * (context + steps // 2)) / bytes_per_s
    busy_s, idle_s = sum(t.busy_s for t in times), sum(t.idle_s for t in times)
    step_s = statistics.median(gaps)
    return Figures(
        shape,
        path,
        rows,
        depth,
        sampled,
        context,
        len(times),
        step_s * 1e3,
        sorted(gaps)[int(0.99 * (len(gaps) - 1))] * 1e3,
        statistics.median(t.busy_s for t in times) * 1e3,
        statistics.median(t.idle_s for t in times) * 1e3,
        replay_s * 1e3,
        (step_s - replay_s) * 1e3 if replay_s else 0.0,
        idle_s / (busy_s + idle_s) if busy_s + idle_s else 0.0,
        host_s / max(1, num_host) * 1e6,
        floor_s * 1e3,
        (full_s - begun_s) * 1e3,
    )


def make_runner(
    made: RandomModel, device: Device, row_counts: Iterable[int], depth: int, row_tokens: int
) -> tuple[TimedRunner, float]:
    """A runner with graphs for these batch sizes, and the seconds their capture took."""
    most = max(row_counts)
    longest = made.model.card.context_tokens  # what captured attention spans
    if device.torch_device.type == "cpu":
        longest = min(
            longest, row_tokens + PAGE_TOKENS
        )  # with more the interpreter would take seconds a step
    runner = TimedRunner(
        made.model,
        device,
        StepShape(
            max_rows=max(most, least_bucket(made.model)),
            max_sequence_tokens=longest,
            step_tokens=PREFILL_TOKENS,
            page_tokens=PAGE_TOKENS,
            num_pages=most * (-(-row_tokens // PAGE_TOKENS) + 1) + 1,
            vocab_size=made.model.card.vocab_size,
            num_slots=max(2, depth),
            step_crops=1,  # no pictures here: the vision encoder has a benchmark of its own
        ),
        buckets=sorted({max(count, least_bucket(made.model)) for count in row_counts}),
        token_buckets=[],  # prompts are prefilled thousands of tokens a step
        automata=False,
    )
    started_s = time.perf_counter()
    runner.capture_graphs()
    return runner, time.perf_counter() - started_s


def run_shape(
    shape: str,
    device: Device,
    *,
    row_counts: list[int],
    depths: list[int],
    context: int,
    steps: int,
    bytes_per_s: float,
    plain_too: bool,
    sampled_rows: set[int],
) -> list[Figures]:
    """All figures of one shape; the model and its memory are gone afterwards."""
    found = []
    dtype = torch.bfloat16 if device.torch_device.type == "cuda" else torch.float32
    made = random_model(shape, device.torch_device, dtype)
    most = max(row_counts)
    spare = -(-most * context // (PREFILL_TOKENS - most)) + WARM_STEPS + 3
    for path in ["fused", "plain"] if plain_too else ["fused"]:
        made.model.fuses = path == "fused" and (made.model.fuses or device.torch_device.type == "cpu")
        runner, capture_s = make_runner(made, device, row_counts, max(depths), context + steps + spare)
        print(f"{shape} {path}: graphs captured in {capture_s:.1f} s", flush=True)
        for rows in row_counts:
            for sampled in [False, True] if rows in sampled_rows else [False]:
                for depth in depths:
                    figures = run_rows(
                        runner,
                        made,
                        rows,
                        depth,
                        context=context,
                        steps=steps,
                        bytes_per_s=bytes_per_s,
                        sampled=sampled,
                        shape=shape,
                        path=path,
                    )
                    print(to_line(figures), flush=True)
                    found.append(figures)
        made.model.fuses = True
        del runner
        gc.collect()
        if device.torch_device.type == "cuda":
            torch.cuda.empty_cache()
    return found


HEADING = "shape         path  rows depth pick   step ms  ×floor replay ms bubble ms  p99 ms  idle ms  host µs  floor ms"


def to_line(f: Figures) -> str:
    """One line of the table under `HEADING`."""
    pick = "draw" if f.sampled else "best"
    ratio = f.step_ms / f.floor_ms
    return (
        f"{f.shape:13} {f.path:5} {f.rows:4} {f.depth:5} {pick:4} {f.step_ms:9.3f} {ratio:7.2f} {f.replay_ms:9.3f} "
        f"{f.bubble_ms:9.4f} {f.p99_ms:7.3f} {f.idle_ms:8.4f} {f.host_us:8.0f} {f.floor_ms:9.3f}"
    )


def main(
    shapes: Annotated[str, typer.Option(help="Shapes, comma separated.")] = "moondream2,qwen3-0.6b",
    rows: Annotated[str, typer.Option(help="Batch sizes, comma separated.")] = "1,8,32",
    depths: Annotated[str, typer.Option(help="Steps in flight, comma separated.")] = "1,2",
    context: Annotated[int, typer.Option(help="Tokens of context a row.")] = 850,
    steps: Annotated[int, typer.Option(help="Steps measured.")] = 120,
    plain_too: Annotated[
        bool, typer.Option("--plain-too", help="Also the torch path without kernels.")
    ] = False,
    sampled_rows: Annotated[
        str, typer.Option(help="Row counts also run with temperature and top-p.")
    ] = "1,32",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("gpu-results"),
    name: Annotated[str, typer.Option(help="Of the file in it.")] = "decode",
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Tiny shapes on the CPU, interpreted kernels.")
    ] = False,
) -> None:
    """Measure, print the table, write `decode.json`. A shape may end in `:int8` or `:int4`."""
    out.mkdir(parents=True, exist_ok=True)
    device = open_device(smoke=smoke)
    if smoke:
        made = shapes.partition(":")[1:]
        shapes = f"tiny-qwen3:{made[1]}" if made[0] else "tiny-moondream,tiny-qwen3"
        rows, context, steps = "2", 20, 3
        sampled_rows, depths, plain_too = "2", "2", True
    with torch.inference_mode(), torch_alone() if smoke else nullcontext():
        bytes_per_s = measure_bandwidth(device.torch_device, 64 << 20 if smoke else 4 << 30)
        found: list[Figures] = []
        for shape in shapes.split(","):
            found += run_shape(
                shape,
                device,
                row_counts=[int(n) for n in rows.split(",")],
                depths=[int(n) for n in depths.split(",")],
                context=context,
                steps=steps,
                bytes_per_s=bytes_per_s,
                plain_too=plain_too,
                sampled_rows={int(n) for n in sampled_rows.split(",") if n},
            )
            # Written after every shape, so that a run that is cut off keeps its results.
            record = {
                "device": torch.cuda.get_device_name() if not smoke else "cpu (smoke)",
                "torch": torch.__version__,
                "copy_bytes_per_s": bytes_per_s,
                "figures": [asdict(figures) for figures in found],
            }
            (out / f"{name}.json").write_text(json.dumps(record, indent=1))
    print(f"\ncopy bandwidth {bytes_per_s / 1e12:.2f} TB/s\n{HEADING}")
    print("\n".join(to_line(figures) for figures in found))


if __name__ == "__main__":
    typer.run(main)
