"""Owns building a worker: device, model, memory, engine, with each phase timed and told. Decode thread."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue

import msgspec
import structlog
import torch

from shared.protocol import PROTOCOL_VERSION, Limits, ModelCard, Ready, schema_hash
from worker.config import ConfigError, WorkerConfig
from worker.device.contract import Device
from worker.device.cpu import CpuDevice
from worker.device.cuda import CudaDevice
from worker.device.huge_pages import use_huge_pages
from worker.formats.folder import open_source
from worker.formats.source import Source
from worker.loop.engine import Command, Engine
from worker.loop.reports import Outbox
from worker.models.contract import Model
from worker.models.registry import load_model
from worker.native.build import forbid
from worker.native.library import use_threads
from worker.native.products import products
from worker.schedule.automaton_slots import AutomatonSlots, TableLimits
from worker.schedule.depth import DepthGovernor
from worker.schedule.limits import SchedulerLimits
from worker.schedule.pages import PagePool
from worker.schedule.prefix_cache import PrefixCache
from worker.schedule.scheduler import Scheduler
from worker.sim.profiles import PROFILES
from worker.sim.runner import SimRunner, fake_card
from worker.sim.timeline import RealClock
from worker.sim.tokenizer import SIM_TOKENIZER, VOCAB_SIZE
from worker.step.contract import Runner
from worker.step.torch_runner import TorchRunner
from worker.step.warm_up import warm_up

log = structlog.get_logger()

SMALL_WEIGHTS_BYTES = 32 << 20
MIN_CONTEXT_TOKENS = 256
ENCODER_WIDTHS = 16  # of the encoder's width, held at once for each image token by its widest layer


@dataclass(slots=True)
class Startup:
    """Tells a supervisor (or a person) how far start-up is."""

    speak: bool
    phases_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one phase."""
        started_s = time.perf_counter()
        yield
        seconds = time.perf_counter() - started_s
        self.phases_s[name] = round(seconds, 3)
        self._say("PHASE", {"phase": name, "seconds": round(seconds, 3)})

    def progress(self, phase: str, done: float, total: float) -> None:
        """How far a long phase is."""
        self._say("PROGRESS", {"phase": phase, "done": done, "total": total})

    def ready(self, endpoint: str, model_id: str) -> None:
        """The worker serves."""
        self._say("READY", {"endpoint": endpoint, "model": model_id, "startup_s": self.phases_s})

    def _say(self, kind: str, fields: dict[str, object]) -> None:
        if self.speak:
            sys.stdout.write(f"DEGAS-{kind} {json.dumps(fields)}\n")
            sys.stdout.flush()


@dataclass(slots=True)
class Worker:
    """A built worker: its engine and what `Hello` is answered with."""

    engine: Engine
    ready: Ready
    payloads: list[bytes]


def build_worker(
    config: WorkerConfig,
    startup: Startup,
    *,
    inbox: SimpleQueue[Command],
    outbox: Outbox,
    epoch: int,
    on_beat: Callable[[int], None] | None = None,
) -> Worker:
    """Build everything on the calling thread, which becomes the decode thread. Raises `ConfigError` or
    `worker.formats.source.CheckpointError` with what to do about it."""
    runner: Runner
    if config.device == "sim" or config.model == "sim":
        card, payloads, num_pages = (
            fake_card(vocab_size=VOCAB_SIZE, context_tokens=16384),
            [SIM_TOKENIZER, b""],
            config.num_pages or 4096,
        )
        runner = _sim_runner(config, card, num_pages)
        device_name = f"sim:{config.sim_profile}"
    else:
        with startup.phase("device"):
            device = _open_device(config)
        with startup.phase("load weights"):
            source = open_source(config.model_folder)
            tokenizer, template = source.tokenizer(), source.chat_template()
            dtype = _dtype(config, device, source)
            with torch.inference_mode():
                model = load_model(source, device.torch_device, dtype, startup.progress)
        if device.torch_device.type == "cpu":
            log.info("huge_pages", moved_bytes=use_huge_pages())
        payloads = [tokenizer, template.encode()]
        num_pages = config.num_pages or _num_pages(config, device, model)
        card = _fit_context(model.card, (num_pages - 1) * config.page_tokens)
        with startup.phase("allocate"):
            torch_runner = _torch_runner(config, device, model, num_pages)
        if device.captures:
            with startup.phase("warm up"):
                warm_up(torch_runner, startup.progress, budget_s=config.warm_up_s)
        runner = torch_runner
        device_name = device.name
    pool = PagePool(num_pages, config.page_tokens)
    limits = SchedulerLimits(
        max_rows=config.max_rows,
        max_waiting=config.max_waiting,
        step_tokens=config.step_tokens,
        mixed_tokens=config.mixed_tokens,
        step_crops=config.step_crops,
        mixed_crops=config.mixed_crops,
        max_sequence_tokens=card.context_tokens,
    )
    automata = AutomatonSlots(TableLimits()) if config.device_automata else None
    scheduler = Scheduler(limits, pool, PrefixCache(pool) if config.prefix_cache else None, automata)
    engine = Engine(
        scheduler,
        runner,
        card,
        inbox=inbox,
        outbox=outbox,
        clock=time.perf_counter,
        epoch=epoch,
        depth=config.depth,
        governor=DepthGovernor(config.depth) if config.depth > 2 else None,
        late_launch=config.late_launch,
        on_beat=on_beat,
    )
    if isinstance(runner, TorchRunner):
        engine.metrics.eager_steps_total = runner.graph_counts.eager_steps_total
        engine.metrics.captures_total = runner.graph_counts.captures_total
    ready = Ready(
        PROTOCOL_VERSION,
        schema_hash(),
        epoch,
        card,
        Limits(
            config.max_rows,
            config.max_waiting,
            pool.total,
            config.page_tokens,
            config.step_tokens,
            min(card.context_tokens, pool.total * config.page_tokens),
        ),
        device_name,
        dict(startup.phases_s),
    )
    return Worker(engine, ready, payloads)


def _open_device(config: WorkerConfig) -> Device:
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        return CudaDevice()
    if not config.native:
        forbid()
    use_threads(config.threads)
    return CpuDevice()


def _dtype(config: WorkerConfig, device: Device, source: Source) -> torch.dtype:
    if config.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.dtype]
    if device.torch_device.type == "cuda":
        return torch.bfloat16
    compiled = products(device.torch_device)
    if compiled is not None:
        # Without bf16 arithmetic fp32 is several times as quick as emulating it, and weights that were saved in bf16 are kept
        # in bf16 all the same (`Products.pack`).
        return torch.bfloat16 if compiled.multiplies(torch.bfloat16) else torch.float32
    # By torch's operations a model that fits the caches gains little from bf16, and in fp32 batches agree to the
    # last token.
    return torch.float32 if source.num_bytes < SMALL_WEIGHTS_BYTES else torch.bfloat16


def _num_pages(config: WorkerConfig, device: Device, model: Model) -> int:
    page_bytes = (
        2
        * model.num_layers
        * config.page_tokens
        * model.num_kv_heads
        * model.head_dim
        * model.kv_dtype.itemsize
    )
    on_cpu = device.torch_device.type == "cpu"
    encoder = model.encoder
    if on_cpu:
        free_bytes = min(device.free_bytes(), config.kv_bytes)
    else:
        free_bytes = device.free_bytes()
        if encoder is not None:
            # What a batch of crops needs: stream, qkv, MLP and their like, for eager runs too.
            crop_bytes = ENCODER_WIDTHS * encoder.num_tokens * encoder.width * encoder.dtype.itemsize
            free_bytes -= config.step_crops * crop_bytes
    per_sequence = -(-model.card.context_tokens // config.page_tokens)
    most = config.max_rows * per_sequence + 1  # more could never be used but by the prefix cache
    num_pages = min(free_bytes // page_bytes, 4 * most)
    least = -(-max(model.prefix_tokens, MIN_CONTEXT_TOKENS) // config.page_tokens) + 1
    if num_pages <= least:
        raise ConfigError(
            f"only {free_bytes >> 20} MiB are free for KV memory, and {least} pages of {page_bytes >> 10} KiB are "
            f"the least to serve with; a safe value for kv_bytes is {2 * least * page_bytes}"
        )
    return int(num_pages)


def _fit_context(card: ModelCard, kv_tokens: int) -> ModelCard:
    """A context that one sequence can really have in this worker's KV memory."""
    if card.context_tokens <= kv_tokens:
        return card
    log.warning(
        "context_shortened",
        model=card.model_id,
        wanted=card.context_tokens,
        tokens=kv_tokens,
        setting="kv_bytes",
    )
    return msgspec.structs.replace(card, context_tokens=kv_tokens)


def _torch_runner(config: WorkerConfig, device: Device, model: Model, num_pages: int) -> TorchRunner:
    return TorchRunner(
        model,
        device,
        num_slots=max(2, config.depth),
        num_pages=num_pages,
        page_tokens=config.page_tokens,
        max_rows=config.max_rows,
        max_sequence_tokens=min(model.card.context_tokens, (num_pages - 1) * config.page_tokens),
        step_tokens=config.step_tokens,
        feature_bytes=config.feature_bytes,
        automata=config.device_automata,
        step_crops=config.step_crops,
    )


def _sim_runner(config: WorkerConfig, card: ModelCard, num_pages: int) -> SimRunner:
    if config.sim_profile not in PROFILES:
        raise ConfigError(f"sim_profile {config.sim_profile!r} is none of {sorted(PROFILES)}")
    return SimRunner(
        card,
        RealClock(),
        PROFILES[config.sim_profile],
        num_slots=max(2, config.depth),
        num_pages=num_pages,
        page_tokens=config.page_tokens,
        max_rows=config.max_rows,
        max_sequence_tokens=card.context_tokens,
        step_tokens=config.step_tokens,
        exact=False,
    )
