"""Owns what a worker's roles differ by: what it announces, the loop of one that only encodes, and pages for others. Decode thread.

The role `all` does everything itself. With `decode` a worker does so too, and takes pictures that come encoded beside, and pages
of prompts that others compute. With `encode` it has no pages, no rows and no requests: pictures in, features out. With `prefill`
it has all that, and no requests: prompts in, pages out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shared.protocol import (
    MAX_PAYLOAD_BYTES,
    PROTOCOL_VERSION,
    FeatureFormat,
    Limits,
    ModelCard,
    PageFormat,
    Ready,
    schema_hash,
)
from worker.config import ConfigError, WorkerConfig
from worker.loop.costs import Costs, Meter
from worker.loop.encoding import EncodeLoop, PictureEncoder
from worker.loop.inbox import Inbox, Outbox, Prefills
from worker.loop.page_export import PageExport
from worker.loop.page_intake import PageIntake
from worker.schedule.scheduler import Scheduler
from worker.step.contract import PageStore


def announcement(
    config: WorkerConfig,
    epoch: int,
    card: ModelCard,
    limits: Limits,
    device_name: str,
    phases_s: Mapping[str, float],
    features: FeatureFormat | None,
    pages: PageFormat | None = None,
) -> Ready:
    """The answer to `Hello`."""
    version, schema = PROTOCOL_VERSION, schema_hash()
    return Ready(
        version, schema, epoch, card, limits, device_name, dict(phases_s), config.role, features, pages
    )


def how_read(config: WorkerConfig, dtype: object) -> tuple[str, ...]:
    """What else than its files decides which pages a model computes, for `worker.formats.fingerprint`; `dtype` of activations."""
    return str(config.quantize), str(dtype), str(config.context), config.activations


@dataclass(frozen=True, slots=True)
class PageRole:
    """What a worker does with pages for others, or of others; mostly nothing."""

    intake: PageIntake | None = None
    export: PageExport | None = None
    format: PageFormat | None = None


def page_role(
    config: WorkerConfig,
    store: PageStore,
    scheduler: Scheduler,
    *,
    outbox: Outbox,
    epoch: int,
    prefills: Prefills | None,
) -> PageRole:
    """`prefills`: where pages are asked for; None: nowhere. Raises `ConfigError` for pages that no message holds."""
    fits = store.format.page_bytes <= MAX_PAYLOAD_BYTES
    if config.role == "prefill" and not fits:
        raise ConfigError(
            f"role is prefill, and a page of {config.page_tokens} tokens has {store.format.page_bytes >> 20} MiB, more than the "
            f"{MAX_PAYLOAD_BYTES >> 20} that travel at once; a safe value for page_tokens is 16"
        )
    if config.role == "prefill":
        return PageRole(export=PageExport(outbox, store, epoch), format=store.format)
    if config.role != "decode" or scheduler.cache is None or prefills is None or not fits:
        return PageRole()
    intake = PageIntake(
        prefills,
        store,
        scheduler,
        scheduler.cache,
        time.perf_counter,
        wait_s=config.prefill_wait_s,
        max_bytes=int(config.prefill_bytes),
    )
    return PageRole(intake=intake, format=store.format)


def encode_limits(config: WorkerConfig) -> Limits:
    """Of a worker with the role `encode`: one picture at a time, so many waiting, and no sequences."""
    timeout_s, feature_bytes = config.progress_timeout_s, int(config.feature_bytes)
    return Limits(1, config.max_waiting, 0, 0, 0, 0, timeout_s, feature_bytes)


def encode_loop(
    config: WorkerConfig,
    encoder: PictureEncoder,
    card: ModelCard,
    *,
    inbox: Inbox,
    outbox: Outbox,
    epoch: int,
    on_beat: Callable[[int, float], None] | None,
    meter: Meter | None,
) -> EncodeLoop:
    """The loop of such a worker."""
    return EncodeLoop(
        encoder,
        card,
        inbox=inbox,
        outbox=outbox,
        clock=time.perf_counter,
        epoch=epoch,
        max_jobs=config.max_waiting + 1,
        on_beat=on_beat,
        costs=Costs(config.price_per_hour, meter),
    )
