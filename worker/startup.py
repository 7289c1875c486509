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

from shared.protocol import FeatureFormat, Limits, ModelCard, Ready
from worker.config import ConfigError, WorkerConfig
from worker.device.choices import switch
from worker.device.contract import Device
from worker.device.cpu import CpuDevice, available_bytes, giving_back, has_bf16
from worker.device.cuda import CudaDevice
from worker.device.energy import open_meter
from worker.device.huge_pages import mapped, use_huge_pages
from worker.device.memory import gigabytes
from worker.formats.chat_templates import DEFAULT, choose_templates, warn_missing
from worker.formats.errors import CheckpointError
from worker.formats.fingerprint import fingerprint
from worker.formats.locate import EMBEDDED, locate
from worker.formats.open_source import open_source
from worker.formats.source import Source
from worker.loop.costs import Costs, Meter
from worker.loop.encoding import EncodeLoop, PictureEncoder
from worker.loop.engine import Engine
from worker.loop.inbox import Inbox, Outbox, Prefills
from worker.models.contract import Model
from worker.models.layers import reads_blocks
from worker.models.registry import load_model
from worker.native.build import forbid
from worker.native.library import use_threads
from worker.native.products import products, use_activations
from worker.native.quantised_source import QuantisedSource
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
from worker.step.kv_memory import page_bytes
from worker.step.loading_view import LoadingView
from worker.step.memory_plan import crop_bytes, fit, least_pages, most_pages
from worker.step.page_store import TorchPages
from worker.step.picture_encoder import TorchEncoder, format_of
from worker.step.staging import StepShape
from worker.step.torch_runner import TorchRunner
from worker.step.warm_up import warm_up

log = structlog.get_logger()

SMALL_WEIGHTS_BYTES = 32 << 20
CPU_STEP_S = 0.25


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
            _asked_context(fake_card(vocab_size=VOCAB_SIZE, context_tokens=16384), config),
            [SIM_TOKENIZER, b""],
            config.num_pages or 4096,
        )
        shape = _shape(config, card, num_pages)
        if config.sim_profile not in PROFILES:
            raise ConfigError(f"sim_profile {config.sim_profile!r} is none of {sorted(PROFILES)}")
        profile, device_name = PROFILES[config.sim_profile], f"sim:{config.sim_profile}"
        if config.role == "encode":
            return encodes(SimEncoder(RealClock(), profile), device_name, None)
        runner = sim_runner = SimRunner(card, RealClock(), profile, shape, exact=False)
        store = SimPages(sim_runner)
        features = SIM_FEATURES if config.role == "decode" else None
        pace = Pace(guessed_costs(1, 1e6), step_s=config.step_s or 0.0, gap_s=_gap_s(config, 0.0))
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
                config = _fitted(config, device, stored, dtype)
            with giving_back(), torch.inference_mode():
                model = load_model(source, device.torch_device, dtype, startup.progress)
            choose_kv_dtype(config, model)
        if device.torch_device.type == "cpu":
            log.info("huge_pages", moved_bytes=use_huge_pages(besides=known))
        if "chat" not in model.card.capabilities:
            warn_missing(source.path)
        payloads = [tokenizer, source.templates.get(DEFAULT, "").encode()]
        card = msgspec.structs.replace(_asked_context(model.card, config), weight_bytes=model.weight_bytes)
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
        card = _fit_context(card, (num_pages - 1) * config.page_tokens, config.context)
        with startup.phase("allocate"):
            shape = _shape(config, card, num_pages)
            torch_runner = TorchRunner(
                model,
                device,
                shape,
                feature_bytes=config.feature_bytes,
                automata=config.device_automata,
                format=features,
            )
        pace = _pace(config, model)
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


def choose_dtype(config: WorkerConfig, device: Device, source: Source) -> torch.dtype:
    """The type of activations: as configured, or by what this processor does fast."""
    if config.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.dtype]
    if device.torch_device.type == "cuda":
        return torch.bfloat16
    if config.quantize is not None:
        return torch.float32  # of activations: what compiled products of quantised weights take
    compiled = products(device.torch_device)
    if has_bf16():
        # By torch's operations a model that fits the caches gains little from bf16, and in fp32 batches agree to the
        # last token.
        is_small = source.num_bytes < SMALL_WEIGHTS_BYTES
        has_products = compiled is not None and compiled.multiplies(torch.bfloat16)
        return torch.bfloat16 if has_products or not is_small else torch.float32
    if compiled is not None and compiled.multiplies(torch.float32):
        return torch.float32  # activations alone: weights that were saved in bf16 are kept so
    if 2 * source.num_bytes > 0.8 * available_bytes() > 0:
        log.warning("bf16_is_emulated", reason="no memory for the weights in fp32, ten times as quick here")
        return torch.bfloat16
    return torch.float32


def _fitted(config: WorkerConfig, device: Device, stored: Source, dtype: torch.dtype) -> WorkerConfig:
    """The settings that fit into the memory that is free, told where they are others. Raises ConfigError."""
    try:
        fitted, plan, free = fit(config, device, stored, dtype)
    except (ConfigError, CheckpointError):
        raise
    except Exception as error:  # a family that needs its numbers to be built: it is loaded unplanned
        log.warning("memory_not_planned", reason=f"{type(error).__name__}: {error}"[:300])
        return config
    log.info(
        "memory_planned",
        weights=gigabytes(plan.weight_bytes),
        least=gigabytes(plan.least_bytes),
        most=gigabytes(plan.total_bytes),
        free=gigabytes(free.num_bytes),
        bound=free.bound,
    )
    if fitted is not config:
        log.warning(
            "memory_is_short",
            wanted=gigabytes(plan.total_bytes),
            free=gigabytes(free.num_bytes),
            bound=free.bound,
            kv_bytes=fitted.kv_bytes,
            feature_bytes=fitted.feature_bytes,
        )
    return fitted


def quantised(source: Source, config: WorkerConfig, device: Device) -> Source:
    """The source as `quantize` asks for it. Raises ConfigError."""
    if config.quantize is None:
        return source
    refuse_quantize(config, device.torch_device)
    return QuantisedSource(source, config.quantize)


def choose_kv_dtype(config: WorkerConfig, model: Model) -> None:
    """Set what the model's pages will hold. Raises ConfigError for what its attention does not read."""
    wanted = config.kv_dtype
    if wanted == "auto":
        if config.dtype == "auto" and model.device.type == "cpu" and torch.bfloat16 in model.kv_dtypes:
            model.kv_dtype = torch.bfloat16
        return
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    if dtype not in model.kv_dtypes:
        readable = ", ".join(str(one).removeprefix("torch.") for one in model.kv_dtypes)
        raise ConfigError(f"kv_dtype is {wanted}, and attention reads {readable} here; a safe value is auto")
    model.kv_dtype = dtype


def refuse_quantize(config: WorkerConfig, device: torch.device) -> None:
    """Raise ConfigError where `quantize` cannot be: on a CPU without compiled products, or not in fp32 there; on a GPU that
    was told to expand weights."""
    if device.type != "cpu":
        if not reads_blocks(device, torch.bfloat16):
            raise ConfigError(
                f"quantize is {config.quantize}, and gpu_without turns narrow_weights off; take one of them away"
            )
        return
    takes_bf16 = config.dtype == "bfloat16" and reads_blocks(device, torch.bfloat16)
    if config.dtype not in ("auto", "float32") and not takes_bf16:
        raise ConfigError(
            f"quantize is {config.quantize} and dtype {config.dtype}: on a CPU activations are float32 then; "
            f"a safe value for dtype is auto"
        )
    if not reads_blocks(device, torch.float32):
        raise ConfigError(
            f"quantize is {config.quantize}, and there are no compiled products here to multiply by such weights: "
            "install g++ or clang, and leave native on (degas doctor says what is missing); a safe value for quantize "
            "is none"
        )


def count_pages(config: WorkerConfig, device: Device, model: Model, context_tokens: int) -> int:
    """KV pages in the memory that is free. Raises ConfigError where that is too little."""
    of_page = page_bytes(model, config.page_tokens)
    free_bytes = device.free_bytes()
    if device.torch_device.type == "cpu":
        free_bytes = min(free_bytes, config.kv_bytes)
    else:
        # Memory for a batch of crops: residual stream, qkv, MLP and the like, in eager runs as well.
        free_bytes -= config.step_crops * crop_bytes(model)
    num_pages = min(free_bytes // of_page, most_pages(config, context_tokens))
    least = least_pages(config, model)
    if num_pages < least:
        raise ConfigError(
            f"only {free_bytes >> 20} MiB are free for KV memory, and {least} pages of {of_page >> 10} KiB are "
            f"the least to serve with; a safe value for kv_bytes is {2 * least * of_page}"
        )
    return int(num_pages)


def _asked_context(card: ModelCard, config: WorkerConfig) -> ModelCard:
    """The context that the settings ask for; the model's where they ask for none."""
    if config.context > card.context_tokens:
        raise ConfigError(
            f"context is {config.context}, and {card.model_id} has {card.context_tokens} tokens; "
            f"a safe value is 0, which takes them all"
        )
    return msgspec.structs.replace(card, context_tokens=config.context) if config.context else card


def _fit_context(card: ModelCard, kv_tokens: int, asked: int) -> ModelCard:
    """A context that one sequence can really have in this worker's KV memory; `asked` 0: as much as fits."""
    if card.context_tokens <= kv_tokens:
        return card
    if asked:
        raise ConfigError(
            f"context is {asked}, and KV memory holds {kv_tokens} tokens; a safe value is {kv_tokens}, or raise kv_bytes"
        )
    log.warning(
        "context_shortened",
        model=card.model_id,
        wanted=card.context_tokens,
        tokens=kv_tokens,
        setting="kv_bytes",
    )
    return msgspec.structs.replace(card, context_tokens=kv_tokens)


def _shape(config: WorkerConfig, card: ModelCard, num_pages: int) -> StepShape:
    return StepShape(
        max_rows=config.max_rows,
        max_sequence_tokens=card.context_tokens,
        step_tokens=config.step_tokens,
        page_tokens=config.page_tokens,
        num_pages=num_pages,
        vocab_size=card.vocab_size,
        num_slots=max(2, config.depth),
        step_crops=config.step_crops,
    )


def _pace(config: WorkerConfig, model: Model) -> Pace:
    """The bounds on steps, and a first guess of their cost: on a CPU the guess is a slow processor's."""
    on_cpu = model.device.type == "cpu"
    step_s = config.step_s if config.step_s is not None else CPU_STEP_S if on_cpu else 0.0
    guess = guessed_costs(model.num_weights, 5e9 if on_cpu else 1e13)
    return Pace(guess, step_s=step_s, gap_s=_gap_s(config, step_s))


def _gap_s(config: WorkerConfig, step_s: float) -> float:
    return config.gap_s if config.gap_s is not None else step_s / 2
