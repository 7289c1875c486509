"""Owns building a worker: device, model, memory, engine; each phase is timed and reported. Decode thread."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
import structlog
import torch

from shared.protocol import FeatureFormat, Limits, Ready
from worker.config import ConfigError, WorkerConfig
from worker.device.choices import switch
from worker.device.contract import Device
from worker.device.cpu import CpuDevice, giving_back
from worker.device.cuda import CudaDevice
from worker.device.energy import open_meter
from worker.device.huge_pages import mapped, use_huge_pages
from worker.formats.chat_templates import DEFAULT, choose_templates, warn_missing
from worker.formats.fingerprint import fingerprint
from worker.formats.locate import EMBEDDED, locate
from worker.formats.open_source import open_source
from worker.formats.source import Source
from worker.loop.costs import Costs, Meter
from worker.loop.encoding import EncodeLoop, PictureEncoder
from worker.loop.engine import Engine
from worker.loop.inbox import Inbox, Outbox, Prefills
from worker.models.registry import load_model
from worker.native.build import forbid
from worker.native.library import use_threads
from worker.native.products import use_activations
from worker.resolve import (
    asked_context,
    choose_dtype,
    choose_kv_dtype,
    count_pages,
    fit_context,
    fitted_settings,
    gap_s_of,
    pace_of,
    quantised,
    step_shape,
)
from worker.roles import announcement, encode_limits, encode_loop, how_read, page_role
from worker.schedule.automaton_places import AutomatonPlaces, TableLimits
from worker.schedule.depth import DepthGovernor
from worker.schedule.kv_events import KvEvent, KvEvents
from worker.schedule.limits import SchedulerLimits
from worker.schedule.pace import Pace, guessed_costs
from worker.schedule.pages import PagePool
from worker.schedule.prefix_cache import PrefixCache
from worker.schedule.scheduler import Scheduler
from worker.sim.encoder import SIM_FEATURES, SimEncoder
from worker.sim.page_store import SimPages
from worker.sim.profiles import PROFILES
from worker.sim.runner import SimRunner, fake_card
from worker.sim.timeline import RealClock
from worker.sim.tokenizer import SIM_TOKENIZER, VOCAB_SIZE
from worker.step.contract import PageStore, Runner
from worker.step.loading_view import LoadingView
from worker.step.page_store import TorchPages
from worker.step.picture_encoder import TorchEncoder, format_of
from worker.step.torch_runner import TorchRunner
from worker.step.warm_up import warm_up

log = structlog.get_logger()


@dataclass(slots=True)
class Startup:
    """Tells a supervisor (or a person) how far start-up is."""

    speak: bool
    phases_s: dict[str, float] = field(default_factory=dict)
    view: LoadingView = field(default_factory=LoadingView)  # where no supervisor shows it

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
        if self.speak:
            self._say("PROGRESS", {"phase": phase, "done": done, "total": total})
        else:
            self.view(phase, done, total)

    def ready(self, endpoint: str, model_id: str) -> None:
        """The worker serves."""
        self._say("READY", {"endpoint": endpoint, "model": model_id, "startup_s": self.phases_s})

    def _say(self, kind: str, fields: dict[str, object]) -> None:
        if self.speak:
            sys.stdout.write(f"DEGAS-{kind} {json.dumps(fields)}\n")
            sys.stdout.flush()


@dataclass(slots=True)
class Worker:
    """A built worker: its loop, and the answer to `Hello`."""

    engine: Engine | EncodeLoop
    ready: Ready
    payloads: list[bytes]


def _turn_switches(config: WorkerConfig) -> None:
    without = config.gpu_without.split(",")
    for name, off, on in (("gpu_without", without, []), ("gpu_with", without, config.gpu_with.split(","))):
        try:
            switch(off, on)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}; a safe value is the empty one, which turns none") from None


def build_worker(
    config: WorkerConfig,
    startup: Startup,
    *,
    inbox: Inbox,
    outbox: Outbox,
    epoch: int,
    on_beat: Callable[[int, float], None] | None = None,
    on_kv_events: Callable[[list[KvEvent]], None] | None = None,
    prefills: Prefills | None = None,
) -> Worker:
    """Build everything on the calling thread, which becomes the decode thread. Raises `ConfigError` or
    `worker.formats.errors.CheckpointError` with what to do about it."""
    runner: Runner
    store: PageStore
    features: FeatureFormat | None = None
    _turn_switches(config)

    def encodes(encoder: PictureEncoder, device_name: str, meter: Meter | None) -> Worker:
        loop = encode_loop(
            config, encoder, card, inbox=inbox, outbox=outbox, epoch=epoch, on_beat=on_beat, meter=meter
        )
        phases_s, limits = startup.phases_s, encode_limits(config)
        ready = announcement(config, epoch, card, limits, device_name, phases_s, encoder.format)
        return Worker(loop, ready, payloads)

    if config.device == "sim" or config.model == "sim":
        if config.quantize is not None:
            raise ConfigError("quantize: the simulated device has no weights; a safe value is none")
        card, payloads, num_pages = (
            asked_context(fake_card(vocab_size=VOCAB_SIZE, context_tokens=16384), config),
            [SIM_TOKENIZER, b""],
            config.num_pages or 4096,
        )
        shape = step_shape(config, card, num_pages)
        if config.sim_profile not in PROFILES:
            raise ConfigError(f"sim_profile {config.sim_profile!r} is none of {sorted(PROFILES)}")
        profile, device_name = PROFILES[config.sim_profile], f"sim:{config.sim_profile}"
        if config.role == "encode":
            return encodes(SimEncoder(RealClock(), profile), device_name, None)
        runner = sim_runner = SimRunner(card, RealClock(), profile, shape, exact=False)
        store = SimPages(sim_runner)
        features = SIM_FEATURES if config.role == "decode" else None
        pace = Pace(guessed_costs(1, 1e6), step_s=config.step_s or 0.0, gap_s=gap_s_of(config, 0.0))
        meter = None  # this machine's energy would not be the simulated device's
    else:
        with startup.phase("device"):
            device = open_device(config)
        known = mapped()
        with startup.phase("load weights"):
            stored: Source = open_source(locate(config.model))
            if config.model in EMBEDDED:
                stored.model_id = config.model
            tokenizer = stored.tokenizer()
            weights = "" if config.role == "all" else fingerprint(stored, str(config.quantize))
            stored.templates = choose_templates(stored.templates, config.chat_template, stored.path)
            source = quantised(stored, config, device)
            dtype = choose_dtype(config, device, source)
            if config.context:  # before the weights: some rotations depend on the context that is served
                source.config.setdefault("degas", {})["context_tokens"] = config.context
            if config.check_memory:
                config = fitted_settings(config, device, stored, dtype)
            with giving_back(), torch.inference_mode():
                model = load_model(source, device.torch_device, dtype, startup.progress)
            choose_kv_dtype(config, model)
        if device.torch_device.type == "cpu":
            log.info("huge_pages", moved_bytes=use_huge_pages(besides=known))
        if "chat" not in model.card.capabilities:
            warn_missing(source.path)
        payloads = [tokenizer, source.templates.get(DEFAULT, "").encode()]
        card = msgspec.structs.replace(asked_context(model.card, config), weight_bytes=model.weight_bytes)
        if config.role == "encode":
            if model.encoder is None:
                raise ConfigError(
                    f"role is encode, and {card.model_id} reads no pictures; a safe value is all"
                )
            with startup.phase("warm up"):
                torch_encoder = TorchEncoder(
                    model,
                    device,
                    weights=weights,
                    feature_bytes=config.feature_bytes,
                    step_crops=config.step_crops,
                )
            return encodes(torch_encoder, device.name, open_meter(device.torch_device.type))
        if config.role == "decode" and model.encoder is not None:
            features = format_of(model, device, weights)
        num_pages = config.num_pages or count_pages(config, device, model, card.context_tokens)
        card = fit_context(card, (num_pages - 1) * config.page_tokens, config.context)
        with startup.phase("allocate"):
            shape = step_shape(config, card, num_pages)
            torch_runner = TorchRunner(
                model,
                device,
                shape,
                feature_bytes=config.feature_bytes,
                automata=config.device_automata,
                format=features,
            )
        pace = pace_of(config, model)
        with startup.phase("warm up"):
            warm_up(torch_runner, startup.progress, budget_s=config.warm_up_s)
        runner = torch_runner
        how = "" if config.role == "all" else fingerprint(stored, *how_read(config, dtype))
        store = TorchPages(model, torch_runner.cache, device, weights=how)
        device_name = device.name
        meter = open_meter(device.torch_device.type)
    pool = PagePool(num_pages, config.page_tokens)
    limits = SchedulerLimits(
        max_rows=shape.max_rows,
        max_waiting=config.max_waiting,
        step_tokens=shape.step_tokens,
        mixed_tokens=config.mixed_tokens,
        step_crops=shape.step_crops,
        mixed_crops=config.mixed_crops,
        max_sequence_tokens=shape.max_sequence_tokens,
    )
    automata = AutomatonPlaces(TableLimits()) if config.device_automata else None
    kv_events = KvEvents() if on_kv_events is not None else None
    cache = PrefixCache(pool, kv_events) if config.prefix_cache else None
    scheduler = Scheduler(limits, pool, cache, automata, pace)
    pages = page_role(config, store, scheduler, outbox=outbox, epoch=epoch, prefills=prefills)
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
        on_kv_events=on_kv_events,
        costs=Costs(config.price_per_hour, meter),
        format=features,
        intake=pages.intake,
        export=pages.export,
    )
    announced = Limits(
        config.max_rows,
        config.max_waiting,
        pool.total,
        config.page_tokens,
        config.step_tokens,
        min(card.context_tokens, pool.total * config.page_tokens),
        config.progress_timeout_s,
        int(config.feature_bytes),
    )
    ready = announcement(
        config, epoch, card, announced, device_name, startup.phases_s, features, pages.format
    )
    return Worker(engine, ready, payloads)


def open_device(config: WorkerConfig) -> Device:
    """The device that the settings name, its threads set."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        return CudaDevice()
    if not config.native:
        forbid()
    use_threads(config.threads)
    use_activations(config.activations)
    return CpuDevice()
