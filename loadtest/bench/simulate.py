"""Owns `degas simulate`: the cost model, and the real loop run against it on a virtual clock. Main thread.

docs/performance.md has the model's formula. "Simulated" does not use it: the real engine, scheduler and pipeline run
with a device and a host that take exactly the given times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import Annotated

import typer

from loadtest.bench.published import OUTPUT_TOKENS, PHOTON
from loadtest.tables import of_objects, show
from shared.protocol import FromWorker, ModelCard, Sampling, StepOutputs, Submit, pack_i32
from worker.loop.engine import Engine
from worker.loop.inbox import Inbox, Received
from worker.schedule.limits import SchedulerLimits
from worker.schedule.pages import PagePool
from worker.schedule.plan import StepPlan, StepResult
from worker.schedule.scheduler import Scheduler
from worker.sim.profiles import GPUS, LAUNCH_S, SHAPES, ModelShape, Profile, predict_forward_s
from worker.sim.runner import OOM_TOKEN, SimRunner, fake_card
from worker.sim.timeline import VirtualClock
from worker.step.contract import Progress
from worker.step.staging import StepShape

FIRST_TOKEN = OOM_TOKEN + 1  # the simulated device takes ids below this as faults
WARM_UP_STEPS = 50
MEASURED_TOKENS = 4000  # per row
HOST_BEFORE = 0.6  # share of the host's time spent before a launch; the rest follows the commit


@dataclass(frozen=True, slots=True)
class Prediction:
    """Decode at a fixed number of streams, requests of `output_tokens` following one another without a pause."""

    blocking_ms: float  # per token and stream
    pipelined_ms: float
    gain_pct: float


def predict(forward_s: float, sample_s: float, host_s: float, output_tokens: int) -> Prediction:
    """The formula."""
    blocking_s = forward_s + sample_s + host_s
    pipelined_s = max(forward_s + sample_s, host_s) / (1 - 1 / output_tokens)
    return Prediction(blocking_s * 1e3, pipelined_s * 1e3, (blocking_s / pipelined_s - 1) * 100)


def simulate(
    forward_s: float, sample_s: float, host_s: float, *, rows: int, output_tokens: int
) -> Prediction:
    """The real loop at depth 1 and 2 under these times."""
    times = [
        _run(forward_s, sample_s, host_s, depth=depth, rows=rows, output_tokens=output_tokens)
        for depth in (1, 2)
    ]
    return Prediction(times[0] * 1e3, times[1] * 1e3, (times[0] / times[1] - 1) * 100)


class _CostlyRunner(SimRunner):
    """A simulated device under a host that takes its time: before every launch, and after every wait."""

    def __init__(
        self, card: ModelCard, clock: VirtualClock, host_s: float, profile: Profile, rows: int, num_pages: int
    ) -> None:
        shape = StepShape(
            max_rows=rows,
            max_sequence_tokens=1024,
            step_tokens=2048,
            page_tokens=16,
            num_pages=num_pages,
            vocab_size=card.vocab_size,
        )
        super().__init__(card, clock, profile, shape, exact=False)
        self._clock = clock
        self._host_s = host_s

    def launch_forward(self, slot_number: int, plan: StepPlan, progress: Progress) -> None:
        self._clock.advance(self._host_s * HOST_BEFORE)
        super().launch_forward(slot_number, plan, progress)

    def wait(self, slot_number: int, plan: StepPlan) -> StepResult:
        result = super().wait(slot_number, plan)
        self._clock.advance(self._host_s * (1 - HOST_BEFORE))
        return result


class _Refill:
    """An outbox that submits a new request whenever one ends, so that all rows stay busy."""

    def __init__(self, submit: Callable[[], None]) -> None:
        self._submit = submit

    def send(self, gateway: bytes, message: FromWorker, payloads: list[bytes] | None = None) -> None:
        if isinstance(message, StepOutputs):
            for _ in message.finishes:
                self._submit()

    def broadcast(self, message: FromWorker) -> None:
        pass


def _run(
    forward_s: float, sample_s: float, host_s: float, *, depth: int, rows: int, output_tokens: int
) -> float:
    """Seconds a token of one stream takes, prompts costing nothing.

    Every token of the fake model is an end with probability 1 / output_tokens. The loop learns of an end one step late,
    as with real answers, and so pays for zombie rows.
    """
    profile = Profile("given", {1: forward_s, rows + 1: forward_s}, sample_s, 0.0, 0.0, 0.0)
    card = fake_card(vocab_size=output_tokens)
    num_pages = rows * 64 + 1
    clock = VirtualClock()
    runner = _CostlyRunner(card, clock, host_s, profile, rows, num_pages)
    inbox: Inbox = SimpleQueue()
    ids = iter(range(1 << 30))

    def submit() -> None:
        number = next(ids)
        num_plain = output_tokens - FIRST_TOKEN
        prompt = [FIRST_TOKEN + number * 7 % num_plain, FIRST_TOKEN + number % num_plain]
        message = Submit(1, number, "s", pack_i32(prompt), 1000, Sampling(temperature=1.0, seed=number))
        inbox.put(Received(b"", message))

    engine = Engine(
        Scheduler(
            SchedulerLimits(max_rows=rows, step_tokens=2048, mixed_tokens=2048, max_sequence_tokens=1024),
            PagePool(num_pages, 16),
        ),
        runner,
        card,
        inbox=inbox,
        outbox=_Refill(submit),
        clock=clock.now,
        epoch=1,
        depth=depth,
        late_launch=False,
    )
    for _ in range(rows):
        submit()
    for _ in range(WARM_UP_STEPS):
        engine.tick()
    start_s, start = clock.now(), engine.metrics.generation_tokens_total
    while engine.metrics.generation_tokens_total < start + MEASURED_TOKENS * rows:
        engine.tick()
    return (clock.now() - start_s) * rows / (engine.metrics.generation_tokens_total - start)


def published_table() -> list[dict[str, float | str]]:
    """Every published row: predicted by the formula, simulated by the real loop, and as published."""
    rows: list[dict[str, float | str]] = []
    for (gpu, streams), known in PHOTON.items():
        times = (known.forward_ms / 1e3, known.tail_ms / 1e3, known.host_ms / 1e3)
        formula = predict(*times, OUTPUT_TOKENS)
        loop = simulate(*times, rows=streams, output_tokens=OUTPUT_TOKENS)
        rows.append(
            {
                "gpu": gpu,
                "rows": streams,
                "predicted_gain_pct": round(formula.gain_pct, 1),
                "simulated_gain_pct": round(loop.gain_pct, 1),
                "published_gain_pct": known.gain_pct,
                "simulated_blocking_ms": round(loop.blocking_ms, 2),
                "simulated_pipelined_ms": round(loop.pipelined_ms, 2),
            }
        )
    return rows


app = typer.Typer(
    invoke_without_command=True,
    help="What pipelining gains, and what a cluster would serve: from measured costs, without a device.",
)


@app.callback()
def command(
    called: typer.Context,
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}; empty: the published table.")] = "",
    model: Annotated[str, typer.Option(help=f"A known shape: {', '.join(SHAPES)}.")] = "moondream2",
    weight_gb: Annotated[float, typer.Option(help="Weights in GB, instead of the known shape's.")] = 0.0,
    kv_kb: Annotated[float, typer.Option(help="KV of one token in KB, instead of the known shape's.")] = 0.0,
    rows: Annotated[int, typer.Option(help="Streams decoded together.")] = 32,
    context: Annotated[int, typer.Option(help="Tokens of context a stream.")] = 850,
    output: Annotated[int, typer.Option(help="Mean tokens of an answer (at least 20).")] = OUTPUT_TOKENS,
    host_us: Annotated[float, typer.Option(help="Host time of a step, microseconds.")] = 500.0,
    sample_us: Annotated[float, typer.Option(help="Sampling time of a step, microseconds.")] = 140.0,
    launch_us: Annotated[float, typer.Option(help="Device time of a step beside moving bytes.")] = LAUNCH_S
    * 1e6,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list of objects instead of a table.")
    ] = False,
) -> None:
    """What pipelining gains: the published table reproduced, or a prediction for a model, GPU and batch."""
    if called.invoked_subcommand is not None:
        return
    if not gpu:
        result = published_table()
    else:
        if gpu not in GPUS or model not in SHAPES or output < 20:
            raise typer.BadParameter(
                f"gpu is one of {sorted(GPUS)}, model of {sorted(SHAPES)}, output at least 20"
            )
        known = SHAPES[model]
        shape = ModelShape(
            model, weight_gb * 1e9 or known.weight_bytes, kv_kb * 1e3 or known.kv_bytes_per_token
        )
        forward_s = predict_forward_s(GPUS[gpu], shape, rows, context, launch_us / 1e6)
        formula = predict(forward_s, sample_us / 1e6, host_us / 1e6, output)
        loop = simulate(forward_s, sample_us / 1e6, host_us / 1e6, rows=rows, output_tokens=output)
        result = [
            {
                "gpu": gpu,
                "rows": rows,
                "forward_ms": round(forward_s * 1e3, 3),
                **{f"predicted_{name}": round(value, 3) for name, value in asdict(formula).items()},
                **{f"simulated_{name}": round(value, 3) for name, value in asdict(loop).items()},
            }
        ]
    show(of_objects("gain of pipelined over blocking decoding", result), result, as_json=as_json)
