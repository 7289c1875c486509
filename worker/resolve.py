"""Owns what the settings leave open, resolved against the device and the model: dtypes, blocks, pages, context, pace. Decode thread.

Each function takes the settings and what is known so far, and gives the value that serving begins with, or raises `ConfigError` naming
a setting and a safe value.
"""

from __future__ import annotations

import msgspec
import structlog
import torch

from shared.protocol import ModelCard
from worker.config import ConfigError, WorkerConfig
from worker.device.contract import Device
from worker.device.cpu import available_bytes, has_bf16
from worker.device.memory import gigabytes
from worker.formats.errors import CheckpointError
from worker.formats.source import Source
from worker.models.contract import Model
from worker.models.linear import reads_blocks
from worker.native.products import products
from worker.native.quantised_source import QuantisedSource
from worker.schedule.pace import Pace, guessed_costs
from worker.step.kv_memory import page_bytes
from worker.step.memory_plan import crop_bytes, fit, least_pages, most_pages
from worker.step.staging import StepShape

log = structlog.get_logger("worker.startup")

CPU_STEP_S = 0.25


SMALL_WEIGHTS_BYTES = 32 << 20


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


def fitted_settings(config: WorkerConfig, device: Device, stored: Source, dtype: torch.dtype) -> WorkerConfig:
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


def asked_context(card: ModelCard, config: WorkerConfig) -> ModelCard:
    """The context that the settings ask for; the model's where they ask for none."""
    if config.context > card.context_tokens:
        raise ConfigError(
            f"context is {config.context}, and {card.model_id} has {card.context_tokens} tokens; "
            f"a safe value is 0, which takes them all"
        )
    return msgspec.structs.replace(card, context_tokens=config.context) if config.context else card


def fit_context(card: ModelCard, kv_tokens: int, asked: int) -> ModelCard:
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


def step_shape(config: WorkerConfig, card: ModelCard, num_pages: int) -> StepShape:
    """The largest step that these settings allow of the model of `card`."""
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


def pace_of(config: WorkerConfig, model: Model) -> Pace:
    """The bounds on steps, and a first guess of their cost: on a CPU the guess is a slow processor's."""
    on_cpu = model.device.type == "cpu"
    step_s = config.step_s if config.step_s is not None else CPU_STEP_S if on_cpu else 0.0
    guess = guessed_costs(model.num_weights, 5e9 if on_cpu else 1e13)
    return Pace(guess, step_s=step_s, gap_s=gap_s_of(config, step_s))


def gap_s_of(config: WorkerConfig, step_s: float) -> float:
    """The longest gap between a row's tokens that steps may cause, seconds: half a step where none is asked for."""
    return config.gap_s if config.gap_s is not None else step_s / 2
