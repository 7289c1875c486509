"""Owns the content of `/metrics`: families of the gateway's figures and the workers' last beats. Gateway's loop."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from gateway.core.costs import model_costs
from gateway.core.metrics import HISTOGRAMS
from gateway.core.placement import Worker
from gateway.core.service import Service
from shared.histogram import Histogram
from shared.protocol import HISTOGRAM_BUCKETS_S

# The names that vLLM's dashboards ask for, and our histogram for each.
_VLLM_HISTOGRAMS: Final = {
    "vllm:time_to_first_token_seconds": "time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds": "inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds": "e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds": "request_queue_time_seconds",
    "vllm:request_prefill_time_seconds": "request_prefill_time_seconds",
    "vllm:request_decode_time_seconds": "request_decode_time_seconds",
}

_KEY_TOTALS: Final = {
    "requests": "Requests by key",
    "refused": "Requests beyond a key's limits",
    "prompt_tokens": "Tokens of prompts by key",
    "generated_tokens": "Tokens made by key",
}

_INFO: Final = ("model", "device", "epoch", "role")
_BOUNDS: Final = [*(str(bound) for bound in HISTOGRAM_BUCKETS_S), "+Inf"]


class Scrape(Collector):
    """Makes Prometheus objects of a service's figures, when asked."""

    def __init__(self, service: Service, num_detached: Callable[[], int] = lambda: 0) -> None:
        self._service = service
        self._num_detached = num_detached
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """See `Collector`."""
        return self.families()

    def describe(self) -> Iterable[Metric]:
        """See `Collector`: nothing is promised before the first scrape."""
        return []

    def render(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self._registry)

    def families(self) -> Iterator[Metric]:
        """Every family of a scrape."""
        metrics = self._service.metrics
        yield _counter("requests_accepted", "Requests that got a place", metrics.accepted, "model")
        yield _counter("requests_refused", "Requests refused for lack of a place", metrics.refused, "code")
        yield _counter("requests_ended", "Terminal events by reason", metrics.ended, "reason")
        yield _counter("request_errors", "Terminal events that were errors", metrics.errors, "code")
        yield _counter("encoder_pictures", "Pictures at encoders by outcome", metrics.pictures, "outcome")
        yield _counter("prefills", "Prompts long enough for a prefill worker", metrics.prefills, "choice")
        answers = CounterMetricFamily("degas_http_responses", "HTTP answers", labels=["route", "status"])
        for (route, status), number in metrics.http.items():
            answers.add_metric([route, str(status)], number)
        yield answers
        for name, value in (
            ("prompt_tokens", metrics.prompt_tokens),
            ("cached_prompt_tokens", metrics.cached_tokens),
            ("generation_tokens", metrics.generated_tokens),
            ("workers_lost", metrics.num_workers_lost),
            ("slow_clients", metrics.num_slow_clients),
            ("encoded_picture_bytes", metrics.feature_bytes),
        ):
            yield CounterMetricFamily(f"degas_{name}", name.replace("_", " "), value)
        for name, histogram in metrics.histograms.items():
            family = HistogramMetricFamily(f"degas_{name}", HISTOGRAMS[name])
            family.add_metric([], _buckets(histogram), histogram.total_s)
            yield family
        yield from self._service_families(self._service)
        yield from _key_families(self._service)
        yield from self._cost_families(self._service)
        if self._service.config.vllm_metrics:
            yield from self._vllm_families(self._service)

    def _service_families(self, service: Service) -> Iterator[Metric]:
        info = GaugeMetricFamily("degas_gateway_info", "1: which gateway answers", labels=["gateway", "pid"])
        info.add_metric([service.gateway_id, str(os.getpid())], 1)
        yield info
        yield GaugeMetricFamily("degas_requests_in_flight", "Accepted, not ended", service.num_in_flight)
        yield GaugeMetricFamily("degas_requests_recovering", "Waiting after a death", service.num_recovering)
        yield GaugeMetricFamily("degas_ready", "1 when new work is served", int(service.readiness()[0]))
        yield GaugeMetricFamily(
            "degas_streams_detached", "Resumable, under way, without a client", self._num_detached()
        )
        yield GaugeMetricFamily("degas_images_pending", "Being decoded", service.images.num_pending)
        labels = ["worker"]
        up = GaugeMetricFamily("degas_worker_up", "1 while its decode thread makes progress", labels=labels)
        anomalies = CounterMetricFamily(
            "degas_worker_anomalies", "Frames dropped, by kind", labels=[*labels, "kind"]
        )
        histograms: dict[str, HistogramMetricFamily] = {}
        values: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        info = GaugeMetricFamily(
            "degas_worker_info",
            "What it serves, on what, in which role; epoch: the number of its life",
            labels=[*labels, *_INFO],
        )
        for worker in service.workers:
            key = str(worker.key)
            if (ready := worker.link.ready) is not None:
                info.add_metric([key, ready.model.model_id, ready.device, str(ready.epoch), ready.role], 1)
            up.add_metric([key], int(worker.link.ready is not None))
            for anomaly, number in worker.link.anomalies.items():
                anomalies.add_metric([key, anomaly], number)
            for name, kind, value in _beat_values(worker):
                if name not in values:
                    values[name] = _worker_family(name, labelled=kind is not None)
                values[name].add_metric([key] if kind is None else [key, kind], value)
            beat = worker.link.beat
            for name, numbers in beat.histograms.items() if beat is not None else ():
                if not _is_name(name) or len(numbers) != len(HISTOGRAM_BUCKETS_S) + 2:
                    continue
                if name not in histograms:
                    histograms[name] = HistogramMetricFamily(
                        f"degas_worker_{name}_seconds", f"{name} of the worker", labels=labels
                    )
                histograms[name].add_metric([key], list(zip(_BOUNDS, numbers, strict=False)), numbers[-1])
        yield up
        yield info
        yield anomalies
        yield from values.values()
        yield from histograms.values()

    def _cost_families(self, service: Service) -> Iterator[Metric]:
        """Cost and energy, as far as workers have a price or a meter: what is not known has no sample."""
        per_unit = "Generated tokens for one unit of the workers' currency, since they started"
        models = model_costs(
            (model_id, worker.link) for worker in service.workers if (model_id := worker.model_id) is not None
        )
        tokens = GaugeMetricFamily("degas_model_tokens_per_currency", per_unit, labels=["model"])
        energy = GaugeMetricFamily(
            "degas_model_joules_per_token", "Energy of its devices for a generated token", labels=["model"]
        )
        for model, costs in models.items():
            for family, value in ((tokens, costs.tokens_per_currency), (energy, costs.joules_per_token)):
                if value is not None:
                    family.add_metric([model], value)
        yield tokens
        yield energy
        labels = ["model", "tenant"]
        prompts = CounterMetricFamily("degas_tenant_prompt_tokens", "Prompt tokens by tenant", labels=labels)
        generated = CounterMetricFamily("degas_tenant_generation_tokens", "Tokens by tenant", labels=labels)
        rows = CounterMetricFamily("degas_tenant_row_seconds", "Time its requests held a row", labels=labels)
        shares = GaugeMetricFamily("degas_tenant_tokens_per_currency", per_unit, labels=labels)
        tenant_names = service.access.tenant_names
        for (model, tenant), account in service.metrics.ledger.accounts.items():
            # A tenant of the file keeps its name when its last key is gone.
            names = [model, tenant_names.get(tenant, tenant)]
            prompts.add_metric(names, account.prompt_tokens)
            generated.add_metric(names, account.generated_tokens)
            rows.add_metric(names, account.row_s)
            share = models[model].tokens_per_currency_of(account) if model in models else None
            if share is not None:
                shares.add_metric(names, share)
        yield from (prompts, generated, rows, shares)

    def _vllm_families(self, service: Service) -> Iterator[Metric]:
        metrics = service.metrics
        served = next(iter(service.models()), None)
        model = served.card.model_id if served is not None else ""
        beats = [worker.link.beat for worker in service.workers if worker.link.beat is not None]
        total = sum(beat.total_pages for beat in beats)
        used = total - sum(beat.free_pages for beat in beats)
        running, waiting = sum(b.num_running for b in beats), sum(b.num_waiting for b in beats)
        for name, value in (
            ("num_requests_running", running),
            ("num_requests_waiting", waiting),
            ("kv_cache_usage_perc", used / total if total else 0.0),
        ):
            yield _labelled(GaugeMetricFamily(f"vllm:{name}", name, labels=["model_name"]), model, value)
        readies = [worker.link.ready for worker in service.workers if worker.link.ready is not None]
        limits = [ready.limits for ready in readies if ready.limits.num_pages]  # an encoder has none
        if limits:  # an inference gateway's endpoint picker takes the size of KV memory from these labels
            size = {"block_size": str(limits[0].page_tokens)}
            size["num_gpu_blocks"] = str(sum(one.num_pages for one in limits))
            config = GaugeMetricFamily("vllm:cache_config_info", "KV memory", labels=list(size))
            config.add_metric(list(size.values()), 1)
            yield config
        for name in ("prefix_cache_queries", "prefix_cache_hits"):
            value = sum(beat.metrics.get(f"{name}_total", 0.0) for beat in beats)
            yield _labelled(CounterMetricFamily(f"vllm:{name}", name, labels=["model_name"]), model, value)
        for name, value in (
            ("prompt_tokens", metrics.prompt_tokens),
            ("generation_tokens", metrics.generated_tokens),
        ):
            yield _labelled(CounterMetricFamily(f"vllm:{name}", name, labels=["model_name"]), model, value)
        success = CounterMetricFamily(
            "vllm:request_success", "Finished requests", labels=["model_name", "finished_reason"]
        )
        for reason, number in metrics.ended.items():
            success.add_metric([model, reason], number)
        yield success
        for name, ours in _VLLM_HISTOGRAMS.items():
            histogram = metrics.histograms[ours]
            family = HistogramMetricFamily(name, HISTOGRAMS[ours], labels=["model_name"])
            family.add_metric([model], _buckets(histogram), histogram.total_s)
            yield family


def _key_families(service: Service) -> Iterator[Metric]:
    """What each key of the file that was used has used, by its name; never anything of the key itself."""
    used = [meter for meter in service.meters.all() if meter.totals.requests or meter.totals.refused]
    if not used:
        return
    for name, help in _KEY_TOTALS.items():
        family = CounterMetricFamily(f"degas_key_{name}", help, labels=["key", "tenant"])
        for meter in used:
            family.add_metric([meter.entry.name, meter.entry.owner], getattr(meter.totals, name))
        yield family
    streams = GaugeMetricFamily("degas_key_streams", "Answers in the making", labels=["key", "tenant"])
    for meter in used:
        streams.add_metric([meter.entry.name, meter.entry.owner], meter.num_streams)
    yield streams


def _beat_values(worker: Worker) -> Iterator[tuple[str, str | None, float]]:
    """A beat's figures as (name, kind or None, value); a worker writes labelled ones as `name|kind`."""
    beat = worker.link.beat
    if beat is None:
        return
    fixed = ("step", "num_running", "num_waiting", "free_pages", "total_pages", "drain_rate")
    for name in fixed:
        yield name, None, getattr(beat, name)
    seen: dict[str, bool] = {}
    for full, value in beat.metrics.items():
        name, bar, kind = full.partition("|")
        if name not in fixed and _is_name(name) and seen.setdefault(name, bool(bar)) == bool(bar):
            yield name, kind if bar else None, value


def _worker_family(name: str, *, labelled: bool) -> CounterMetricFamily | GaugeMetricFamily:
    labels = ["worker", "kind"] if labelled else ["worker"]
    family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    return family(f"degas_worker_{name}", f"{name} of the worker", labels=labels)


def _is_name(name: str) -> bool:
    """Whether a worker's name for a figure is a Prometheus name; other names are left out, so that the scrape succeeds."""
    return name.isascii() and name.replace("_", "a").isalnum() and not name[0].isdigit()


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """A histogram's buckets in Prometheus' form."""
    return list(zip(_BOUNDS, histogram.cumulative(), strict=True))


def _counter(name: str, help: str, counts: Counter[str], label: str) -> Metric:
    family = CounterMetricFamily(f"degas_{name}", help, labels=[label])
    for key, number in counts.items():
        family.add_metric([key], number)
    return family


def _labelled(
    family: GaugeMetricFamily | CounterMetricFamily, model: str, value: float
) -> GaugeMetricFamily | CounterMetricFamily:
    family.add_metric([model], value)
    return family
