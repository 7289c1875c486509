"""The official moondream client, unmodified: query, caption, detect, point, chat, streams and keys."""

from __future__ import annotations

import urllib.error

import moondream
import msgspec
import pytest
from PIL import Image

from shared import protocol as wire
from shared.errors import FinishReason
from tests.fake_worker import CARD, Action, End, FakeWorker, Token, text_ids
from tests.gateway_thread import GatewayThread
from tests.http_client import Opened
from tests.keys import KEY, OTHER_KEY


def test_query(gateway: GatewayThread, worker: FakeWorker, picture: Image.Image) -> None:
    model = moondream.vl(endpoint=f"{gateway.url}/v1")
    worker.reply(" Two réd circles.")
    assert model.query(picture, "how many?")["answer"] == "Two réd circles."
    prompt = wire.unpack_i32(worker.submits[0].prompt).tolist()
    assert prompt == [0, 1, 8, 2, *text_ids("how many?"), 3]
    assert len(worker.submits[0].images) == 1
    assert model.query(question="without a picture?")["answer"] == "Two réd circles."
    assert worker.submits[1].images == []


def test_streams(gateway: GatewayThread, worker: FakeWorker, picture: Image.Image) -> None:
    model = moondream.vl(endpoint=f"{gateway.url}/v1")
    worker.reply("ein Bild 🎈")
    assert "".join(model.query(picture, "what?", stream=True)["answer"]) == "ein Bild 🎈"
    assert "".join(model.caption(picture, stream=True)["caption"]) == "ein Bild 🎈"


@pytest.mark.parametrize(("length", "token"), [("short", 21), ("normal", 22), ("long", 23)])
def test_caption(
    gateway: GatewayThread, worker: FakeWorker, picture: Image.Image, length: str, token: int
) -> None:
    model = moondream.vl(endpoint=f"{gateway.url}/v1")
    worker.reply("a red field")
    settings = {"temperature": 0.3, "top_p": 0.9, "max_tokens": 40}
    assert model.caption(picture, length=length, settings=settings)["caption"] == "a red field"
    submit = worker.submits[0]
    assert wire.unpack_i32(submit.prompt).tolist() == [0, 1, 20, 2, token, 3]
    assert (submit.sampling.temperature, submit.sampling.top_p, submit.max_tokens) == (0.3, 0.9, 40)


def test_detect(gateway: GatewayThread, worker: FakeWorker, picture: Image.Image) -> None:
    model = moondream.vl(endpoint=f"{gateway.url}/v1")
    worker.reply_objects([(0.5, 0.5, 0.5, 0.25), (0.0, 1.0, 0.5, 0.5)])
    objects = model.detect(picture, "circle", settings={"max_objects": 2})["objects"]
    assert objects == [
        {"x_min": 0.25, "y_min": 0.375, "x_max": 0.75, "y_max": 0.625},
        {"x_min": 0.0, "y_min": 0.75, "x_max": 0.25, "y_max": 1.0},
    ]
    submit = worker.submits[0]
    assert (submit.task, submit.max_objects, submit.max_tokens) == ("detect", 2, 7)
    assert wire.unpack_i32(submit.prompt).tolist() == [0, 1, 24, 2, *text_ids(" circle"), 3]


def test_point(gateway: GatewayThread, worker: FakeWorker, picture: Image.Image) -> None:
    model = moondream.vl(endpoint=f"{gateway.url}/v1")
    worker.reply_objects([(0.25, 0.75)])
    assert model.point(picture, "circle")["points"] == [{"x": 0.25, "y": 0.75}]
    worker.reply_objects([])
    assert model.point(picture, "square")["points"] == []


OUTLINE: list[Action] = [
    *(Token(CARD.coord_id, [value, 0.0]) for value in (0.5, 0.25)),
    Token(CARD.size_id, [0.5, 0.125]),
    *(Token(token_id, [0.0, 0.0]) for token_id in text_ids("M 0 0L 9-6Z")),
    End(),
]
BOX = {"x_min": 0.25, "y_min": 0.1875, "x_max": 0.75, "y_max": 0.3125}
PATH = "M 0 0 L 0.009 -0.006 Z"


def test_segment(gateway: GatewayThread, worker: FakeWorker, picture: Image.Image) -> None:
    model = moondream.vl(endpoint=f"{gateway.url}/v1")
    worker.script = lambda _: OUTLINE
    assert model.segment(picture, " cat ", settings={"max_tokens": 40}) == {"path": PATH, "bbox": BOX}
    submit = worker.submits[0]
    assert (submit.task, submit.max_tokens, submit.sampling.temperature) == ("segment", 40, 0.0)
    assert wire.unpack_i32(submit.prompt).tolist() == [0, 1, 26, 2, *text_ids("cat"), 3]
    model.segment(picture, "cat", spatial_refs=[[0.5, 0.25]])
    submit = worker.submits[1]
    assert wire.unpack_i32(submit.prompt).tolist() == [0, 1, 26, 2, 5, 5, *text_ids("cat"), 3]
    assert [value.values for value in submit.values] == [[0.5], [0.25]] and submit.max_tokens > 1000


def test_a_path_streams_as_it_is_decoded(
    gateway: GatewayThread, worker: FakeWorker, picture: Image.Image
) -> None:
    model = moondream.vl(endpoint=f"{gateway.url}/v1")
    worker.script = lambda _: OUTLINE
    told = list(model.segment(picture, "cat", stream=True))
    assert told == [
        {"bbox": BOX},
        {"chunk": "M 0 0"},
        {"chunk": " L 0.009 -0.006"},
        {"chunk": " Z"},
        {"path": PATH, "bbox": BOX, "completed": True},
    ]


def test_nothing_to_outline(gateway: GatewayThread, worker: FakeWorker, picture: Image.Image) -> None:
    model = moondream.vl(endpoint=f"{gateway.url}/v1")
    worker.reply("nothing")
    assert model.segment(picture, "cat") == {"path": ""}
    assert list(model.segment(picture, "cat", stream=True)) == [{"path": "", "bbox": None, "completed": True}]


def test_segment_is_refused_by_name_where_the_model_cannot(picture: Image.Image) -> None:
    card = msgspec.structs.replace(
        CARD,
        capabilities=["chat", "query"],
        templates={name: ids for name, ids in CARD.templates.items() if not name.startswith("segment")},
    )
    with FakeWorker(card=card) as worker, GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_ready()
        with pytest.raises(urllib.error.HTTPError) as caught:
            moondream.vl(endpoint=f"{gateway.url}/v1").segment(picture, "cat")
    assert (
        caught.value.code == 400 and b"cannot segment; what it can do is chat, query" in caught.value.read()
    )


def test_chat(worker: FakeWorker) -> None:
    """Its chat asks for a model by its hosted name unless told: an alias makes that work."""
    aliases = {"moondream3-preview": "fake-vl"}
    with GatewayThread(workers=[worker.endpoint], model_aliases=aliases) as gateway:
        gateway.wait_ready()
        model = moondream.vl(endpoint=f"{gateway.url}/v1")
        worker.reply("hello")
        messages = [{"role": "user", "content": "hi"}]
        assert model.chat(messages)["message"]["content"] == "hello"
        assert "".join(model.chat(messages, stream=True)["message"]) == "hello"


def test_what_is_not_offered_is_refused_by_name(gateway: GatewayThread, picture: Image.Image) -> None:
    model = moondream.vl(endpoint=f"{gateway.url}/v1")
    with pytest.raises(urllib.error.HTTPError) as caught:
        model.query(picture, "why?", settings={"variant": "mine"})
    assert caught.value.code == 400 and b'"param":"settings.variant"' in caught.value.read()


THOUGHT: list[Action] = [
    *map(Token, [*text_ids("A "), 7, *text_ids("dot")]),
    *(Token(CARD.coord_id, [value, 0.0]) for value in (0.25, 0.5, 0.75, 0.125)),
    *map(Token, [9, *text_ids(" is red."), 3, 3, *text_ids(" red")]),
    End(),
]
REASONING = {
    "text": "A dot is red.",
    "grounding": [{"start_idx": 2, "end_idx": 5, "points": [[0.25, 0.5], [0.75, 0.125]]}],
}


def test_an_answer_is_thought_out_and_points(
    gateway: GatewayThread, worker: FakeWorker, picture: Image.Image
) -> None:
    model = moondream.vl(endpoint=f"{gateway.url}/v1")
    worker.script = lambda _: THOUGHT
    found = model.query(picture, "which?", reasoning=True)
    assert (found["answer"], found["reasoning"]) == ("red", REASONING)
    submit = worker.submits[0]
    assert submit.task == "reason"
    assert wire.unpack_i32(submit.prompt).tolist() == [0, 1, 8, 2, *text_ids("which?"), 3, 4]
    assert "".join(model.query(picture, "which?", reasoning=True, stream=True)["answer"]) == "red"


def test_a_thoughts_words_and_points_stream(gateway: GatewayThread, worker: FakeWorker) -> None:
    worker.script = lambda _: THOUGHT
    body = {"question": "which?", "reasoning": True, "stream": True}
    with Opened(gateway.url, "/v1/query", body) as opened:
        events = list(opened.events())
    thought = [event["reasoning"] for event in events[:-1] if "reasoning" in event]
    assert "".join(part["text"] for part in thought) == REASONING["text"]
    assert [part["points"] for part in thought if part["points"]] == [[[0.25, 0.5]], [[0.75, 0.125]]]
    assert "".join(event["chunk"] for event in events) == "red"
    assert (events[-1]["answer"], events[-1]["reasoning"]) == ("red", REASONING)


def test_a_thought_that_is_cut_off_is_shown_as_far_as_it_came(
    gateway: GatewayThread, worker: FakeWorker, picture: Image.Image
) -> None:
    worker.script = lambda _: [*THOUGHT[:9], End(FinishReason.LENGTH)]
    found = moondream.vl(endpoint=f"{gateway.url}/v1").query(picture, "which?", reasoning=True)
    assert (
        found["answer"] == ""
        and found["reasoning"]["text"] == "A dot"
        and found["reasoning"]["grounding"][0]["points"] == [[0.25, 0.5]]
    )


def test_places_and_others_are_refused_where_they_do_not_go(
    gateway: GatewayThread, picture: Image.Image
) -> None:
    model = moondream.vl(endpoint=f"{gateway.url}/v1")
    with pytest.raises(urllib.error.HTTPError) as caught:
        model.point(picture, "x", spatial_refs=[(0.5, 1.5)])
    assert caught.value.code == 400 and b"spatial_refs[0][1]" in caught.value.read()


def test_places_are_asked_about(gateway: GatewayThread, worker: FakeWorker, picture: Image.Image) -> None:
    model = moondream.vl(endpoint=f"{gateway.url}/v1")
    worker.reply("a circle")
    assert model.query(picture, "what?", spatial_refs=[(0.5, 0.25)])["answer"] == "a circle"
    assert [value.values for value in worker.submits[0].values] == [[0.5], [0.25]]


def test_keys(worker: FakeWorker, picture: Image.Image) -> None:
    with GatewayThread(workers=[worker.endpoint], api_keys=f"{KEY},{OTHER_KEY}") as gateway:
        gateway.wait_ready()
        with pytest.raises(urllib.error.HTTPError) as caught:
            moondream.vl(endpoint=f"{gateway.url}/v1").query(picture, "what?")
        assert caught.value.code == 401
        model = moondream.vl(endpoint=f"{gateway.url}/v1", api_key=OTHER_KEY)
        assert model.query(picture, "what?")["answer"]
