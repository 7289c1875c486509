"""The edge of the gateway: hosts, keys, origins, hostile bodies, clients that do not read, and the end."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from typing import Any

import pytest

from shared.errors import ErrorCode
from tests.fake_worker import LIMITS, End, FakeWorker, Token, Wait, text_ids
from tests.gateway_thread import GatewayThread
from tests.http_client import Opened, ask, raw
from tests.keys import KEY, OTHER_KEY, WRONG_KEY

CHAT = "/v1/chat/completions"


def chat(text: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


# ---------------------------------------------------------------- hosts


@pytest.mark.parametrize(
    "host",
    [b"evil.example", b"evil.example:80", b"a b", b"a/b", b"[::1", b"127.0.0.1:99999", b"", b"127.0.0.1@x"],
)
def test_a_foreign_or_malformed_host_is_a_400(gateway: GatewayThread, host: bytes) -> None:
    answer = raw(gateway.url, b"GET /healthz HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("host", [b"localhost", b"LOCALHOST:1", b"127.0.0.1:80", b"[::1]:8080"])
def test_loopback_names_are_hosts(gateway: GatewayThread, host: bytes) -> None:
    answer = raw(gateway.url, b"GET /healthz HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")


def test_no_host_at_all_is_a_400(gateway: GatewayThread) -> None:
    answer = raw(gateway.url, b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert answer.split(b" ", 2)[1] == b"400"


# ---------------------------------------------------------------- keys


@pytest.fixture
def locked(worker: FakeWorker) -> Iterator[GatewayThread]:
    with GatewayThread(workers=[worker.endpoint], api_keys=f"{OTHER_KEY},{KEY}") as gateway:
        gateway.wait_ready()
        yield gateway


def test_every_route_but_liveness_needs_a_key(locked: GatewayThread) -> None:
    assert locked.gateway._runner is not None
    routes = list(locked.gateway._runner.app.router.routes())
    assert len(routes) > 15
    for route in routes:
        path = (route.resource.canonical if route.resource else "/").replace("{model_id}", "x")
        method = "GET" if route.method == "*" else route.method
        answer = ask(locked.url, path, {} if method == "POST" else None, method=method)
        if path in ("/healthz", "/health"):
            assert answer.status == 200
        else:
            assert answer.status == 401, f"{method} {path} answered {answer.status}"
    assert ask(locked.url, "/nothing/here").status == 401


def test_keys_open_by_either_header(locked: GatewayThread, worker: FakeWorker) -> None:
    for headers in (
        {"Authorization": f"Bearer {KEY}"},
        {"X-Moondream-Auth": KEY},
        {"authorization": f"bearer {KEY}"},
    ):
        assert ask(locked.url, CHAT, chat(), headers=headers).status == 200
    assert len({submit.tenant for submit in worker.submits}) == 1 and worker.submits[0].tenant
    ask(locked.url, CHAT, chat(), headers={"X-Moondream-Auth": OTHER_KEY})
    assert worker.submits[-1].tenant != worker.submits[0].tenant


@pytest.mark.parametrize("key", ["", WRONG_KEY, KEY + "x", KEY[:-1], "ü"])
def test_a_wrong_key_is_a_401_without_a_hint(locked: GatewayThread, key: str) -> None:
    header = f"Bearer {key}".encode()
    answer = raw(
        locked.url,
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: "
        + header
        + b"\r\n\r\n",
    )
    assert answer.startswith(b"HTTP/1.1 401") and KEY.encode() not in answer


def test_named_routes_may_be_public(worker: FakeWorker) -> None:
    with GatewayThread(workers=[worker.endpoint], api_keys=KEY, public="readiness,metrics") as gateway:
        gateway.wait_ready()
        assert ask(gateway.url, "/readyz").status == ask(gateway.url, "/metrics").status == 200
        assert ask(gateway.url, "/v1/models").status == 401


# ---------------------------------------------------------------- origins and headers


def test_cors_is_off_by_default(gateway: GatewayThread) -> None:
    answer = ask(gateway.url, "/v1/models", headers={"Origin": "https://a.example"})
    assert answer.status == 200 and "access-control-allow-origin" not in answer.headers
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert ask(gateway.url, CHAT, method="OPTIONS", headers=asked).status == 403


def test_cors_for_configured_origins(worker: FakeWorker) -> None:
    with GatewayThread(workers=[worker.endpoint], api_keys=KEY, cors_origins="https://a.example") as gateway:
        gateway.wait_ready()
        asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        preflight = ask(gateway.url, CHAT, method="OPTIONS", headers=asked)
        assert preflight.status == 204
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        headers = {"Origin": "https://a.example", "Authorization": f"Bearer {KEY}"}
        with Opened(gateway.url, CHAT, chat(stream=True), headers=headers) as opened:
            assert opened.response.getheader("access-control-allow-origin") == "https://a.example"
            assert "x-request-id" in (opened.response.getheader("access-control-expose-headers") or "")
        other = ask(gateway.url, "/v1/models", headers={**headers, "Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    "origin", ["app://obsidian.md", "tauri://localhost", "null", "https://a.b.example.com"]
)
def test_a_configured_origin_may_reach_into_a_private_network(worker: FakeWorker, origin: str) -> None:
    configured = "app://obsidian.md,tauri://localhost,null,https://*.example.com"
    private = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Private-Network": "true"}
    with GatewayThread(workers=[worker.endpoint], cors_origins=configured) as gateway:
        answer = ask(gateway.url, CHAT, method="OPTIONS", headers={"Origin": origin, **private})
        assert answer.status == 204 and answer.headers["access-control-allow-origin"] == origin
        assert answer.headers["access-control-allow-private-network"] == "true"
        del private["Access-Control-Request-Private-Network"]
        answer = ask(gateway.url, CHAT, method="OPTIONS", headers={"Origin": origin, **private})
        assert "access-control-allow-private-network" not in answer.headers
        other = {"Origin": "https://b.example", "Access-Control-Request-Private-Network": "true", **private}
        assert ask(gateway.url, CHAT, method="OPTIONS", headers=other).status == 403


def test_openais_own_client_in_a_browser_may_send_its_headers(worker: FakeWorker) -> None:
    """The headers Chromium asks about for `openai` in JavaScript, and the rule it judges the answer by."""
    wanted = (
        "authorization,content-type,openai-organization,openai-project,x-stainless-arch,x-stainless-lang,"
        "x-stainless-os,x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,"
        "x-stainless-runtime-version,x-stainless-timeout"
    )
    asked = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": wanted,
    }
    with GatewayThread(workers=[worker.endpoint], api_keys=KEY, cors_origins="https://a.example") as gateway:
        answer = ask(gateway.url, CHAT, method="OPTIONS", headers=asked)
    allowed = {name.strip() for name in answer.headers["access-control-allow-headers"].split(",")}
    refused = set(wanted.split(",")) - allowed
    assert not refused or ("*" in allowed and "authorization" not in refused)


def test_a_request_id_that_is_none_is_replaced(gateway: GatewayThread) -> None:
    answer = ask(gateway.url, "/healthz", headers={"x-request-id": "a b<script>"})
    assert answer.headers["x-request-id"].isalnum()


# ---------------------------------------------------------------- hostile bodies

NUMBERS = [
    "max_tokens",
    "n",
    "seed",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "top_logprobs",
    "min_tokens",
    "max_completion_tokens",
    "priority",
]
VALUES = ["-1", "0", "2147483648", "9223372036854775808", "1e400", "NaN", '"1"', "true", "null", "[]", "1.5"]


def test_every_number_field_with_every_odd_value_is_answered_well(
    gateway: GatewayThread, worker: FakeWorker
) -> None:
    worker.reply("ok")
    for field in NUMBERS:
        for value in VALUES:
            body = json.dumps(chat())[:-1] + f', "logprobs": true, "{field}": {value}}}'
            answer = ask(gateway.url, CHAT, body.encode())
            assert answer.status in (200, 400), (field, value, answer.body)
            if value in ("NaN", "1e400", '"1"', "true", "[]", "9223372036854775808"):
                assert answer.status == 400, (field, value)
            if answer.status == 400 and value not in ("NaN", "1e400"):
                assert answer.error["param"] == field and field in answer.error["message"]
            if value == "null":
                assert answer.status == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b"\xff\xfe", None),
        (b'{"messages": []}', "messages"),
        (b'{"messages": [{"role": "user"}]}', "messages[0].content"),
        (b'{"messages": [{"role": "king", "content": "x"}]}', "messages[0].role"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "messages"),
        (b'{"messages": [{"role": "user", "content": [{"type": "film"}]}]}', "messages[0].content[0].type"),
        (b'{"messages": [{"role": "user", "content": [{"type": "video"}]}]}', "messages[0].content[0]"),
        (b'{"messages": [{"role": "user", "content": "x"}], "colour": 1}', "colour"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}', "tools[0]"),
        (b'{"messages": [{"role": "user", "content": "x"}], "stop": ["a", ""]}', "stop"),
        (b'{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"x": 1}}', "logit_bias"),
        (b'{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"99999": 1}}', "logit_bias"),
        (b'{"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}', "top_logprobs"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 99}', "n"),
        (b'{"messages": [{"role": "user", "content": "x"}], "min_tokens": 9, "max_tokens": 2}', "min_tokens"),
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    ],
)
def test_wrong_bodies_name_the_field(gateway: GatewayThread, body: bytes, param: str | None) -> None:
    answer = ask(gateway.url, CHAT, body)
    assert answer.status == 400, answer.body
    assert answer.error["type"] == "invalid_request_error"
    if param is not None:
        assert answer.error["param"] == param, answer.error


def test_deep_schemas_are_refused(gateway: GatewayThread) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(64):
        schema = {"type": "object", "properties": {"a": schema}}
    body = chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    answer = ask(gateway.url, CHAT, body)
    assert answer.status == 400 and "nested" in answer.error["message"]


def test_a_huge_chunked_body_is_refused_long_before_its_end(worker: FakeWorker) -> None:
    with GatewayThread(workers=[worker.endpoint], max_body_bytes=32 << 20) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        chunk = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
        sent = 0
        answer = b""
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(
                b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            try:
                for _ in range(1024):
                    connection.sendall(chunk)
                    sent += len(chunk)
            except OSError:
                pass
            try:
                answer = connection.recv(65536)
            except OSError:
                pass
        assert (
            sent < 600 << 20
        )  # of 1 GB: how much is under way when the refusal arrives is the sockets' affair
        assert not answer or answer.startswith(b"HTTP/1.1 413")


def test_a_declared_length_beyond_the_limit_is_refused_unread(gateway: GatewayThread) -> None:
    head = (
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1073741824\r\n\r\n"
    )
    started_s = time.monotonic()
    answer = raw(gateway.url, head)
    assert answer.startswith(b"HTTP/1.1 413") and b"payload_too_large" in answer
    assert time.monotonic() - started_s < 1


def test_compressed_bodies_are_refused(gateway: GatewayThread) -> None:
    bomb = gzip.compress(b" " * (10 << 20))
    answer = ask(gateway.url, CHAT, bomb, headers={"Content-Encoding": "gzip"})
    assert answer.status == 400 and "Content-Encoding" in answer.error["message"]


def test_other_content_types_are_refused(gateway: GatewayThread) -> None:
    for kind in ("application/x-www-form-urlencoded", "text/plain", "application/octet-stream", ""):
        answer = ask(gateway.url, CHAT, json.dumps(chat()).encode(), headers={"Content-Type": kind})
        assert answer.status == 400 and "application/json" in answer.error["message"]


def test_the_page_has_a_strict_policy(gateway: GatewayThread) -> None:
    answer = ask(gateway.url, "/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert f"ws://{gateway.url.removeprefix('http://')} " in policy


@pytest.mark.slow
def test_slow_headers_and_slow_bodies_have_deadlines(worker: FakeWorker) -> None:
    with GatewayThread(workers=[worker.endpoint], idle_timeout_s=0.3, body_timeout_s=0.3) as gateway:
        assert raw(gateway.url, b"GET /healthz HTTP/1.1\r\nHost: local") == b""
        head = (
            b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        )
        answer = raw(gateway.url, head + b"Content-Length: 100\r\n\r\n{")
        assert answer.startswith(b"HTTP/1.1 408")


def test_unknown_paths_and_methods_answer_in_the_same_shape(gateway: GatewayThread) -> None:
    missing = ask(gateway.url, "/v1/nothing")
    assert (missing.status, missing.error["code"]) == (404, "not_found")
    method = ask(gateway.url, CHAT)
    assert method.status == 405 and "POST" in method.headers["allow"]
    for path in ("/../pyproject.toml", "/%2e%2e/config.py", "/..%2f..%2fetc/passwd"):
        assert ask(gateway.url, path).status == 404


# ---------------------------------------------------------------- queue, slow clients, disconnects


def test_a_full_queue_says_when_to_come_back(worker: FakeWorker) -> None:
    with GatewayThread(workers=[worker.endpoint], max_queue=1) as gateway:
        gateway.wait_ready()
        worker.drain_rate = 0.25
        worker.script = lambda _: [Token(75), Wait(60)]
        opened = [Opened(gateway.url, CHAT, chat(stream=True)) for _ in range(LIMITS.max_rows + 1)]
        occupancy = gateway.gateway.service.workers[0].occupancy
        gateway.wait_for(lambda: occupancy.drain_rate > 0)
        started_s = time.monotonic()
        answer = ask(gateway.url, CHAT, chat())
        assert time.monotonic() - started_s < 1
        assert (answer.status, answer.error["code"]) == (429, ErrorCode.QUEUE_FULL)
        assert answer.headers["retry-after"] == "4"
        for one in opened:
            one.close()
        gateway.wait_for(lambda: occupancy.num_active == 0)
        assert len(worker.wait_cancelled(LIMITS.max_rows + 1)) == LIMITS.max_rows + 1


@pytest.mark.slow
def test_a_client_that_does_not_read_is_cut_off_and_the_others_are_not(worker: FakeWorker) -> None:
    settings = {"write_buffer_bytes": 8192, "slow_client_s": 0.4}
    with GatewayThread(workers=[worker.endpoint], **settings) as gateway:
        gateway.wait_ready()
        # It never ends by itself: only being cut off ends it.
        worker.script = lambda _: [*map(Token, text_ids("y" * 1900)), Wait(600)]
        host, port = gateway.url.removeprefix("http://").split(":")
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        deaf.connect((host, int(port)))
        body = json.dumps(chat(stream=True, n=8, max_tokens=1950)).encode()
        deaf.sendall(
            b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        worker.wait_submits(8)
        try:
            gateway.wait_for(lambda: gateway.gateway.service.metrics.num_slow_clients == 1)
            gateway.wait_for(lambda: gateway.gateway.service.num_in_flight == 0)
            worker.wait_cancelled(8)
        finally:
            deaf.close()
        worker.reply("fine")
        assert b"fine" in ask(gateway.url, CHAT, chat()).body


def test_an_old_client_gets_its_stream_without_chunk_framing(
    gateway: GatewayThread, worker: FakeWorker
) -> None:
    worker.reply("ab")
    body = json.dumps(chat(stream=True)).encode()
    head = b"POST " + CHAT.encode() + b" HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    answer = raw(gateway.url, head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    _, _, events = answer.partition(b"\r\n\r\n")
    assert events.startswith(b"data: {") and events.endswith(b"data: [DONE]\n\n") and b"\r\n" not in events


def test_one_connection_serves_streams_one_after_the_other(
    gateway: GatewayThread, worker: FakeWorker
) -> None:
    worker.reply("ab")
    connection = HTTPConnection(gateway.url.removeprefix("http://"), timeout=20)
    for _ in range(3):
        connection.request("POST", CHAT, json.dumps(chat(stream=True)), {"Content-Type": "application/json"})
        assert connection.getresponse().read().endswith(b"[DONE]\n\n")
    connection.close()


def test_a_client_that_leaves_while_its_picture_is_decoded_leaves_nothing(
    gateway: GatewayThread, worker: FakeWorker, data_url: Callable[..., str]
) -> None:
    images = gateway.gateway.service.images
    body = json.dumps({"question": "x", "image_url": data_url(2000, 2000)}).encode()
    host, port = gateway.url.removeprefix("http://").split(":")
    for _ in range(5):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/query HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
    gateway.wait_for(lambda: images.num_pending == 0 and gateway.gateway.service.num_in_flight == 0)
    assert ask(gateway.url, "/v1/query", {"question": "x", "image_url": data_url()}).status == 200


# ---------------------------------------------------------------- the end


@pytest.mark.slow
def test_the_end_is_orderly(worker: FakeWorker) -> None:
    gateway = GatewayThread(workers=[worker.endpoint])
    with gateway:
        gateway.wait_ready()
        worker.script = lambda submit: (
            [
                *map(Token, text_ids("a")),
                Wait(0.3 if submit.max_tokens == 5 else 60),
                *map(Token, text_ids("b")),
                End(),
            ]
        )
        short = Opened(gateway.url, CHAT, chat(stream=True, max_tokens=5))
        long = Opened(gateway.url, CHAT, chat(stream=True, max_tokens=50))
        stopping = threading.Thread(target=lambda: gateway.run(gateway.gateway.stop(drain_s=1.0)))
        stopping.start()
        gateway.wait_for(lambda: gateway.gateway.service.draining)
        ready, refused = ask(gateway.url, "/readyz"), ask(gateway.url, CHAT, chat())
        assert ready.status == 503 and "shutting down" in ready.json["reason"]
        assert (refused.status, refused.error["code"]) == (503, "shutting_down")
        assert "retry-after" in refused.headers
        assert list(short.events())[-1] == "[DONE]"
        assert list(long.events())[-1]["error"]["code"] == "shutting_down"
        stopping.join(10)
        worker.wait_cancelled(1)
        for one in (short, long):
            one.close()


def test_a_bug_is_a_500_that_says_nothing_of_the_request(
    gateway: GatewayThread, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("it held: nobody may log this")

    monkeypatch.setattr(gateway.gateway.service, "submit", broken)
    answer = ask(gateway.url, CHAT, chat("nobody may log this"))
    assert (answer.status, answer.error["code"]) == (500, "internal_error")
    said = capsys.readouterr()
    assert "nobody may log" not in said.out + said.err + answer.body.decode()
    assert "RuntimeError" in said.out + said.err
