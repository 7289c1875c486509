"""A conversation as Moondream is asked it: ids and places of pictures, written out by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.api import anthropic, chat, moondream, ollama
from gateway.api.conversations import Turn
from gateway.api.prompts import Message
from gateway.api.response_bodies import parse_body
from gateway.api.responses import prepare as prepare_response
from gateway.generation import GenerateRequest, RequestError
from shared.protocol import PromptValue
from tests.fake_worker import CARD, text_ids
from tests.unit.gateway.api.fake_core import FakeCore

BOS, PREFIX, SUFFIX = [CARD.bos_id], [1, 8, 2], [3]


def picture(name: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:{name}"}}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


async def asked(*messages: dict[str, Any]) -> GenerateRequest:
    body = json.dumps({"messages": messages}).encode()
    (request,) = (await chat.prepare(FakeCore(), body, request_id="r", tenant="")).requests
    return request


def places(request: GenerateRequest) -> list[tuple[bytes, list[tuple[int, int]]]]:
    return [(image.spec.digest, image.spec.runs) for image in request.images]


async def test_one_turn_is_the_query_itself() -> None:
    request = await asked({"role": "user", "content": [text(" how many? "), picture("a")]})
    assert request.prompt_ids == [*BOS, *PREFIX, *text_ids("how many?"), *SUFFIX]
    assert places(request) == [(b"data:a", [(1, 64)])]
    assert request.strip_start


async def test_turns_and_pictures_stand_where_they_were_said() -> None:
    request = await asked(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [picture("a"), text("one"), picture("b")]},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "user", "content": [text("four"), picture("c")]},
    )
    first = [*BOS, *PREFIX, *text_ids("Be brief.\n\none"), *SUFFIX, *text_ids("two")]
    before_last = [*first, *PREFIX, *text_ids("three")]
    assert request.prompt_ids == [*before_last, *PREFIX, *text_ids("four"), *SUFFIX]
    at = len(before_last)
    assert places(request) == [(b"data:a", [(1, 64)]), (b"data:b", [(1, 64)]), (b"data:c", [(at, 64)])]


async def test_a_later_system_message_goes_to_the_turn_behind_it() -> None:
    request = await asked(
        {"role": "user", "content": "one"},
        {"role": "developer", "content": "In French."},
        {"role": "user", "content": "two"},
    )
    assert request.prompt_ids == [
        *BOS, *PREFIX, *text_ids("one"), *PREFIX, *text_ids("In French.\n\ntwo"), *SUFFIX
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "system", "content": "x"}], "messages"),
        ([{"role": "user", "content": [picture("a")]}], "messages[0].content"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "messages[1].content"),
        (
            [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": [picture("a")]},
                {"role": "user", "content": "y"},
            ],
            "messages[1].content",
        ),
        ([{"role": "user", "content": [text("x"), *[picture("a")] * 17]}], "messages[0].content[17].image_url.url"),
    ],
)  # fmt: skip
async def test_what_has_no_place_is_named(messages: list[dict[str, Any]], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        await asked(*messages)
    assert caught.value.param == param


async def test_every_door_gives_the_same_prompt() -> None:
    history: list[dict[str, Any]] = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    system = "Be brief."
    wanted = (await asked({"role": "system", "content": system}, *history)).prompt_ids
    body: dict[str, Any] = {"model": CARD.model_id, "max_tokens": 5, "messages": history, "system": system}
    made = await anthropic.prepare(FakeCore(), json.dumps(body).encode(), request_id="r", tenant="")
    assert made.requests[0].prompt_ids == wanted
    body = {"model": CARD.model_id, "messages": [{"role": "system", "content": system}, *history]}
    answer = await ollama.prepare_chat(FakeCore(), json.dumps(body).encode(), request_id="r", tenant="")
    assert answer.requests[0].prompt_ids == wanted
    held = Turn((Message(role="user", content="one"), Message(role="assistant", content="two")))
    for previous, given in ((held, history[2:]), (None, history)):
        create = parse_body(json.dumps({"input": given, "instructions": system}).encode())
        response = await prepare_response(FakeCore(), create, tenant="", previous=previous)
        assert response.request.prompt_ids == wanted


async def test_another_task_of_a_response_is_about_the_last_picture() -> None:
    parts = [{"type": "input_image", "image_url": f"data:{name}"} for name in "ab"]
    body = {"input": [{"role": "user", "content": parts}], "degas": {"task": "point", "object": "dot"}}
    made = await prepare_response(FakeCore(), parse_body(json.dumps(body).encode()), tenant="")
    assert made.request.prompt_ids == [*BOS, 1, 25, 2, *text_ids(" dot"), 3]
    assert [image.spec.digest for image in made.request.images] == [b"data:b"]


async def test_places_stand_between_prefix_and_text() -> None:
    refs = [[0.25, 0.5], [0.0, 0.25, 0.5, 0.75]]
    ids = [CARD.coord_id] * 4 + [CARD.size_id]
    wanted = [PromptValue(4 + i, value) for i, value in enumerate([[0.25], [0.5], [0.25], [0.5], [0.5, 0.5]])]
    body = {"image_url": "data:a", "spatial_refs": refs}
    query = json.dumps({**body, "question": "what?"}).encode()
    (request,) = (await moondream.prepare_query(FakeCore(), query, request_id="r", tenant="")).requests
    assert request.prompt_ids == [*BOS, *PREFIX, *ids, *text_ids("what?"), *SUFFIX]
    assert request.values == wanted and places(request) == [(b"data:a", [(1, 64)])]
    point = json.dumps({**body, "object": "dot"}).encode()
    (request,) = (await moondream.prepare_point(FakeCore(), point, request_id="r", tenant="")).requests
    assert request.prompt_ids == [*BOS, 1, 25, 2, *ids, *text_ids(" dot"), 3] and request.values == wanted


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"spatial_refs": [[0.5, 0.5, 0.5]]}, "spatial_refs[0]"),
        ({"spatial_refs": [[0.5, 0.5], [0.5, 0.5, 0.25, 0.75]]}, "spatial_refs[1]"),
        ({"spatial_refs": [[0.5, 1.5]]}, "spatial_refs[0][1]"),
        ({"spatial_refs": [[0.5, 0.5]] * 101}, "spatial_refs"),
        ({"spatial_refs": [[0.5, 0.5]], "image_url": None}, "spatial_refs"),
    ],
)
async def test_places_that_are_none_are_named(fields: dict[str, Any], param: str) -> None:
    body = json.dumps({"question": "what?", "image_url": "data:a", **fields}).encode()
    with pytest.raises(RequestError) as caught:
        await moondream.prepare_query(FakeCore(), body, request_id="r", tenant="")
    assert caught.value.param == param
    with pytest.raises(RequestError) as caught:
        body = json.dumps({"object": "x", "image_url": "data:a", "spatial_refs": [[0.5, 0.5]]}).encode()
        await moondream.prepare_detect(FakeCore(), body, request_id="r", tenant="")
    assert caught.value.param == "spatial_refs"
