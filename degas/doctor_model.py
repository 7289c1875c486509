"""Owns `degas doctor MODEL`: what a model takes here, and how quick it can be at most. Main thread; loads it as a worker would,
once its plan of memory says that it fits."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from shared.settings import ConfigError
from worker.config import WorkerConfig, load
from worker.device.contract import Device
from worker.device.cpu import giving_back
from worker.device.memory import FreeMemory, gigabytes
from worker.formats.errors import CheckpointError
from worker.formats.hub import cache_folder
from worker.formats.locate import hub_name, locate
from worker.formats.open_source import open_source
from worker.models.contract import Model
from worker.models.held import held_bytes
from worker.models.registry import load_model
from worker.resolve import choose_dtype, choose_kv_dtype, count_pages, quantised
from worker.startup import open_device
from worker.step.kv_memory import page_bytes
from worker.step.memory_plan import MemoryPlan, fit, plan_memory

COPY_BYTES = 64 << 20
MEASURED_S = 0.5

Line = tuple[str, str, bool]
"""Name, text, and whether it is good."""


def model_lines(name: str) -> Iterator[Line]:
    """Weights as they are held, pages, and the most tokens a second of one row. Settings come from the environment."""
    if hub_name(name) is not None and not _is_cached(name):
        yield "model", f"{name} is not on this machine: degas serve {name} fetches it", False
        return
    try:
        config = load({"model": name})
        if config.model == "sim" or config.device == "sim":
            yield "model", "the simulated device has no weights to look at", True
            return
        yield from _of_model(config)
    except (CheckpointError, ConfigError) as error:
        yield "model", str(error), False


def _of_model(config: WorkerConfig) -> Iterator[Line]:
    device = open_device(config)
    stored = open_source(locate(config.model))
    source = quantised(stored, config, device)
    dtype = choose_dtype(config, device, source)
    try:
        plan = plan_memory(config, device, stored, dtype, config.quantize)
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:  # a family that needs its numbers to be built
        yield "memory", f"not counted before it is loaded: {type(error).__name__}", True
    else:
        for part in plan.parts():
            yield "memory", f"{part.name:<9} {gigabytes(part.num_bytes):>8}  {part.note}", True
        config, plan, free = fit(config, device, stored, dtype)  # refuses what is too much
        yield "memory", _in_all(config, plan, free), True
    started_s = time.perf_counter()
    with giving_back(), torch.inference_mode():
        model = load_model(source, device.torch_device, dtype, lambda *_: None)
    choose_kv_dtype(config, model)
    loading_s = time.perf_counter() - started_s
    activations = str(dtype).removeprefix("torch.")
    yield (
        "weights",
        f"{_megabytes(held_bytes(model))} held for {model.num_weights / 1e6:.1f} million, activations in {activations}; "
        f"loaded in {loading_s:.1f} s",
        True,
    )
    pages = config.num_pages or count_pages(config, device, model, model.card.context_tokens)
    held = pages * page_bytes(model, config.page_tokens)
    kept = str(model.kv_dtype).removeprefix("torch.")
    yield "pages", f"{pages} of {config.page_tokens} tokens in {kept}, {_megabytes(held)}", True
    yield "speed", _speed(model, device, config.threads), True


def _in_all(config: WorkerConfig, plan: MemoryPlan, free: FreeMemory) -> str:
    """The plan's sum beside what is free, and what was cut to fit."""
    said = f"{gigabytes(plan.total_bytes)} in all, {gigabytes(free.num_bytes)} free ({free.bound})"
    if not free.is_known or plan.total_bytes <= free.num_bytes:
        return f"{said}: fits"
    return (
        f"{said}: serves with fewer, kv_bytes {config.kv_bytes} and feature_bytes {config.feature_bytes}; "
        f"the least is {gigabytes(plan.least_bytes)}"
    )


def _speed(model: Model, device: Device, threads: int) -> str:
    read = model.step_bytes
    per_s = copy_bandwidth(device.torch_device, threads)
    return (
        f"some {per_s / read:.0f} tokens/s at one row, as far as memory bounds it: a token reads {_megabytes(read)}, and "
        f"{device.name} copies {per_s / 1e9:.1f} GB/s (threads: {threads})"
    )


def copy_bandwidth(device: torch.device, threads: int) -> float:
    """Bytes read and written a second, the best copy of half a second of them. Of a model that fits a cache this says little."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        best_s, end_s = float("inf"), time.perf_counter() + MEASURED_S
        while time.perf_counter() < end_s:
            started_s = time.perf_counter()
            target.copy_(source)
            if device.type == "cuda":
                torch.cuda.synchronize()
            best_s = min(best_s, time.perf_counter() - started_s)
        return 2 * COPY_BYTES / best_s
    finally:
        torch.set_num_threads(before)


def _is_cached(name: str) -> bool:
    wanted = hub_name(name)
    return (
        wanted is not None and (cache_folder() / f"models--{wanted.repository.replace('/', '--')}").is_dir()
    )


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.2f} GB"
