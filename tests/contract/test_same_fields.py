"""The same fields reach a worker as the same `Submit`, and the same faults are refused alike, at every door."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import grpc
import msgspec
import pytest
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from shared.protocol import Submit
from tests.fake_worker import FakeWorker
from tests.gateway_thread import GatewayThread
from tests.http_client import ask

pytestmark = pytest.mark.slow

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CONSTRAINTS = ("json", "json_object", "regex", "choice", "grammar")


@dataclass(frozen=True)
class Refused:
    """Why, and which field; the same field's name differs between interfaces only in front of its last dot."""

    code: str
    field: str


Door = Callable[[GatewayThread, dict[str, Any]], Refused | None]


def _refused(code: str, param: str | None) -> Refused:
    name = (param or "").rpartition(".")[2]
    return Refused(code, {"json_schema": "json", "max_output_tokens": "max_tokens"}.get(name, name))


def _openai(fields: dict[str, Any]) -> dict[str, Any]:
    wanted = {name: fields[name] for name in CONSTRAINTS if name in fields}
    body = {name: value for name, value in fields.items() if name not in CONSTRAINTS}
    return {**body, "structured_outputs": wanted} if wanted else body


def _post(path: str, gateway: GatewayThread, body: dict[str, Any]) -> Refused | None:
    answer = ask(gateway.url, path, body)
    return None if answer.status == 200 else _refused(answer.error["code"], answer.error["param"])


def chat(gateway: GatewayThread, fields: dict[str, Any]) -> Refused | None:
    messages = [{"role": "user", "content": "hi"}]
    return _post("/v1/chat/completions", gateway, {**_openai(fields), "messages": messages})


def completions(gateway: GatewayThread, fields: dict[str, Any]) -> Refused | None:
    return _post("/v1/completions", gateway, {**_openai(fields), "prompt": "hi"})


def _response(fields: dict[str, Any]) -> dict[str, Any]:
    body = {**_openai(fields), "input": "hi"}
    if "max_tokens" in body:
        body["max_output_tokens"] = body.pop("max_tokens")
    return body


def responses(gateway: GatewayThread, fields: dict[str, Any]) -> Refused | None:
    return _post("/v1/responses", gateway, _response(fields))


def websocket(gateway: GatewayThread, fields: dict[str, Any]) -> Refused | None:
    async def converse() -> Refused | None:
        url = gateway.url + "/v1/responses"
        async with aiohttp.ClientSession() as session, session.ws_connect(url) as ws:
            await ws.send_json({"type": "response.create", **_response(fields)})
            async for message in ws:
                event = message.json()
                if event["type"] == "error":
                    return _refused(event["error"]["code"], event["error"]["param"])
                if event["type"] in ("response.completed", "response.incomplete"):
                    return None
        raise AssertionError("the connection ended first")

    return asyncio.run(converse())


def grpc_generate(gateway: GatewayThread, fields: dict[str, Any]) -> Refused | None:
    given = dict(fields)
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    if "logit_bias" in given:
        given["logit_bias"] = {int(key): bias for key, bias in given["logit_bias"].items()}
    if "json" in given:
        schema = given.pop("json")
        given["json_schema"] = schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()
    if "choice" in given:
        given["choice"] = pb.ChoiceConstraint(choices=given["choice"])
    request = pb.GenerateRequest(text="hi", sampling_params=pb.SamplingParams(**given))
    with grpc.insecure_channel(f"127.0.0.1:{gateway.gateway.grpc_port}") as channel:
        try:
            list(vllm_engine_pb2_grpc.VllmEngineStub(channel).Generate(request, timeout=10))
        except grpc.RpcError as error:
            trailing = dict(error.trailing_metadata())
            return _refused(trailing["degas-code"], trailing.get("degas-param"))
    return None


def query(gateway: GatewayThread, fields: dict[str, Any]) -> Refused | None:
    return _post("/v1/query", gateway, {"question": "hi", "settings": fields})


DOORS: dict[str, Door] = {
    door.__name__: door for door in (chat, completions, responses, websocket, grpc_generate, query)
}
QUERY_FIELDS = {"temperature", "top_p", "max_tokens", "seed"}

SOUND: dict[str, dict[str, Any]] = {
    "nothing": {},
    "greedy": {"temperature": 0.0},
    "settings": {"temperature": 0.5, "top_p": 0.75},
    "sampling": {"temperature": 1.5, "top_k": 7, "top_p": 0.75, "min_p": 0.125},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": -0.25, "repetition_penalty": 1.25},
    "bias": {"logit_bias": {"20": -2.0, "21": 50.0}},
    "min_tokens": {"min_tokens": 3},
    "stop": {"stop": ["one", "two"]},
    "ignore_eos": {"ignore_eos": True},
    "schema": {"json": SCHEMA},
    "json_object": {"json_object": True},
    "regex": {"regex": "[a-z]{4}"},
    "choice": {"choice": ["yes", "no"]},
    "grammar": {"grammar": 'start: "a" | "b"'},
}
WRONG: dict[str, tuple[dict[str, Any], Refused]] = {
    "temperature": ({"temperature": 3.0}, Refused("invalid_request", "temperature")),
    "top_p": ({"top_p": 2.0}, Refused("invalid_request", "top_p")),
    "min_p": ({"min_p": 2.0}, Refused("invalid_request", "min_p")),
    "penalty": ({"presence_penalty": 5.0}, Refused("invalid_request", "presence_penalty")),
    "repetition": ({"repetition_penalty": 100.0}, Refused("invalid_request", "repetition_penalty")),
    "bias": ({"logit_bias": {"999999": 1.0}}, Refused("invalid_request", "logit_bias")),
    "stops": ({"stop": ["x"] * 17}, Refused("invalid_request", "stop")),
    "empty stop": ({"stop": [""]}, Refused("invalid_request", "stop")),
    "min beyond max": ({"min_tokens": 10, "max_tokens": 9}, Refused("invalid_request", "min_tokens")),
    "min beside a grammar": ({"min_tokens": 2, "regex": "a+"}, Refused("invalid_request", "min_tokens")),
    "too long": ({"max_tokens": 100_000}, Refused("context_length_exceeded", "max_tokens")),
    "no regex": ({"regex": "("}, Refused("invalid_grammar", "regex")),
    "no choices": ({"choice": []}, Refused("invalid_request", "choice")),
    "no schema": ({"json": "[]"}, Refused("invalid_request", "json")),
    "deep schema": ({"json": '{"items":' * 80 + "{}" + "}" * 80}, Refused("invalid_grammar", "json")),
}


@pytest.fixture(scope="module")
def worker() -> Iterator[FakeWorker]:
    with FakeWorker() as worker:
        worker.reply("ok")
        yield worker


@pytest.fixture(scope="module")
def gateway(worker: FakeWorker) -> Iterator[GatewayThread]:
    with GatewayThread(workers=[worker.endpoint], grpc_port=0) as gateway:
        gateway.wait_ready()
        yield gateway


def _doors(fields: dict[str, Any]) -> list[str]:
    """Moondream's query has a few of the fields only."""
    return [name for name in DOORS if name != "query" or set(fields) <= QUERY_FIELDS]


def _core(submit: Submit) -> Submit:
    """What is left of it when its own name, its prompt and the time are taken away."""
    return msgspec.structs.replace(submit, epoch=0, sequence_id=0, request_id="", prompt=b"", deadline_s=0.0)


@pytest.mark.parametrize("case", SOUND)
def test_every_door_sends_the_same(gateway: GatewayThread, worker: FakeWorker, case: str) -> None:
    fields = {"seed": 11, "max_tokens": 9, **SOUND[case]}
    sent: dict[str, Submit] = {}
    for name in _doors(fields):
        worker.submits.clear()
        assert DOORS[name](gateway, fields) is None, name
        (submit,) = worker.submits
        sent[name] = _core(submit)
    first = sent["chat"]
    assert (first.sampling.seed, first.max_tokens) == (11, 9)
    assert (first.grammar is not None) == any(name in fields for name in CONSTRAINTS)
    assert first.ignore_eos == ("ignore_eos" in fields) and bool(first.stop_ids) != first.ignore_eos
    for name, submit in sent.items():
        assert submit == first, name


@pytest.mark.parametrize("case", WRONG)
def test_every_door_refuses_alike(gateway: GatewayThread, worker: FakeWorker, case: str) -> None:
    fields, expected = WRONG[case]
    worker.submits.clear()
    assert {name: DOORS[name](gateway, fields) for name in _doors(fields)} == dict.fromkeys(
        _doors(fields), expected
    )
    assert not worker.submits
