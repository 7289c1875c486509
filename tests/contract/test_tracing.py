"""Traces against a collector that speaks OTLP: off by default, under the caller's trace, and never what was said."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from gateway.caller import caller
from gateway.config import ConfigError
from shared.errors import ErrorCode, FinishReason
from tests.fake_worker import End, FakeWorker, Token
from tests.gateway_thread import GatewayThread
from tests.http_client import Opened, ask

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
CHAT = {"messages": [{"role": "user", "content": "what nobody may trace"}], "stop": "a secret stop"}


class Collector:
    """A collector's HTTP side; `spans` holds what was exported."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        collector = self

        class Receive(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                exported = ExportTraceServiceRequest.FromString(body)
                collector.bodies.append(body)
                collector.paths.append(self.path)
                for resource in exported.resource_spans:
                    for scope in resource.scope_spans:
                        collector.spans.extend(scope.spans)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Receive)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def values(span: Any) -> dict[str, Any]:
    """Its attributes as plain values."""

    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        if kind == "array_value":
            return [plain(item) for item in value.array_value.values]
        return getattr(value, kind)

    return {attribute.key: plain(attribute.value) for attribute in span.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


def test_one_span_a_sequence_under_the_callers_trace(worker: FakeWorker, collector: Collector) -> None:
    worker.reply("what was answered")
    with GatewayThread(workers=[worker.endpoint], otlp_endpoint=collector.endpoint) as gateway:
        gateway.wait_ready()
        headers = {"traceparent": PARENT, "x-request-id": "mine"}
        assert ask(gateway.url, "/v1/chat/completions", {**CHAT, "n": 2}, headers=headers).status == 200
        with Opened(gateway.url, "/v1/completions", {"prompt": "x", "stream": True}) as opened:
            assert list(opened.events())[-1] == "[DONE]"
    # The gateway's end exports what is left.
    assert set(collector.paths) == {"/v1/traces"} and len(collector.spans) == 3
    chats = [span for span in collector.spans if span.trace_id.hex() == TRACE]
    (other,) = (span for span in collector.spans if span.trace_id.hex() != TRACE)
    assert len(chats) == 2 and all(span.parent_span_id.hex() == SPAN for span in chats)
    assert not other.parent_span_id and values(other)["gen_ai.operation.name"] == "text_completion"
    said = values(chats[0])
    assert chats[0].name == "chat fake-vl" and chats[0].end_time_unix_nano > chats[0].start_time_unix_nano
    assert said["gen_ai.operation.name"] == "chat" and said["http.route"] == "/v1/chat/completions"
    assert said["gen_ai.request.model"] == said["gen_ai.response.model"] == "fake-vl"
    assert said["gen_ai.response.id"] == "mine-0" and said["gen_ai.response.finish_reasons"] == ["stop"]
    assert said["gen_ai.usage.output_tokens"] == len("what was answered")
    assert said["gen_ai.usage.input_tokens"] > 0 and said["gen_ai.latency.time_to_first_token"] > 0
    for word in (b"nobody may trace", b"answered", b"secret stop"):
        assert not any(word in body for body in collector.bodies)


def test_failures_are_errors_with_their_code(worker: FakeWorker, collector: Collector) -> None:
    worker.script = lambda _: [Token(75), End(FinishReason.ERROR, ErrorCode.NUMERICAL_ERROR, "NaN")]
    with GatewayThread(workers=[worker.endpoint], otlp_endpoint=collector.endpoint + "/v1/traces") as gateway:
        gateway.wait_ready()
        assert ask(gateway.url, "/v1/query", {"question": "x"}).status == 500
    (span,) = collector.spans
    assert (
        values(span)["error.type"] == "numerical_error" and span.status.code == span.status.STATUS_CODE_ERROR
    )
    assert values(span)["gen_ai.operation.name"] == "generate_content"


def test_a_caller_who_samples_out_is_respected(worker: FakeWorker, collector: Collector) -> None:
    with GatewayThread(workers=[worker.endpoint], otlp_endpoint=collector.endpoint) as gateway:
        gateway.wait_ready()
        headers = {"traceparent": PARENT[:-2] + "00"}
        assert ask(gateway.url, "/v1/chat/completions", CHAT, headers=headers).status == 200
    assert not collector.spans


def test_without_an_endpoint_there_is_no_tracing(gateway: GatewayThread) -> None:
    assert gateway.gateway.service._tracing is None
    assert ask(gateway.url, "/v1/chat/completions", CHAT, headers={"traceparent": PARENT}).status == 200


@pytest.mark.slow
def test_a_collector_that_is_away_delays_nobody_and_ends_in_time(worker: FakeWorker) -> None:
    with GatewayThread(workers=[worker.endpoint], otlp_endpoint="http://127.0.0.1:9") as gateway:
        gateway.wait_ready()
        for _ in range(3):
            assert ask(gateway.url, "/v1/chat/completions", CHAT).status == 200


@pytest.mark.parametrize("endpoint", ["collector:4318", "grpc://x:1", "", "http://"])
def test_an_endpoint_that_is_none_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        GatewayThread(otlp_endpoint=endpoint)


@pytest.mark.parametrize(
    ("given", "is_taken"),
    [
        (PARENT, True),
        (None, False),
        ("", False),
        (PARENT.upper(), False),
        (PARENT + "-x", False),
        ("ff" + PARENT[2:], False),
        (f"00-{'0' * 32}-{SPAN}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
    ],
)
def test_a_malformed_traceparent_counts_as_none(given: str | None, is_taken: bool) -> None:
    assert caller("/x", given) == ("/x", PARENT if is_taken else "", "")
