"""Owns what a worker will take of a machine's memory, before it loads a model: from headers and settings alone. Decode thread.

Each part is a bound that serving may reach, so a model that starts by this plan is not killed hours later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pydantic import ByteSize

from worker.config import ConfigError, WorkerConfig
from worker.device.contract import Device
from worker.device.memory import FreeMemory, free_memory, gigabytes
from worker.formats.source import Source
from worker.models.blank import blank_model
from worker.models.contract import Model
from worker.models.linear import reads_blocks
from worker.models.planned import Planned, planned
from worker.native.quantised import KINDS
from worker.step.kv_memory import page_bytes

MIN_CONTEXT_TOKENS = 256
ENCODER_WIDTHS = 16  # of the encoder's width, held at once for each image token by its widest layer
LOADING_BYTES = 64 << 20  # pieces of files, and of what they are packed into
LOADING_SHARE = 0.08  # of the weights, beside those while they load: measured 4 to 7 %
GATEWAY_BYTES = 256 << 20  # the gateway and its picture processes, where they share the machine
_STREAM_WIDTHS = 8  # residual streams, norms and sums of a step, each as wide as the model
_ROW_BYTES = 20  # of each word of the vocabulary for each row: logits of two slots, penalties, biases
_FEATURE_SHARE = (
    4  # where memory is short, features of pictures get at most a quarter of what pages and they share
)


@dataclass(frozen=True, slots=True)
class Part:
    """A line of the plan."""

    name: str
    num_bytes: int
    note: str


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What there will be beside each other. Pages and features are as many as the settings allow: they can be fewer."""

    weight_bytes: int
    loading_bytes: int  # beside the weights, gone before serving
    step_bytes: int
    picture_bytes: int
    feature_bytes: int
    page_bytes: int
    least_pages: int
    most_pages: int  # that the settings allow and the context can use
    others_bytes: int
    is_float: bool  # whether no matrix is in blocks, so that `quantize` may make some

    @property
    def fixed_bytes(self) -> int:
        """What does not depend on how many pages and features are kept."""
        serving = self.step_bytes + self.picture_bytes
        return self.weight_bytes + max(self.loading_bytes, serving) + self.others_bytes

    @property
    def least_bytes(self) -> int:
        """The least to serve with."""
        return self.fixed_bytes + self.least_pages * self.page_bytes

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.fixed_bytes + self.most_pages * self.page_bytes + self.feature_bytes

    def parts(self) -> Iterator[Part]:
        """As a table, the largest causes first."""
        yield Part("weights", self.weight_bytes, f"{gigabytes(self.loading_bytes)} more while they load")
        pages = f"{self.most_pages} of {self.page_bytes >> 10} KiB, at least {self.least_pages}: kv_bytes, num_pages"
        yield Part("pages", self.most_pages * self.page_bytes, pages)
        yield Part("a step", self.step_bytes, "the most that one may hold: step_tokens, max_rows")
        if self.picture_bytes:
            yield Part("pictures", self.picture_bytes, "while crops are encoded: step_crops on a GPU")
            yield Part("features", self.feature_bytes, "kept for repeated pictures: feature_bytes")
        if self.others_bytes:
            yield Part("others", self.others_bytes, "left to the gateway and the system")


def plan_memory(
    config: WorkerConfig, device: Device, source: Source, dtype: torch.dtype, quantize: str | None
) -> MemoryPlan:
    """The plan for `source`, as it lies on disk, with activations of `dtype`. Raises CheckpointError as loading would."""
    where = device.torch_device
    model, stored = blank_model(source, dtype, made=quantize, reads_blocks=reads_blocks(where, dtype))
    held = planned(model, stored, where, dtype)
    on_cpu = where.type == "cpu"
    of_page = page_bytes(model, config.page_tokens, kept_dtype(config, model, where, dtype))
    most = most_pages(config, context_of(config, model))
    wanted = config.num_pages or max(
        least_pages(config, model), min(most, config.kv_bytes // of_page if on_cpu else most)
    )
    encoder = model.encoder
    crops = 0
    if encoder is not None:
        crops = crop_bytes(model) * (1 if on_cpu else config.step_crops)
    return MemoryPlan(
        weight_bytes=held.weight_bytes,
        loading_bytes=LOADING_BYTES + int(LOADING_SHARE * held.weight_bytes),
        step_bytes=_step_bytes(config, model, held),
        picture_bytes=crops,
        feature_bytes=config.feature_bytes if encoder is not None else 0,
        page_bytes=of_page,
        least_pages=config.num_pages or least_pages(config, model),
        most_pages=wanted,
        others_bytes=GATEWAY_BYTES if on_cpu else 0,
        is_float=not any(kind in KINDS for kind in stored.matrices),
    )


def fit(
    config: WorkerConfig, device: Device, source: Source, dtype: torch.dtype, free: FreeMemory | None = None
) -> tuple[WorkerConfig, MemoryPlan, FreeMemory]:
    """The settings with as many pages and features as there is memory for, the plan, and what is free. `source` as it lies on
    disk. Raises ConfigError where the least does not fit, naming what does; CheckpointError as loading would.
    """
    free = free_on(device) if free is None else free
    plan = plan_memory(config, device, source, dtype, config.quantize)
    if free.is_known and plan.least_bytes > free.num_bytes:
        advice = ""
        if plan.is_float:
            advice = _narrower(config, device, source, dtype, free)
        raise ConfigError(_refusal(config, plan, free, advice))
    return settle(config, plan, free), plan, free


def _narrower(
    config: WorkerConfig, device: Device, source: Source, dtype: torch.dtype, free: FreeMemory
) -> str:
    """What `quantize` says to make it fit; empty where nothing does."""
    dtype = torch.float32 if device.torch_device.type == "cpu" else dtype
    if not reads_blocks(device.torch_device, dtype):
        return ""
    for made in ("int8", "int4"):
        plan = plan_memory(config, device, source, dtype, made)
        if plan.least_bytes <= free.num_bytes:
            return f"a safe value for quantize is {made}, which takes {gigabytes(plan.least_bytes)} at least"
    return ""


def _step_bytes(config: WorkerConfig, model: Model, held: Planned) -> int:
    with torch.inference_mode():
        dim = model.embed(torch.zeros(1, dtype=torch.int64, device=model.device)).shape[1]
    tokens = config.step_tokens + config.max_rows
    streams = tokens * (held.widest + _STREAM_WIDTHS * dim) * 4
    return streams + config.max_rows * model.card.vocab_size * _ROW_BYTES


def crop_bytes(model: Model) -> int:
    """Memory that the encoder takes for a crop."""
    encoder = model.encoder
    if encoder is None:
        return 0
    return ENCODER_WIDTHS * encoder.num_tokens * encoder.width * encoder.dtype.itemsize


def least_pages(config: WorkerConfig, model: Model) -> int:
    """So many that one short conversation, or one picture, has its place."""
    return -(-max(model.prefix_tokens, MIN_CONTEXT_TOKENS) // config.page_tokens) + 2


def most_pages(config: WorkerConfig, context_tokens: int) -> int:
    """So many that all rows have their whole context, four times: beyond, not even the prefix cache would use them."""
    return 4 * (config.max_rows * -(-context_tokens // config.page_tokens) + 1)


def context_of(config: WorkerConfig, model: Model) -> int:
    """The context that is asked for."""
    return min(config.context or model.card.context_tokens, model.card.context_tokens)


def kept_dtype(config: WorkerConfig, model: Model, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What pages of a blank model will hold on `device`: as `choose_kv_dtype` chooses, or the wider one where it refuses."""
    fastest, readable = model.page_dtypes(device)
    if config.kv_dtype == "auto":
        narrows = config.dtype == "auto" and device.type == "cpu" and torch.bfloat16 in readable
        return torch.bfloat16 if narrows else fastest
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.kv_dtype]


def free_on(device: Device) -> FreeMemory:
    """What the device, or on a CPU this machine, has left."""
    if device.torch_device.type == "cpu":
        return free_memory()
    return FreeMemory(device.free_bytes(), device.name)


def settle(config: WorkerConfig, plan: MemoryPlan, free: FreeMemory) -> WorkerConfig:
    """The settings with as many pages and features as fit into `free`, which the least does; the same object where all fits, or
    the system does not say what is free."""
    if not free.is_known or plan.total_bytes <= free.num_bytes:
        return config
    spare = free.num_bytes - plan.fixed_bytes
    least = plan.least_pages * plan.page_bytes
    features = max(0, min(plan.feature_bytes, spare // _FEATURE_SHARE, spare - least))
    kv_bytes = min(config.kv_bytes, max(least, spare - features))
    return config.model_copy(update={"kv_bytes": ByteSize(kv_bytes), "feature_bytes": ByteSize(features)})


def _refusal(config: WorkerConfig, plan: MemoryPlan, free: FreeMemory, advice: str) -> str:
    """Why the model does not fit, part by part, and what to do."""
    have = f"{gigabytes(free.num_bytes)} are free ({free.bound})"
    fixed = [part for part in plan.parts() if part.name not in ("weights", "pages", "features")]
    weights = f"weights {gigabytes(plan.weight_bytes)} and {gigabytes(plan.loading_bytes)} while they load"
    parts = ", ".join([weights, *(f"{part.name} {gigabytes(part.num_bytes)}" for part in fixed)])
    said = f"this model takes {gigabytes(plan.least_bytes)} at least, and {have}: {parts}"
    without = plan.least_bytes - plan.least_pages * plan.page_bytes
    if config.num_pages and without < free.num_bytes:
        safe, pages = (free.num_bytes - without) // plan.page_bytes, plan.least_pages * plan.page_bytes
        return f"num_pages is {config.num_pages}: {said}, pages {gigabytes(pages)}; a safe value is {safe}"
    else_to_do = "free memory, take a smaller model, or set check_memory to false to try it all the same"
    return f"model: {said}; {advice or else_to_do}"
