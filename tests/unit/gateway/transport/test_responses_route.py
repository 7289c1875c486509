"""`POST /v1/responses` where its answers are no text, and where it must say what the other interfaces say."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from gateway.api.conversations import Conversations, Turn
from gateway.api.prompts import Message
from gateway.api.response_bodies import parse_body
from gateway.api.response_input import read_input
from gateway.api.responses import recall
from gateway.generation import End, RequestError, Usage
from shared.errors import ErrorCode, FinishReason
from tests.fake_worker import FakeWorker
from tests.gateway_thread import GatewayThread
from tests.http_client import ask

RESPONSES = "/v1/responses"


def about(picture: str, task: str, **fields: Any) -> dict[str, Any]:
    content = [{"type": "input_image", "image_url": picture}]
    return {"input": [{"content": content}], "degas": {"task": task, "object": "dot"}, **fields}


@pytest.mark.parametrize("task", ["detect", "point"])
@pytest.mark.parametrize(
    ("fields", "param"),
    [({"top_logprobs": 2}, "top_logprobs"), ({"include": ["message.output_text.logprobs"]}, "include")],
)
def test_coordinates_have_no_tokens_logprobs_and_asking_for_them_says_so(
    gateway: GatewayThread,
    worker: FakeWorker,
    data_url: Callable[..., str],
    task: str,
    fields: Any,
    param: str,
) -> None:
    answer = ask(gateway.url, RESPONSES, about(data_url(), task, **fields))
    assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "unsupported", param)
    assert task in answer.error["message"] and not worker.submits


@pytest.mark.parametrize("task", ["detect", "point"])
def test_objects_bring_the_log_probabilities_of_their_bins_when_asked(
    gateway: GatewayThread, worker: FakeWorker, data_url: Callable[..., str], task: str
) -> None:
    worker.reply_objects([(0.5, 0.5, 0.2, 0.4)] if task == "detect" else [(0.5, 0.5)])
    scores = {"x": -0.25, "y": -0.25}
    if task == "detect":
        scores |= {"width": -0.25, "height": -0.5}
    name = "objects" if task == "detect" else "points"
    body = {"image_url": data_url(), "object": "dot"}
    plain = ask(gateway.url, f"/v1/{task}", body).json[name][0]
    assert ask(gateway.url, f"/v1/{task}", {**body, "logprobs": False}).json[name][0] == plain
    asked = ask(gateway.url, f"/v1/{task}", {**body, "logprobs": True}).json[name][0]
    assert asked == {**plain, "logprobs": scores}
    wanted = [submit.sampling.num_logprobs for submit in worker.submits]
    assert wanted == [-1, -1, 0]
    response = about(data_url(), task)
    response["degas"]["logprobs"] = True
    text = ask(gateway.url, RESPONSES, response).json["output"][0]["content"][0]["text"]
    assert json.loads(text)[name][0]["logprobs"] == scores
    answer = ask(gateway.url, RESPONSES, {"input": "hi", "degas": {"logprobs": True}})
    assert (answer.status, answer.error["param"]) == (400, "degas.logprobs")


@pytest.mark.parametrize(("given", "sent"), [(None, 151), (7, 7), (1000, 151)])
def test_a_token_limit_bounds_boxes_as_well(
    gateway: GatewayThread, worker: FakeWorker, data_url: Callable[..., str], given: int | None, sent: int
) -> None:
    worker.reply_objects([(0.5, 0.5, 0.1, 0.1)])
    fields = {} if given is None else {"max_output_tokens": given}
    assert ask(gateway.url, RESPONSES, about(data_url(), "detect", **fields)).status == 200
    assert (worker.submits[-1].max_tokens, worker.submits[-1].max_objects) == (sent, 50)


def test_the_same_question_has_the_same_answer_everywhere(
    gateway: GatewayThread, worker: FakeWorker, data_url: Callable[..., str]
) -> None:
    """The space that belongs to the model's template is nobody's to see."""
    worker.reply(" two dots ")
    response = ask(gateway.url, RESPONSES, {"input": "how many?"}).json
    assert response["output"][0]["content"][0]["text"] == "two dots "
    caption = ask(gateway.url, RESPONSES, about(data_url(), "caption")).json
    assert caption["output"][0]["content"][0]["text"] == "two dots "
    chat = {"messages": [{"role": "user", "content": "how many?"}]}
    answer = ask(gateway.url, "/v1/chat/completions", chat).json
    assert answer["choices"][0]["message"]["content"] == "two dots "
    assert worker.submits[0].prompt == worker.submits[-1].prompt


def test_fields_that_all_bodies_share_reach_the_worker(gateway: GatewayThread, worker: FakeWorker) -> None:
    fields = {"ignore_eos": True, "priority": 3, "min_tokens": 4, "seed": 9, "stop": "zz"}
    for path, body in (
        (RESPONSES, {"input": "hi", "max_output_tokens": 5}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}),
        ("/v1/completions", {"prompt": "hi", "max_tokens": 5}),
    ):
        assert ask(gateway.url, path, {**body, **fields}).status == 200
        submit = worker.submits[-1]
        assert (submit.ignore_eos, submit.priority, submit.stop_ids, submit.max_tokens) == (True, 3, [], 5)
        assert (submit.sampling.min_tokens, submit.sampling.seed) == (4, 9)
    answer = ask(gateway.url, RESPONSES, {"input": "hi", "max_output_tokens": 2, "min_tokens": 3})
    assert (answer.status, answer.error["param"]) == (400, "min_tokens")


@pytest.mark.parametrize("answer", ["three", ""])
def test_an_answer_named_by_its_item_stands_in_its_place(answer: str) -> None:
    held = Conversations()
    said = (("user", "how many?"), ("assistant", "how many what?"), ("user", "dots"))
    asked = Turn(tuple(Message(role=role, content=text) for role, text in said))  # type: ignore[arg-type]
    output = [{"id": "msg_1", "role": "assistant", "content": [{"type": "output_text", "text": answer}]}]
    held.remember_answer("mine", "resp_1", asked, End(FinishReason.STOP, Usage()), output)
    items = [{"content": "dots"}, {"type": "item_reference", "id": "msg_1"}, {"content": "sure?"}]
    body = parse_body(json.dumps({"input": items}).encode())
    with pytest.raises(RequestError) as refused:
        recall(body, "theirs", held)
    assert (refused.value.code, refused.value.param) == (ErrorCode.NOT_FOUND, "input[1].id")
    assert recall(body, "mine", Conversations(), held) is None
    read = [(message.role, message.content) for message in read_input(body, 100).messages]
    assert read == [("user", "dots"), ("assistant", answer), ("user", "sure?")]
