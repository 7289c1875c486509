"""The Responses API through the official `openai` client, unmodified: plain, streamed, and over its WebSocket."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.lib.responses_websocket import ResponsesWebSocketAccumulator
from openai.types.responses import Response, ResponseStreamEvent
from PIL import Image

from shared.errors import ErrorCode, FinishReason
from tests.fake_worker import CARD, Action, End, FakeWorker, Token, Wait, ids_text, text_ids
from tests.gateway_thread import GatewayThread
from tests.keys import ANY_KEY

pytestmark = pytest.mark.slow

EVENT_ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def worker() -> Iterator[FakeWorker]:
    with FakeWorker() as worker:
        yield worker


@pytest.fixture(scope="module")
def gateway(worker: FakeWorker) -> Iterator[GatewayThread]:
    with GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_ready()
        yield gateway


@pytest.fixture(autouse=True)
def fresh_script(worker: FakeWorker) -> None:
    worker.reply("Hello, wörld 🎈!")
    worker.submits.clear()
    worker.cancelled.clear()


@pytest.fixture
def client(gateway: GatewayThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=ANY_KEY, max_retries=0) as client:
        yield client


def picture_url(colour: tuple[int, int, int] = (200, 30, 30)) -> str:
    """A small picture as a data URL."""
    file = io.BytesIO()
    Image.new("RGB", (80, 60), colour).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def prompt_text(worker: FakeWorker, index: int = -1) -> str:
    """What the worker was asked, special tokens left out."""
    from shared.protocol import unpack_i32

    return ids_text(unpack_i32(worker.submits[index].prompt).tolist())


def check_order(events: list[Any]) -> None:
    """Every event once and in order, deltas any number of times; sequence numbers rise by one."""
    kinds = [event.type for event in events]
    squeezed = [kind for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
    assert squeezed == EVENT_ORDER
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_create_answers_whole(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model="fake-vl", input="hi", metadata={"a": "b"}, instructions="be brief"
    )
    assert response.output_text == "Hello, wörld 🎈!"
    assert response.status == "completed" and response.id.startswith("resp_")
    assert response.usage is not None and response.usage.output_tokens == len("Hello, wörld 🎈!".encode())
    assert response.metadata == {"a": "b"} and response.instructions == "be brief"
    Response.model_validate(response.model_dump())  # strictly: every field the client's type wants is there


def test_create_streams_in_the_documented_order(client: openai.OpenAI) -> None:
    events: list[ResponseStreamEvent] = list(
        client.responses.create(model="fake-vl", input="hi", stream=True)
    )
    check_order(events)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == "Hello, wörld 🎈!"
    last = events[-1]
    assert last.type == "response.completed" and last.response.output_text == text


def test_the_stream_helper_accumulates(client: openai.OpenAI) -> None:
    with client.responses.stream(model="fake-vl", input="hi") as stream:
        kinds = [event.type for event in stream]
        assert "response.output_text.delta" in kinds
        assert stream.get_final_response().output_text == "Hello, wörld 🎈!"


def test_picture_and_text_parts_reach_the_worker(client: openai.OpenAI, worker: FakeWorker) -> None:
    content: Any = [
        {"type": "input_text", "text": "what is it"},
        {"type": "input_image", "image_url": picture_url(), "detail": "auto"},
    ]
    client.responses.create(model="fake-vl", input=[{"role": "user", "content": content}])
    assert prompt_text(worker) == "what is it"
    assert len(worker.submits[-1].images) == 1 and worker.submits[-1].images[0].runs == [(1, 64)]


def test_sampling_fields_reach_the_worker(client: openai.OpenAI, worker: FakeWorker) -> None:
    client.responses.create(
        model="fake-vl", input="hi", temperature=0.5, top_p=0.25, max_output_tokens=7, extra_body={"seed": 11}
    )
    submit = worker.submits[-1]
    assert (submit.sampling.temperature, submit.sampling.top_p, submit.sampling.seed) == (0.5, 0.25, 11)
    assert submit.max_tokens == 7


def test_the_token_limit_makes_it_incomplete(client: openai.OpenAI) -> None:
    response = client.responses.create(model="fake-vl", input="hi", max_output_tokens=5)
    assert response.status == "incomplete" and response.output_text == "Hello"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


def test_previous_response_continues_with_its_turn_and_picture(
    client: openai.OpenAI, worker: FakeWorker
) -> None:
    content: Any = [
        {"type": "input_text", "text": "one"},
        {"type": "input_image", "image_url": picture_url()},
    ]
    first = client.responses.create(model="fake-vl", input=[{"role": "user", "content": content}])
    client.responses.create(model="fake-vl", input="two", previous_response_id=first.id)
    assert prompt_text(worker) == f"one{first.output_text}two"
    assert worker.submits[-1].images == worker.submits[-2].images


def test_a_forgotten_response_cannot_be_continued(client: openai.OpenAI) -> None:
    unkept = client.responses.create(model="fake-vl", input="one", store=False)
    for response_id in (unkept.id, "resp_unknown"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.responses.create(model="fake-vl", input="two", previous_response_id=response_id)
        assert caught.value.param == "previous_response_id"


def conversation(answer_id: str) -> list[dict[str, Any]]:
    """The second turn's input as the Vercel AI SDK sends it: what was answered is named by its item's id."""
    first = {"type": "input_text", "text": "How many shapes are there?"}
    return [
        {"role": "user", "content": [first, {"type": "input_image", "image_url": picture_url()}]},
        {"type": "item_reference", "id": answer_id},
        {"role": "user", "content": [{"type": "input_text", "text": "What color is the circle?"}]},
    ]


def test_an_earlier_answer_may_be_named_by_its_item(client: openai.OpenAI, worker: FakeWorker) -> None:
    first = client.responses.create(model="fake-vl", input="How many shapes are there?")
    again: Any = conversation(str(first.output[0].id))
    assert client.responses.create(model="fake-vl", input=again).status == "completed"
    said = f"How many shapes are there?{first.output_text}What color is the circle?"
    assert prompt_text(worker) == said and len(worker.submits[-1].images) == 1


def test_an_item_that_is_not_held_is_named(client: openai.OpenAI) -> None:
    unkept = client.responses.create(model="fake-vl", input="one", store=False)
    for item_id in (str(unkept.output[0].id), "msg_unknown", ""):
        again: Any = conversation(item_id)
        with pytest.raises(openai.NotFoundError, match="send the item itself") as caught:
            client.responses.create(model="fake-vl", input=again)
        assert caught.value.param == "input[1].id"


def test_all_pictures_count_up_to_the_models_bound(client: openai.OpenAI, worker: FakeWorker) -> None:
    def asking(*colours: tuple[int, int, int]) -> Any:
        pictures = [{"type": "input_image", "image_url": picture_url(colour)} for colour in colours]
        return {"role": "user", "content": [{"type": "input_text", "text": "which?"}, *pictures]}

    red, blue = (200, 30, 30), (30, 30, 200)
    client.responses.create(model="fake-vl", input=[asking(red), asking(blue)])
    assert len({image.digest for image in worker.submits[0].images}) == 2
    with pytest.raises(openai.BadRequestError, match="at most 16") as caught:
        client.responses.create(model="fake-vl", input=[asking(*[red] * 16), asking(blue)])
    assert caught.value.param == "input[1].content[1].image_url"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 2**31}, "max_output_tokens"),
        ({"max_output_tokens": True}, "max_output_tokens"),
        ({"top_p": -1}, "top_p"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"input": ""}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "cat", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
        ({"input": [{"type": "function_call_output", "content": "x"}]}, "input[0].content"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
        ({"input": [{"type": "function_call", "call_id": "c"}]}, "input[0].name"),
        ({"input": [{"role": "user", "content": "x", "call_id": "c"}]}, "input[0].call_id"),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_file"}]}]},
            "input[0].output[0].type",
        ),
        # a Moondream-family model has no place for calls and results
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}, {"content": "x"}]}, "input[0]"),
        (
            {
                "input": [
                    {"content": "x"},
                    {"type": "function_call_output", "call_id": "c", "output": "y"},
                ]
            },
            "input[1]",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "f", "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [FUNCTION, FUNCTION]}, "tools[1].name"),
        ({"tools": [{**FUNCTION, "parameters": {"type": "string"}}]}, "tools[0].parameters"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
        (
            {"tools": [FUNCTION], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
            "tool_choice",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [FUNCTION], "text": {"format": {"type": "json_object"}}}, "tools"),
        ({"tools": [FUNCTION], "degas": {"task": "caption"}}, "tools"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"n": 2}, "n"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"bogus": 1}, "bogus"),
        ({"degas": {"task": "dance"}}, "degas.task"),
        ({"degas": {"task": "caption"}}, "input"),
        ({"degas": {"task": "detect"}}, "degas.object"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        (
            {
                "input": [
                    {"role": "user", "content": [{"type": "input_image", "image_url": "http://x/y.png"}]}
                ]
            },
            "input",
        ),
    ],
)
def test_wrong_fields_are_named(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/responses", cast_to=object, body={"model": "fake-vl", "input": "hi", **fields})
    assert caught.value.param == param


def test_a_model_without_a_template_can_be_made_to_call(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.reply('[{"name": "f", "arguments": {"a": 1}}]')
    tools: Any = [FUNCTION]
    answer = client.responses.create(model="fake-vl", input="hi", tools=tools, tool_choice="required")
    (call,) = answer.output
    assert call.type == "function_call" and json.loads(call.arguments) == {"a": 1}
    with pytest.raises(openai.BadRequestError, match="required") as caught:
        client.responses.create(model="fake-vl", input="hi", tools=tools)
    assert caught.value.param == "tools"


def test_unknown_models_are_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model="gpt-9", input="hi")
    assert caught.value.code == "model_not_found"


def test_a_full_queue_is_429_even_when_the_worker_says_so(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.reject(ErrorCode.QUEUE_FULL, retry_after_s=3.0)
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as caught:
            client.responses.create(model="fake-vl", input="hi", stream=stream)
        assert caught.value.response.headers["retry-after"] == "3"


def test_an_error_in_mid_stream_is_response_failed(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.script = lambda _: [
        *map(Token, text_ids("Hel")),
        Wait(0.02),
        End(FinishReason.ERROR, ErrorCode.NUMERICAL_ERROR, "NaN"),
    ]
    events = list(client.responses.create(model="fake-vl", input="hi", stream=True))
    last = events[-1]
    assert last.type == "response.failed" and last.response.error is not None
    assert last.response.error.code == "server_error" and last.response.error.type == "numerical_error"


def test_leaving_a_stream_cancels_in_the_worker(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.reply("x" * 60, reason=FinishReason.STOP)
    worker.script = endless
    stream = client.responses.create(model="fake-vl", input="hi", stream=True)
    for event in stream:
        if event.type == "response.output_text.delta":
            break
    stream.close()
    assert len(worker.wait_cancelled(1)) == 1


def endless(_: object) -> list[Action]:
    """Tokens for a minute."""
    return [action for _ in range(6000) for action in (Token(text_ids("x")[0]), Wait(0.01))]


def test_detect_spells_its_json_in_deltas(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.reply_objects([(0.5, 0.5, 0.2, 0.4), (0.25, 0.25, 0.1, 0.1)])
    content: Any = [{"type": "input_image", "image_url": picture_url()}]
    events = list(
        client.responses.create(
            model="fake-vl",
            input=[{"role": "user", "content": content}],
            stream=True,
            extra_body={"degas": {"task": "detect", "object": "circle"}},
        )
    )
    found = [event for event in events if str(event.type) == "degas.object"]
    assert len(found) == 2
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last = events[-1]
    assert last.type == "response.completed" and last.response.output_text == text
    boxes = json.loads(text)["objects"]
    assert boxes[0] == {"x_min": 0.4, "y_min": 0.3, "x_max": 0.6, "y_max": 0.7}
    assert prompt_text(worker).endswith(" circle") and worker.submits[-1].task == "detect"


def test_point_without_finds_is_an_empty_list(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.reply_objects([])
    content: Any = [{"type": "input_image", "image_url": picture_url()}]
    response = client.responses.create(
        model="fake-vl",
        input=[{"role": "user", "content": content}],
        extra_body={"degas": {"task": "point", "object": "circle"}},
    )
    assert json.loads(response.output_text) == {"points": []}


def test_caption_uses_its_template(client: openai.OpenAI, worker: FakeWorker) -> None:
    from shared.protocol import unpack_i32

    content: Any = [{"type": "input_image", "image_url": picture_url()}]
    client.responses.create(
        model="fake-vl",
        input=[{"role": "user", "content": content}],
        extra_body={"degas": {"task": "caption", "length": "short"}},
    )
    assert unpack_i32(worker.submits[-1].prompt).tolist() == [0, *CARD.templates["caption_short"]]


# ---------------------------------------------------------------- the WebSocket


def test_websocket_sends_the_same_events(client: openai.OpenAI) -> None:
    with client.responses.connect() as connection:
        connection.response.create(model="fake-vl", input="hi")
        events = []
        accumulator = ResponsesWebSocketAccumulator()
        for event in connection:
            events.append(event)
            accumulator.add_event(event)
            if event.type == "response.completed":
                break
    check_order(events)
    assert accumulator.get_final_response().output_text == "Hello, wörld 🎈!"
    assert all(getattr(event, "stream_id", None) is None for event in events)


def test_websocket_lanes_run_at_once_and_echo_their_name(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.script = lambda submit: [*map(Token, text_ids("abcdefghij")), End()]
    with client.responses.connect() as connection:
        worker.hold()
        for lane in ("a", "b", "c"):
            connection.response.create(model="fake-vl", input=lane, stream_id=lane)
        worker.wait_submits(3)  # all three run before any has said a word
        worker.release()
        texts: dict[str, str] = {}
        done: set[str] = set()
        for event in connection:
            assert event.stream_id is not None
            if event.type == "response.output_text.delta":
                texts[event.stream_id] = texts.get(event.stream_id, "") + event.delta
            if event.type == "response.completed":
                done.add(str(event.stream_id))
                if len(done) == 3:
                    break
    assert texts == dict.fromkeys(("a", "b", "c"), "abcdefghij")


def test_websocket_lane_is_first_come_first_served(client: openai.OpenAI, worker: FakeWorker) -> None:
    with client.responses.connect() as connection:
        for text in ("one", "two", "three"):
            connection.response.create(model="fake-vl", input=text, stream_id="same")
        kinds = []
        for event in connection:
            if event.type in ("response.created", "response.completed"):
                kinds.append(event.type)
                if len(kinds) == 6:
                    break
    assert kinds == ["response.created", "response.completed"] * 3
    assert [prompt_text(worker, i) for i in range(3)] == ["one", "two", "three"]


def test_websocket_cancel_ends_one_lane_only(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.script = endless
    with client.responses.connect() as connection:
        connection.response.create(model="fake-vl", input="a", stream_id="a")
        connection.response.create(model="fake-vl", input="b", stream_id="b")
        worker.wait_submits(2)
        connection.send_raw(json.dumps({"type": "response.cancel", "stream_id": "a"}))
        for event in connection:
            if event.type == "response.incomplete":
                assert event.stream_id == "a" and event.response.status == "cancelled"
                break
        assert len(worker.wait_cancelled(1)) == 1
        worker.reply("still here")
        connection.response.create(model="fake-vl", input="again", stream_id="a")
        for event in connection:
            if event.type == "response.completed":
                assert event.response.output_text == "still here"
                break
    assert len(worker.wait_cancelled(2)) == 2  # closing cancelled the other lane


def test_websocket_errors_are_events_and_the_socket_stays(client: openai.OpenAI) -> None:
    with client.responses.connect() as connection:
        for message, code, stream_id in (
            (
                '{"type":"response.create","model":"fake-vl","input":"x","temperature":9,"stream_id":"l"}',
                400,
                "l",
            ),
            ('{"type":"response.create","model":"gpt-9","input":"x","stream_id":"l"}', 404, "l"),
            (
                '{"type":"response.create","model":"fake-vl","input":"x","previous_response_id":"resp_0"}',
                404,
                None,
            ),
            ('{"type":"response.steer","previous_response_id":"resp_0","input":"x"}', 400, None),
            ('{"type":"response.create","stream_id":"no spaces"}', 400, None),
            ('{"type":"nonsense"}', 400, None),
            ("not json", 400, None),
            ("[" * 5000, 400, None),
        ):
            connection.send_raw(message)
            event = connection.recv()
            assert event.type == "error" and event.status == code, message[:80]
            assert event.error.message and event.stream_id == stream_id
        connection.response.create(model="fake-vl", input="hi")
        for event in connection:
            if event.type == "response.completed":
                break


def test_websocket_names_a_lost_parent_as_clients_expect(client: openai.OpenAI) -> None:
    with client.responses.connect() as connection:
        connection.response.create(model="fake-vl", input="x", previous_response_id="resp_0")
        event = connection.recv()
        assert event.type == "error" and event.error.code == "previous_response_not_found"


def test_websocket_continues_unstored_turns_on_the_same_connection(
    client: openai.OpenAI, worker: FakeWorker
) -> None:
    content: Any = [
        {"type": "input_text", "text": "one"},
        {"type": "input_image", "image_url": picture_url()},
    ]
    with client.responses.connect() as connection:
        connection.response.create(model="fake-vl", input=[{"role": "user", "content": content}], store=False)
        first = next(event.response for event in connection if event.type == "response.completed")
        connection.response.create(model="fake-vl", input="two", previous_response_id=first.id, store=False)
        next(event for event in connection if event.type == "response.completed")
        named: Any = conversation(str(first.output[0].id))
        connection.response.create(model="fake-vl", input=named, store=False)
        next(event for event in connection if event.type == "response.completed")
    assert len(worker.submits[-1].images) == 1
    with client.responses.connect() as connection:
        connection.response.create(model="fake-vl", input="three", previous_response_id=first.id)
        assert connection.recv().type == "error"


def test_websocket_warms_up_without_generating(client: openai.OpenAI, worker: FakeWorker) -> None:
    with client.responses.connect() as connection:
        connection.response.create(model="fake-vl", input="one", generate=False)
        warm = next(event.response for event in connection if event.type == "response.completed")
        assert warm.output_text == "" and worker.submits == []
        connection.response.create(model="fake-vl", input="two", previous_response_id=warm.id)
        next(event for event in connection if event.type == "response.completed")


async def test_async_session_with_lanes(gateway: GatewayThread) -> None:
    from openai.lib.responses_websocket import AsyncResponsesWebSocketSession, ResponsesWebSocketLimits

    limits = ResponsesWebSocketLimits(
        max_lanes=8, max_events_per_lane=512, max_events=2048, max_bytes_per_lane=1 << 20, max_bytes=1 << 22
    )
    async with (
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=ANY_KEY) as client,
        client.responses.connect() as connection,
        AsyncResponsesWebSocketSession(connection, limits=limits) as session,
    ):
        lanes = [session.lane(name) for name in ("x", "y")]
        for lane in lanes:
            await lane.send({"type": "response.create", "model": "fake-vl", "input": "hi"})
        answers = [await lane.get_final_response() for lane in lanes]
    assert [answer.output_text for answer in answers] == ["Hello, wörld 🎈!"] * 2


def test_worker_death_fails_every_lane(client: openai.OpenAI) -> None:
    with FakeWorker() as worker, GatewayThread(workers=[worker.endpoint], retry_wait_s=0) as gateway:
        gateway.wait_ready()
        worker.script = endless
        with (
            openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=ANY_KEY) as own,
            own.responses.connect() as connection,
        ):
            for lane in ("a", "b"):
                connection.response.create(model="fake-vl", input="x", stream_id=lane)
            worker.wait_submits(2)
            started = set()
            for event in connection:
                if event.type == "response.output_text.delta":
                    started.add(event.stream_id)
                if len(started) == 2:
                    break
            worker.die()
            begun_s = time.monotonic()
            failed: list[str] = []
            for event in connection:
                if event.type == "response.failed":
                    assert event.response.error is not None and event.response.error.type == "worker_lost"
                    failed.append(str(event.stream_id))
                    if len(failed) == 2:
                        break
            assert sorted(failed) == ["a", "b"] and time.monotonic() - begun_s < 10
