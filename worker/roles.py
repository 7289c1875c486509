"""Owns what a worker's roles differ by: what it announces, and the loop of one that only encodes. Decode thread.

The role `all` does everything itself. With `decode` a worker does so too, and takes pictures that come encoded beside.
With `encode` it has no pages, no rows and no requests: pictures in, features out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from shared.protocol import PROTOCOL_VERSION, FeatureFormat, Limits, ModelCard, Ready, schema_hash
from worker.config import WorkerConfig
from worker.loop.costs import Costs, Meter
from worker.loop.encoding import EncodeLoop, PictureEncoder
from worker.loop.inbox import Inbox, Outbox


def announcement(
    config: WorkerConfig,
    epoch: int,
    card: ModelCard,
    limits: Limits,
    device_name: str,
    phases_s: Mapping[str, float],
    features: FeatureFormat | None,
) -> Ready:
    """The answer to `Hello`."""
    version, schema = PROTOCOL_VERSION, schema_hash()
    return Ready(version, schema, epoch, card, limits, device_name, dict(phases_s), config.role, features)


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
