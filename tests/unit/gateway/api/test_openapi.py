"""`/openapi.json`: a sound document, of exactly the routes that are served and exactly the fields that bodies have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openapi_spec_validator
import pytest

from gateway.api.described import openapi
from gateway.api.described.operations import OPERATIONS
from gateway.api.fields import Known
from gateway.app import create_app
from shared import protocol as wire
from tests.fake_worker import End, FakeWorker, Script, Token, text_ids
from tests.gateway_thread import GatewayThread
from tests.http_client import Opened, ask
from tests.unit.gateway.api.test_fields import ALL

DOCUMENT: dict[str, Any] = json.loads(openapi.document())
SCHEMAS = DOCUMENT["components"]["schemas"]


@pytest.fixture(scope="module")
def served() -> Iterator[GatewayThread]:
    with FakeWorker(step_s=0.0005) as worker, GatewayThread(workers=[worker.endpoint]) as gateway:
        worker.reply_objects([(0.5, 0.5)])
        points = worker.script
        worker.reply_objects([(0.5, 0.5, 0.1, 0.1)])
        boxes = worker.script
        worker.reply("ok")
        words = worker.script
        outline = [*boxes(wire.Submit(1, 1, "", b"", 1))[:3], *map(Token, text_ids("M 0 9L 9 9Z")), End()]
        by_task: dict[str, Script] = {"detect": boxes, "point": points, "segment": lambda _: outline}
        worker.script = lambda submit: by_task.get(submit.task, words)(submit)
        gateway.wait_ready()
        yield gateway


def test_it_is_valid() -> None:
    openapi_spec_validator.validate(DOCUMENT)


def test_every_route_is_described_and_nothing_else(served: GatewayThread) -> None:
    app = create_app(served.gateway.service)
    routes = {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None
        and route.method != "HEAD"
        and (getattr(route.handler, "public_group", None) != "page" or route.resource.canonical == "/docs")
    }
    any_method = {path for method, path in routes if method == "*"}
    described = {(method.upper(), path) for path, item in DOCUMENT["paths"].items() for method in item}
    assert {one for one in described if one[1] not in any_method} == {one for one in routes if one[0] != "*"}
    assert any_method <= {path for _, path in described}


def schema_of(kind: type[Known]) -> dict[str, Any]:
    """The schema that has this struct's name and fields."""
    found: list[dict[str, Any]] = [
        schema
        for name, schema in SCHEMAS.items()
        if name.endswith(kind.__name__)
        and set(schema.get("properties", {})) - {"type"} == set(kind.__struct_fields__) - {"type"}
    ]
    assert found, kind
    return found[0]


@pytest.mark.parametrize(
    "kind", [kind for kind in ALL if not kind.__name__.startswith("_")], ids=lambda kind: kind.__name__
)
def test_a_schema_has_its_struct_s_fields_and_says_what_becomes_of_them(kind: type[Known]) -> None:
    if kind.__name__ in ("SamplingFields", "TaskBody", "LevelBody"):
        return  # parents only; the operator's own port, which is not described
    schema = schema_of(kind)
    assert schema["additionalProperties"] is False
    properties = schema["properties"]
    assert {name for name, told in properties.items() if told.get("x-refused")} == set(kind.REFUSED)
    assert {name for name, told in properties.items() if told.get("x-ignored")} == set(kind.IGNORED)
    for name in kind.REFUSED:
        assert None in properties[name]["enum"] and "asked" not in properties[name]["enum"]


def validator(schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
    """Checks values by a schema that refers to the document's."""
    whole = {**schema, "components": DOCUMENT["components"]}
    return jsonschema.Draft202012Validator(whole)


EXAMPLES = [operation for operation in OPERATIONS if operation.example is not None]


@pytest.mark.parametrize("operation", EXAMPLES, ids=lambda operation: operation.path)
def test_every_example_is_answered_as_described(served: GatewayThread, operation: Any) -> None:
    told = DOCUMENT["paths"][operation.path][operation.method.lower()]
    body = told["requestBody"]["content"]["application/json"]
    example = {**body["example"], **({"model": "fake-vl"} if "model" in body["example"] else {})}
    validator(body["schema"]).validate(example)
    answer = ask(served.url, operation.path, example)
    assert answer.status == 200, answer.body
    validator(told["responses"]["200"]["content"]["application/json"]["schema"]).validate(answer.json)
    refused = ask(served.url, operation.path, {**example, "unheard_of": 1})
    assert refused.status == 400
    validator(told["responses"]["400"]["content"]["application/json"]["schema"]).validate(refused.json)


@pytest.mark.parametrize(
    "operation", [one for one in EXAMPLES if one.stream is not None], ids=lambda operation: operation.path
)
def test_every_event_is_as_described(served: GatewayThread, operation: Any) -> None:
    told = DOCUMENT["paths"][operation.path]["post"]
    example = {**operation.example, "stream": True}
    example |= {"model": "fake-vl"} if "model" in example else {}
    content = told["responses"]["200"]["content"]
    with Opened(served.url, operation.path, example) as opened:
        media = opened.response.headers["Content-Type"].partition(";")[0]
        assert media == operation.stream[0]
        if media == "text/event-stream":
            events = [event for event in opened.events() if event != "[DONE]"]
            schema = content[media]["schema"]["properties"]["data"]["contentSchema"]
        else:
            events = [json.loads(line) for line in opened.response if line.strip()]
            schema = content[media]["schema"]
    assert len(events) >= 2
    check = validator(schema)
    for event in events:
        check.validate(event)


def test_it_needs_a_key_as_the_models_do() -> None:
    with FakeWorker() as worker, GatewayThread(workers=[worker.endpoint], api_keys="a-long-key") as gateway:
        assert ask(gateway.url, "/openapi.json").status == 401
        assert ask(gateway.url, "/v1/models").status == 401
        given = {"Authorization": "Bearer a-long-key"}
        assert ask(gateway.url, "/openapi.json", headers=given).body == openapi.document()
