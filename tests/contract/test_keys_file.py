"""Keys from a file, at every door: who may call, how much, and what a change of the file does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import grpc
import ollama
import openai
import pytest
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc
from websockets.sync.client import connect

from gateway.keys import digest_of
from shared.settings import ConfigError
from tests.fake_worker import FakeWorker
from tests.gateway_thread import GatewayThread
from tests.http_client import Opened, ask
from tests.keys import KEY, WRONG_KEY, key

FREE, LIMITED, OTHER, OLD = key("free-1"), key("limited-1"), key("other-1"), key("old-1")
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


def line(name: str, secret: str, **fields: object) -> str:
    return json.dumps({"name": name, "hash": "sha256:" + digest_of(secret.encode()).hex(), **fields}) + "\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.jsonl"
    path.write_text(
        line("free", FREE, tenant="acme")
        + line("limited", LIMITED, requests_per_minute=2, tokens_per_minute=100000, max_streams=1)
        + line("other", OTHER, models=["something-else"])
        + line("old", OLD, expires="2020-01-01T00:00:00Z")
    )
    return path


@pytest.fixture
def locked(worker: FakeWorker, file: Path) -> Iterator[GatewayThread]:
    with GatewayThread(workers=[worker.endpoint], keys_file=str(file), api_keys=KEY, grpc_port=0) as gateway:
        gateway.wait_ready()
        yield gateway


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def chat(gateway: GatewayThread, secret: str, **fields: object) -> Any:
    return ask(gateway.url, "/v1/chat/completions", {**CHAT, **fields}, headers=bearer(secret))


def test_who_may_call(locked: GatewayThread, worker: FakeWorker) -> None:
    assert [chat(locked, secret).status for secret in (FREE, KEY)] == [200, 200]
    assert [chat(locked, secret).status for secret in (WRONG_KEY, OLD)] == [401, 401]
    assert [ask(locked.url, "/v1/models", headers=bearer(s)).status for s in (FREE, OLD)] == [200, 401]
    assert {submit.tenant for submit in worker.submits} >= {"acme"}
    refused = chat(locked, OTHER)
    assert refused.status == 404 and refused.error["code"] == "model_not_found"
    assert refused.error["param"] == "model" and "something-else" in refused.error["message"]
    assert ask(locked.url, "/v1/models", headers=bearer(OTHER)).json["data"] == []
    assert ask(locked.url, "/v1/models/fake-vl", headers=bearer(OTHER)).status == 404
    assert ask(locked.url, "/metrics", headers=bearer(FREE)).status == 200


def test_too_many_requests_say_when_to_come_back(locked: GatewayThread) -> None:
    first = chat(locked, LIMITED)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert 0 < int(first.headers["x-ratelimit-remaining-tokens"]) < 100000
    assert chat(locked, LIMITED, stream=True).headers["x-ratelimit-remaining-requests"] == "0"
    refused = chat(locked, LIMITED)
    assert refused.status == 429 and refused.error["code"] == "rate_limit_exceeded"
    assert (
        refused.error["param"] == "requests_per_minute" and "2 requests a minute" in refused.error["message"]
    )
    assert 25 <= int(refused.headers["retry-after"]) <= 31
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    text = ask(locked.url, "/metrics", headers=bearer(FREE)).body.decode()
    assert 'degas_key_requests_total{key="limited",tenant="limited"} 2.0' in text
    assert 'degas_key_refused_total{key="limited",tenant="limited"} 1.0' in text
    assert "sha256" not in text and digest_of(LIMITED.encode()).hex()[:16] not in text


def sse(gateway: GatewayThread) -> str:
    return str(chat(gateway, LIMITED, stream=True).error["code"])


def openai_client(gateway: GatewayThread) -> str:
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=LIMITED, max_retries=0)
    with client, pytest.raises(openai.RateLimitError) as caught:
        client.responses.create(input="hi", model="fake-vl")
    return str(caught.value.code)


def anthropic_client(gateway: GatewayThread) -> str:
    client = anthropic.Anthropic(base_url=gateway.url, api_key=LIMITED, max_retries=0)
    with client, pytest.raises(anthropic.RateLimitError) as caught:
        client.messages.create(model="fake-vl", max_tokens=5, messages=[{"role": "user", "content": "hi"}])
    assert caught.value.response.headers["retry-after"]
    return "rate_limit_exceeded"


def ollama_client(gateway: GatewayThread) -> str:
    with pytest.raises(ollama.ResponseError, match="requests a minute"):
        ollama.Client(gateway.url, headers=bearer(LIMITED)).generate("fake-vl", "hi")
    return "rate_limit_exceeded"


def websocket(gateway: GatewayThread) -> str:
    url = gateway.url.replace("http", "ws") + "/v1/responses"
    with connect(url, additional_headers=bearer(LIMITED)) as ws:
        ws.send(json.dumps({"type": "response.create", "input": "hi"}))
        event = json.loads(ws.recv(5))
    assert event["status"] == 429 and event["headers"]["retry-after"]
    return str(event["error"]["code"])


def rpc(gateway: GatewayThread) -> str:
    with grpc.insecure_channel(f"127.0.0.1:{gateway.gateway.grpc_port}") as channel:
        stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(
                stub.Generate(
                    pb.GenerateRequest(text="hi"), metadata=[("authorization", f"Bearer {LIMITED}")]
                )
            )
    trailing = dict(caught.value.trailing_metadata())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert trailing["degas-param"] == "requests_per_minute"
    return str(trailing["degas-code"])


def test_limits_hold_at_every_door(locked: GatewayThread) -> None:
    for _ in range(2):
        chat(locked, LIMITED)
    doors: tuple[Callable[[GatewayThread], str], ...] = (
        sse, openai_client, anthropic_client, ollama_client, websocket, rpc
    )  # fmt: skip
    for door in doors:
        assert door(locked) == "rate_limit_exceeded", door


def test_answers_at_once_and_places_come_back(locked: GatewayThread, worker: FakeWorker) -> None:
    worker.hold()
    body = {**CHAT, "stream": True}
    with Opened(locked.url, "/v1/chat/completions", body, headers=bearer(LIMITED)):
        refused = chat(locked, LIMITED)
        assert refused.status == 429 and refused.error["param"] == "max_streams"
    text = ask(locked.url, "/metrics", headers=bearer(FREE)).body.decode()
    assert 'degas_requests_refused_total{code="rate_limit_exceeded"} 1.0' in text
    (meter,) = (one for one in locked.gateway.service.meters.all() if one.entry.name == "limited")
    locked.wait_for(lambda: meter.num_streams == 0)
    worker.release()


def test_queued_responses_of_a_socket_count_for_its_key(locked: GatewayThread, worker: FakeWorker) -> None:
    """The second response begins inside the core's callback about the first, which is nobody's request."""
    url = locked.url.replace("http", "ws") + "/v1/responses"
    with connect(url, additional_headers=bearer(LIMITED)) as ws:
        for _ in range(3):
            ws.send(json.dumps({"type": "response.create", "input": "hi", "max_output_tokens": 3}))
        ends: list[str] = []
        while len(ends) < 3:
            event = json.loads(ws.recv(5))
            if event["type"] in ("response.incomplete", "response.completed", "error"):
                ends.append(event["type"])
    assert ends.count("error") == 1 and len(worker.submits) == 2


def test_a_change_of_the_file_is_taken_over(
    locked: GatewayThread, file: Path, worker: FakeWorker, capfd: pytest.CaptureFixture[str]
) -> None:
    refresh = locked.gateway.service._key_file.refresh
    url = locked.url.replace("http", "ws") + "/v1/responses"
    before = file.read_text()
    with connect(url, additional_headers=bearer(FREE)) as ws:
        worker.hold()
        ws.send(json.dumps({"type": "response.create", "input": "hi", "max_output_tokens": 3}))
        worker.wait_submits(1)
        file.write_text(before.partition("\n")[2] + line("free", WRONG_KEY, tenant="acme"))
        locked.run(refresh())
        worker.release()
        said = ""
        while said not in (
            "response.incomplete",
            "response.completed",
        ):  # it had begun: it goes on to its end
            said = json.loads(ws.recv(5))["type"]
        ws.send(json.dumps({"type": "response.create", "input": "hi"}))
        assert json.loads(ws.recv(5))["error"]["code"] == "unauthorized"
    assert chat(locked, FREE).status == 401 and chat(locked, WRONG_KEY).status == 200
    file.write_text(before + "{broken\n")
    locked.run(refresh())
    assert chat(locked, WRONG_KEY).status == 200
    file.unlink()
    locked.run(refresh())
    assert chat(locked, WRONG_KEY).status == 200
    captured = "".join(capfd.readouterr())
    assert "line 5" in captured and "No such file" in captured


def test_a_file_that_cannot_be_used_is_said_at_start(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("{}")
    with pytest.raises(ConfigError, match="line 1"), GatewayThread(keys_file=str(tmp_path / "keys")):
        pass
