"""What each interface makes of a body, against a small fake core: no sockets, no worker."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest

from gateway.api import chat, completions, models, moondream, responses
from gateway.api.response_bodies import parse_body
from gateway.generation import Core, GenerateRequest, RequestError
from shared.errors import ErrorCode
from tests.fake_worker import CARD, text_ids
from tests.unit.gateway.api.fake_core import FakeCore, FakeModel

LLAMA = msgspec.structs.replace(CARD, family="llama", image=None, templates={}, suppress_ids=[])
QUERY = [0, *CARD.templates["query_prefix"], *text_ids("hi"), *CARD.templates["query_suffix"]]


async def prepare(core: Core, path: str, **body: Any) -> list[GenerateRequest]:
    """What the interface at `path` would submit."""
    data = json.dumps(body).encode()
    if path == "responses":
        return [(await responses.prepare(core, parse_body(data), tenant="t")).request]
    if path == "chat":
        return (await chat.prepare(core, data, request_id="r", tenant="t")).requests
    if path == "completions":
        return (await completions.prepare(core, data, request_id="r", tenant="t")).requests
    assert path == "query"
    return (await moondream.prepare_query(core, data, request_id="r", tenant="t")).requests


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat", {"messages": [{"role": "user", "content": "hi"}]}),
        ("responses", {"input": "hi"}),
        ("query", {"question": " hi "}),
    ],
)
async def test_a_question_is_the_same_prompt_everywhere(path: str, body: dict[str, Any]) -> None:
    core = FakeCore()
    (request,) = await prepare(core, path, **body)
    assert (request.prompt_ids, request.tenant, request.strip_start) == (QUERY, "t", True)
    assert request.model is core.served and request.max_tokens == CARD.default_max_tokens


async def test_choices_and_prompts_are_numbered() -> None:
    asked = await prepare(FakeCore(), "completions", prompt=["a", "b"], n=2, seed=5)
    assert [one.request_id for one in asked] == ["r-0", "r-1", "r-2", "r-3"]
    assert [one.prompt_ids for one in asked] == [[0, *text_ids(text)] for text in "aabb"]
    assert [one.sampling.seed for one in asked] == [5, 6, 5, 6]
    (alone,) = await prepare(FakeCore(), "completions", prompt="a")
    assert (alone.request_id, alone.max_tokens) == ("r", 16)


async def test_room_is_asked_for_before_anything_is_prepared() -> None:
    core = FakeCore()
    core.num_places = 1
    with pytest.raises(RequestError) as caught:
        await prepare(core, "chat", messages=[{"role": "user", "content": "hi"}], n=2)
    assert caught.value.code is ErrorCode.QUEUE_FULL


async def test_a_constrained_answer_keeps_its_white_space() -> None:
    messages = [{"role": "user", "content": "hi"}]
    (request,) = await prepare(FakeCore(), "chat", messages=messages, guided_choice=[" yes", " no"])
    assert request.grammar is not None and not request.strip_start


async def test_coordinates_are_read_greedily_unless_a_temperature_is_asked_for() -> None:
    card = msgspec.structs.replace(CARD, default_temperature=0.7)
    url = "data:image/png;base64,AAAA"
    for settings, temperature in ((None, 0.0), ({"temperature": 0.5}, 0.5)):
        body: dict[str, Any] = {"image_url": url, "object": "cat", "settings": settings}
        data = json.dumps(body).encode()
        core = FakeCore(FakeModel(card))
        (request,) = (await moondream.prepare_detect(core, data, request_id="r", tenant="")).requests
        assert (request.sampling.temperature, request.sampling.suppress_ids) == (temperature, [])
        assert (request.task, request.max_objects, request.max_tokens) == ("detect", 50, 151)


async def test_an_announcement_between_two_awaits_changes_nothing_of_a_request() -> None:
    """The body is checked, encoded and submitted against one model, whatever is announced meanwhile."""
    old = FakeModel(pause=asyncio.Event())
    core = FakeCore(old)
    preparing = asyncio.create_task(prepare(core, "query", question="hi"))
    await asyncio.sleep(0)  # it waits inside the encoding by now
    core.served = FakeModel(
        msgspec.structs.replace(CARD, templates={"query_prefix": [9]}, eos_ids=[9], default_max_tokens=1)
    )
    assert old.pause is not None and not preparing.done()
    old.pause.set()
    (request,) = await preparing
    assert request.model is old
    assert (request.prompt_ids, request.stop_ids, request.max_tokens) == (QUERY, [0], 64)


def test_models_are_listed_as_their_cards_say() -> None:
    (entry,) = models.list_models(FakeCore())["data"]
    assert (entry["id"], entry["takes_images"]) == (CARD.model_id, True)
