"""Structured output through real processes: gateway, compiler processes, worker, over the simulated device."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import openai
import pytest

from tests.integration.stack import SIM, Stack, stack

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "maximum": 99}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def served() -> Iterator[Stack]:
    with stack(SIM) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=30)


def ask(client: openai.OpenAI, question: str, max_tokens: int = 80, **extra: Any) -> str:
    answer = client.chat.completions.create(
        model="sim",
        messages=[{"role": "user", "content": question}],
        max_tokens=max_tokens,
        extra_body=extra,
    )
    assert answer.choices[0].finish_reason == "stop"
    return answer.choices[0].message.content or ""


def test_every_kind_shapes_the_answer(client: openai.OpenAI) -> None:
    assert ask(client, "a", guided_choice=["red", "green"]) in ("red", "green")
    assert re.fullmatch(r"\d{3}-[a-z]{2}", ask(client, "b", guided_regex=r"\d{3}-[a-z]{2}"))
    assert ask(client, "c", guided_grammar='start: "(" A ")"\nA: "x" | "y"') in ("(x)", "(y)")
    assert ask(client, "d", guided_grammar='root ::= "yes" | "no"') in ("yes", "no")
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    jsonschema.validate(json.loads(ask(client, "e", response_format=wanted)), SCHEMA)
    answer = client.responses.create(
        model="sim",
        input="f",
        max_output_tokens=80,
        text={"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}},
    )
    jsonschema.validate(json.loads(answer.output_text), SCHEMA)


def test_constrained_and_free_requests_at_once(client: openai.OpenAI) -> None:
    def plain(number: int) -> str:
        answer = client.chat.completions.create(
            model="sim", messages=[{"role": "user", "content": f"free {number}"}], max_tokens=20
        )
        return answer.choices[0].message.content or ""

    alone = [plain(number) for number in range(6)]
    with ThreadPoolExecutor(18) as pool:
        free = [pool.submit(plain, number) for number in range(6)]
        forms: list[dict[str, Any]] = [
            {"guided_regex": r"[a-f]{5,9}"},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        ]
        bound = [pool.submit(ask, client, f"bound {i}", **forms[i % 2]) for i in range(12)]
        assert [job.result() for job in free] == alone
        for number, job in enumerate(bound):
            if number % 2:
                jsonschema.validate(json.loads(job.result()), SCHEMA)
            else:
                assert re.fullmatch("[a-f]{5,9}", job.result())


def test_a_hostile_grammar_is_a_400_and_the_next_one_is_served(client: openai.OpenAI) -> None:
    for pattern in ("(a{1,1000}){1,1000}", "(" * 5000, "|".join(["x{900}"] * 200)):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, "g", guided_regex=pattern)
        assert refused.value.code == "invalid_grammar" and refused.value.param == "guided_regex"
    assert ask(client, "h", guided_choice=["ok"]) == "ok"


def test_many_optional_properties_behind_a_long_constant_are_served_to_the_end(client: openai.OpenAI) -> None:
    properties: dict[str, Any] = {"z": {"const": "y" * 300}}
    properties |= {f"property{i}": {"type": "null"} for i in range(130)}
    schema = {"type": "object", "properties": properties, "required": ["z"]}
    answer = client.chat.completions.create(
        model="sim",
        messages=[{"role": "user", "content": "i"}],
        max_tokens=400,
        extra_body={"response_format": {"type": "json_object", "schema": schema}},
    )
    assert (answer.choices[0].message.content or "").startswith("{")
    schema["properties"] = properties | {f"more{i}": {} for i in range(300)}
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, "j", response_format={"type": "json_object", "schema": schema})
    assert "at most 400 optional properties" in refused.value.message
    assert refused.value.param == "response_format.schema"
