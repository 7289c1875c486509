"""Owns OpenTelemetry traces: one span a generated sequence, under the caller's own. Gateway's loop; off by default.

Finished spans go to a bounded queue that a thread of the OpenTelemetry SDK empties, so no request ever waits for
a collector. Names are those of the `gen_ai` conventions, and vLLM's for times that the conventions do not name. Spans
hold ids, counts and codes: no prompt, no output, no stop string, no tenant.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import structlog

from gateway.caller import CALLER
from gateway.config import ConfigError

if TYPE_CHECKING:
    from gateway.core.flights import Flight
    from gateway.generation import End

EXPORT_TIMEOUT_S: Final = 2.0
_PATH: Final = "/v1/traces"
_OPERATIONS: Final = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
}
_OTHER_OPERATION: Final = "generate_content"

log = structlog.get_logger(__name__)


class Tracing:
    """The spans of every flight under way. Raises `ConfigError` where the libraries are not installed."""

    def __init__(self, endpoint: str, service_id: str) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ModuleNotFoundError as error:
            message = f"otlp_endpoint is set, but OpenTelemetry is not installed (pip install 'degas-serve[tracing]'): {error}"
            raise ConfigError(message) from None
        url = endpoint if endpoint.endswith(_PATH) else endpoint.rstrip("/") + _PATH
        resource = Resource.create({"service.name": "degas", "service.instance.id": service_id})
        self._provider: Any = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=EXPORT_TIMEOUT_S))
        )
        self._tracer: Any = self._provider.get_tracer("degas.gateway")
        self._extract: Any = TraceContextTextMapPropagator().extract
        self._api = trace
        self._spans: dict[Flight, Any] = {}

    def begin(self, flight: Flight) -> None:
        """A request was accepted."""
        request, sampling, came = flight.request, flight.request.sampling, CALLER.get()
        operation = _OPERATIONS.get(came.route, _OTHER_OPERATION)
        attributes: dict[str, str | int | float] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "degas",
            "gen_ai.request.model": request.model_id,
            "gen_ai.request.max_tokens": request.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
            "gen_ai.request.presence_penalty": sampling.presence_penalty,
            "gen_ai.response.id": request.request_id,
            "degas.task": request.task,
            "degas.num_images": len(request.images),
        }
        if came.route:
            attributes["http.route"] = came.route
        parent = self._extract({"traceparent": came.trace_parent}) if came.trace_parent else None
        self._spans[flight] = self._tracer.start_span(
            f"{operation} {request.model_id}",
            context=parent,
            kind=self._api.SpanKind.SERVER,
            attributes=attributes,
        )

    def end(self, flight: Flight, end: End, elapsed_s: float) -> None:
        """A request has its terminal event."""
        span = self._spans.pop(flight, None)
        if span is None:
            return
        usage = end.usage
        span.set_attributes(
            {
                "gen_ai.response.model": flight.request.model_id,
                "gen_ai.response.finish_reasons": (end.reason.value,),
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
                "gen_ai.latency.time_to_first_token": usage.time_to_first_token_s,
                "gen_ai.latency.time_in_queue": usage.queue_s,
                "gen_ai.latency.time_in_model_prefill": usage.prefill_s,
                "gen_ai.latency.time_in_model_decode": usage.decode_s,
                "gen_ai.latency.e2e": elapsed_s,
            }
        )
        if end.error is not None:
            span.set_attribute("error.type", end.error.code.value)
            span.set_status(self._api.StatusCode.ERROR)
        span.end()

    def stop(self) -> None:
        """Export what is left, within the export's own time limit. Blocks; idempotent."""
        started_s = time.monotonic()
        self._provider.shutdown()
        log.debug("traces_flushed", elapsed_s=round(time.monotonic() - started_s, 3))
