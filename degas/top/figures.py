"""Owns what two readings of a server mean: rates, times a step, shares. Pure: readings in, figures out.

Rates of a worker are over its own clock (`loop_seconds_total`), because a beat is older than the scrape that shows
it. Where a counter fell, its process is a new one, and what it counts is since its start.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from degas.top.scrape import Labels, Scrape

_W: Final = "degas_worker_"


@dataclass(frozen=True, slots=True)
class GatewayFigures:
    """One gateway. Rates are a second, over the time between the readings."""

    url: str
    state: str  # ready | not ready | why there are no figures
    is_there: bool
    streams: int = 0
    recovering: int = 0
    pictures_pending: int = 0
    requests_per_s: float | None = None
    refused_per_s: float | None = None
    errors_per_s: float | None = None
    tokens_per_s: float | None = None
    ttft_p50_ms: float | None = None  # interpolated in the histogram's buckets; None: no request meanwhile
    ttft_p99_ms: float | None = None
    gap_p50_ms: float | None = None
    workers_up: int = 0
    workers: int = 0
    workers_lost: int = 0


@dataclass(frozen=True, slots=True)
class WorkerFigures:
    """One worker as one gateway sees it. Times are means a step."""

    gateway: str
    worker: str
    is_up: bool
    epoch: str = ""
    model: str = ""
    device: str = ""
    running: int = 0
    waiting: int = 0
    tokens_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    steps_per_s: float | None = None
    rows_per_step: float | None = None
    step_ms: float | None = None  # the device's time
    host_ms: float | None = None  # the decode thread's own
    bubble_share: float | None = None  # of the device's time with work at hand
    pages_used: int = 0
    pages: int = 0
    prefix_hit_share: float | None = None  # of the prompt tokens that were looked up
    preemptions: int = 0
    watts: float | None = None


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """One model over every worker that serves it, since those began. None: no price, or no meter."""

    model: str
    about: str = ""
    tokens_per_currency: float | None = None
    joules_per_token: float | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything that one view shows."""

    over_s: float | None  # what rates are over; None: since each process' start
    gateways: list[GatewayFigures] = field(default_factory=list)
    workers: list[WorkerFigures] = field(default_factory=list)
    models: list[ModelFigures] = field(default_factory=list)
    tenants: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is not known is null."""
        return asdict(self)


def figures(now: Iterable[Scrape], before: Mapping[str, Scrape]) -> Figures:
    """The figures of the latest readings, with the ones before them by address. A worker that several gateways see is
    listed once, by the number of its life."""
    gateways: list[GatewayFigures] = []
    workers: dict[str, WorkerFigures] = {}
    models: dict[str, ModelFigures] = {}
    tenants: list[dict[str, Any]] = []
    spans: list[float] = []
    for scrape in now:
        earlier = before.get(scrape.url)
        if earlier is not None and (earlier.error or scrape.error or earlier.at_s >= scrape.at_s):
            earlier = None
        if earlier is not None:
            spans.append(scrape.at_s - earlier.at_s)
        gateways.append(_gateway(scrape, earlier))
        if scrape.error:
            continue
        for labels, _ in scrape.samples.get(_W + "up", ()):
            one = _worker(scrape, earlier, labels.get("worker", ""))
            workers.setdefault(one.epoch or f"{one.gateway} {one.worker}", one)
        for found in _models(scrape):
            models.setdefault(found.model, found)
        tenants += _tenants(scrape)
    over_s = sum(spans) / len(spans) if spans else None
    return Figures(over_s, gateways, list(workers.values()), list(models.values()), tenants)


def quantile_ms(buckets: Mapping[float, float], share: float) -> float | None:
    """A quantile of cumulative bucket counts by upper bound in seconds, interpolated as Prometheus does."""
    bounds = sorted(buckets)
    total = buckets[bounds[-1]] if bounds else 0.0
    if total <= 0:
        return None
    rank, low_s, below = share * total, 0.0, 0.0
    for bound_s in bounds:
        count = buckets[bound_s]
        if count >= rank:
            if math.isinf(bound_s):
                return low_s * 1e3
            part = (rank - below) / (count - below) if count > below else 1.0
            return (low_s + part * (bound_s - low_s)) * 1e3
        low_s, below = bound_s, count
    return None


def _gateway(now: Scrape, before: Scrape | None) -> GatewayFigures:
    if now.error:
        return GatewayFigures(now.url, now.error, is_there=False)
    up = [value for _, value in now.samples.get(_W + "up", ())]
    span_s = now.at_s - before.at_s if before is not None else None

    def rate(name: str) -> float | None:
        return None if span_s is None else (_grown(now, before, name) or 0.0) / span_s

    return GatewayFigures(
        now.url,
        "ready" if now.total("degas_ready") else "not ready",
        is_there=True,
        streams=int(now.total("degas_requests_in_flight") or 0),
        recovering=int(now.total("degas_requests_recovering") or 0),
        pictures_pending=int(now.total("degas_images_pending") or 0),
        requests_per_s=rate("degas_requests_accepted_total"),
        refused_per_s=rate("degas_requests_refused_total"),
        errors_per_s=rate("degas_request_errors_total"),
        # Every token but a stream's first ends a gap; the counter of tokens moves only when an answer ends.
        tokens_per_s=_sum(
            rate("degas_inter_token_latency_seconds_count"), rate("degas_time_to_first_token_seconds_count")
        ),
        ttft_p50_ms=quantile_ms(_buckets(now, before, "degas_time_to_first_token_seconds"), 0.5),
        ttft_p99_ms=quantile_ms(_buckets(now, before, "degas_time_to_first_token_seconds"), 0.99),
        gap_p50_ms=quantile_ms(_buckets(now, before, "degas_inter_token_latency_seconds"), 0.5),
        workers_up=sum(value > 0 for value in up),
        workers=len(up),
        workers_lost=int(now.total("degas_workers_lost_total") or 0),
    )


def _worker(now: Scrape, before: Scrape | None, key: str) -> WorkerFigures:
    info = _info(now, key)
    if before is not None and _info(before, key).get("epoch") != info.get("epoch"):
        before = None  # another process

    def gauge(name: str) -> int:
        return int(now.total(_W + name, worker=key) or 0)

    def grown(name: str) -> float | None:
        return _grown(now, before, f"{_W}{name}_total", worker=key)

    def per(name: str, other: str, factor: float = 1.0) -> float | None:
        top, bottom = grown(name), grown(other)
        return factor * top / bottom if top is not None and bottom else None

    busy_s, bubble_s = grown("device_busy_seconds") or 0.0, grown("bubble_seconds") or 0.0
    free, pages = gauge("free_pages"), gauge("total_pages")
    return WorkerFigures(
        now.url,
        key,
        is_up=bool(now.total(_W + "up", worker=key)),
        epoch=info.get("epoch", ""),
        model=info.get("model", ""),
        device=info.get("device", ""),
        running=gauge("num_running"),
        waiting=gauge("num_waiting"),
        tokens_per_s=per("generation_tokens", "loop_seconds"),
        prompt_tokens_per_s=per("prefill_tokens", "loop_seconds"),
        steps_per_s=per("steps", "loop_seconds"),
        rows_per_step=per("step_rows", "steps"),
        step_ms=per("device_busy_seconds", "steps", 1e3),
        host_ms=per("host_seconds", "steps", 1e3),
        bubble_share=bubble_s / (busy_s + bubble_s) if busy_s + bubble_s > 0 else None,
        pages_used=pages - free,
        pages=pages,
        prefix_hit_share=per("prefix_cache_hits", "prefix_cache_queries"),
        preemptions=gauge("preemptions_total"),
        watts=per("energy_joules", "loop_seconds"),
    )


def _models(now: Scrape) -> list[ModelFigures]:
    served = [str(one.get("id", "")) for one in now.models]
    priced = [labels.get("model", "") for labels, _ in now.samples.get("degas_model_tokens_per_currency", ())]
    metered = [labels.get("model", "") for labels, _ in now.samples.get("degas_model_joules_per_token", ())]
    about = {str(one.get("id", "")): _about(one) for one in now.models}
    return [
        ModelFigures(
            name,
            about.get(name, ""),
            now.total("degas_model_tokens_per_currency", model=name),
            now.total("degas_model_joules_per_token", model=name),
        )
        for name in dict.fromkeys([*served, *priced, *metered])
        if name
    ]


def _about(model: Mapping[str, Any]) -> str:
    takes = "pictures and texts" if model.get("takes_images") else "texts"
    return f"{model.get('family', '')}, {model.get('context_tokens', '?')} tokens of context, {takes}"


def _tenants(now: Scrape) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for labels, tokens in now.samples.get("degas_tenant_generation_tokens_total", ()):
        name, model = labels.get("tenant", ""), labels.get("model", "")
        per = now.total("degas_tenant_tokens_per_currency", tenant=name, model=model)
        one = {"gateway": now.url, "tenant": name, "model": model, "tokens": int(tokens)}
        found.append({**one, "tokens_per_currency": per})
    return found


def _info(scrape: Scrape, key: str) -> Labels:
    for labels, _ in scrape.samples.get(_W + "info", ()):
        if labels.get("worker") == key:
            return labels
    return {}


def _grown(now: Scrape, before: Scrape | None, name: str, **labels: str) -> float | None:
    """What a counter grew by; since its start where there is no earlier reading, or the counter fell meanwhile."""
    value = now.total(name, **labels)
    earlier = before.total(name, **labels) if before is not None else None
    if value is None or earlier is None or earlier > value:
        return value
    return value - earlier


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def _buckets(now: Scrape, before: Scrape | None, name: str) -> dict[float, float]:
    counts: dict[float, float] = {}
    for sign, scrape in ((1.0, now), (-1.0, before)):
        for labels, value in scrape.samples.get(f"{name}_bucket", ()) if scrape is not None else ():
            bound = float(labels["le"])
            counts[bound] = counts.get(bound, 0.0) + sign * value
    if any(value < 0 for value in counts.values()):
        return _buckets(now, None, name)
    return counts
