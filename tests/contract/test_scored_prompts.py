"""Log-probabilities of prompts and budgets of thoughts, by official clients: what reaches a worker, and how it is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import ollama
import openai
import pytest

from shared import protocol as wire
from shared.protocol import ThinkingBudget
from tests.contract.chat_model import MARKS, chat_model
from tests.fake_worker import FakeWorker, text_ids
from tests.gateway_thread import GatewayThread
from tests.http_client import ask
from tests.keys import ANY_KEY

Chatty = tuple[GatewayThread, FakeWorker]


@pytest.fixture(scope="module")
def chatty() -> Iterator[Chatty]:
    with chat_model(has_marks=True) as served:
        yield served


def test_an_echo_has_the_prompts_log_probabilities(client: openai.OpenAI, worker: FakeWorker) -> None:
    """The texts join to the whole text; the first token has none."""
    worker.reply("ok")
    (choice,) = client.completions.create(
        model="fake-vl", prompt="héy", echo=True, logprobs=2, max_tokens=5
    ).choices
    assert choice.text == "héyok"
    told = choice.logprobs
    assert told is not None and told.tokens and told.token_logprobs and told.top_logprobs
    assert told.tokens == [
        "<|0|>",
        "h",
        "",
        "é",
        "y",
        "o",
        "k",
    ]  # a character of two tokens comes with its last
    assert told.text_offset == [0, 0, 1, 1, 2, 3, 4]
    assert told.token_logprobs == [None, -0.25, -0.5, -0.75, -1.0, 0.0, 0.0]
    likely: list[Any] = list(told.top_logprobs)
    assert likely[:2] == [None, {"h": 0.0, "i": -0.5}]
    assert worker.submits[-1].sampling.num_prompt_logprobs == 2


def test_the_prompt_alone_is_scored(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.reply("never shown")
    prompt: Any = ["ab", text_ids("cde")]
    answer = client.completions.create(model="fake-vl", prompt=prompt, echo=True, logprobs=0, max_tokens=0)
    assert [choice.text for choice in answer.choices] == ["ab", "cde"]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    told = [choice.logprobs for choice in answer.choices]
    assert [one.tokens for one in told if one is not None] == [["<|0|>", "a", "b"], ["c", "d", "e"]]
    assert answer.usage is not None and answer.usage.completion_tokens == 0
    assert worker.submits[-1].max_tokens == 1


def test_a_streamed_echo_comes_with_its_scores(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.reply("ok")
    chunks = list(
        client.completions.create(
            model="fake-vl", prompt="ab", echo=True, logprobs=1, max_tokens=5, stream=True
        )
    )
    first = chunks[0].choices[0]
    assert first.text == "ab" and first.logprobs is not None
    assert first.logprobs.token_logprobs == [None, -0.25, -0.5]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abok"
    assert chunks[1].choices[0].logprobs is not None and chunks[1].choices[0].logprobs.text_offset == [2]


def test_prompt_logprobs_are_vllms(chatty: Chatty) -> None:
    gateway, worker = chatty
    worker.reply("ok")
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "prompt_logprobs": 1, "n": 2}
    answer = ask(gateway.url, "/v1/chat/completions", body).json
    ids = wire.unpack_i32(worker.submits[-2].prompt).tolist()
    told = answer["prompt_logprobs"]
    assert told[0] is None and len(told) == len(ids)
    assert told[1] == {str(ids[1]): {"logprob": -0.25, "rank": 2, "decoded_token": "u"}}
    assert [one.sampling.num_prompt_logprobs for one in worker.submits[-2:]] == [1, -1]
    body = {"prompt": [["ab"], "c"][1], "prompt_logprobs": 2, "max_tokens": 0}
    (choice,) = ask(gateway.url, "/v1/completions", body).json["choices"]
    assert choice["text"] == "" and choice["prompt_logprobs"][0] is None
    assert choice["logprobs"] is None


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs"),
        ("/v1/completions", {"prompt": ["a" * 1900] * 40, "echo": True, "logprobs": 20}, "echo"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("/v1/chat/completions", {"messages": [], "prompt_logprobs": -1}, "prompt_logprobs"),
        ("/v1/chat/completions", {"messages": [], "thinking_budget": -1}, "thinking_budget"),
        (
            "/v1/chat/completions",
            {"messages": [], "thinking_budget": 1, "thinking_token_budget": 2},
            "thinking_budget",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused(gateway: GatewayThread, path: str, body: Any, param: str) -> None:
    refused = ask(gateway.url, path, body)
    assert refused.status == 400 and refused.error["param"] == param
    assert param in refused.error["message"]


def test_a_prompt_with_a_picture_is_not_scored(gateway: GatewayThread, picture_url: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": picture_url}}, {"type": "text", "text": "what?"}]
    body = {"messages": [{"role": "user", "content": content}], "prompt_logprobs": 0}
    refused = ask(gateway.url, "/v1/chat/completions", body)
    assert refused.status == 400 and refused.error["param"] == "prompt_logprobs"


# ------------------------------------------------------------ budgets of thoughts


@pytest.mark.parametrize("field", ["thinking_budget", "thinking_token_budget"])
def test_a_budget_reaches_the_worker_with_the_marks(chatty: Chatty, field: str) -> None:
    gateway, worker = chatty
    worker.reply_tokens([MARKS["<think>"], *text_ids("so"), MARKS["</think>"], *text_ids("ok")])
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=ANY_KEY, max_retries=0) as client:
        answer = client.chat.completions.create(
            model="fake-vl", messages=[{"role": "user", "content": "hi"}], extra_body={field: 12}
        )
    assert answer.choices[0].message.content == "ok"
    assert answer.choices[0].message.reasoning_content == "so"  # type: ignore[attr-defined]
    marks = [MARKS["<think>"]], [MARKS["</think>"]]
    assert worker.submits[-1].thinking == ThinkingBudget(12, *marks)


def test_anthropics_budget_is_kept(chatty: Chatty) -> None:
    gateway, worker = chatty
    worker.reply_tokens([MARKS["<think>"], *text_ids("so"), MARKS["</think>"], *text_ids("ok")])
    with anthropic.Anthropic(base_url=gateway.url, api_key=ANY_KEY, max_retries=0) as client:
        answer = client.messages.create(
            model="fake-vl",
            max_tokens=2000,
            thinking={"type": "enabled", "budget_tokens": 1024},
            messages=[{"role": "user", "content": "hi"}],
        )
    assert [block.type for block in answer.content] == ["thinking", "text"]
    asked = worker.submits[-1].thinking
    assert asked is not None and asked.budget == 1024


@pytest.mark.parametrize("field", ["thinking_budget", "thinking_token_budget"])
def test_responses_have_the_same_budget(chatty: Chatty, field: str) -> None:
    gateway, worker = chatty
    worker.reply_tokens([MARKS["<think>"], *text_ids("so"), MARKS["</think>"], *text_ids("ok")])
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=ANY_KEY, max_retries=0) as client:
        answer = client.responses.create(model="fake-vl", input="hi", extra_body={field: 12})
    assert answer.output_text == "ok" and [item.type for item in answer.output] == ["reasoning", "message"]
    marks = [MARKS["<think>"]], [MARKS["</think>"]]
    assert worker.submits[-1].thinking == ThinkingBudget(12, *marks)


def test_ollamas_options_have_a_budget(chatty: Chatty) -> None:
    """By its official client, which passes options on as they are."""
    gateway, worker = chatty
    worker.reply_tokens([MARKS["<think>"], *text_ids("so"), MARKS["</think>"], *text_ids("ok")])
    client = ollama.Client(host=gateway.url)
    answer = client.chat(
        "fake-vl", [{"role": "user", "content": "hi"}], think=True, options={"thinking_budget": 7}
    )
    assert (answer.message.thinking, answer.message.content) == ("so", "ok")
    assert worker.submits[-1].thinking == ThinkingBudget(7, [MARKS["<think>"]], [MARKS["</think>"]])
    worker.reply_tokens([MARKS["<think>"], MARKS["</think>"], *text_ids("ok")])
    assert client.generate("fake-vl", "hi", options={"thinking_budget": 0}).response == "ok"
    asked = worker.submits[-1].thinking
    assert asked is not None and asked.budget == 0


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/responses", {"input": "hi", "thinking_budget": -1}, "thinking_budget"),
        (
            "/v1/responses",
            {"input": "hi", "thinking_budget": 1, "thinking_token_budget": 2},
            "thinking_budget",
        ),
        ("/v1/responses", {"input": "hi", "thinking_budget": 5}, "thinking_budget"),
        (
            "/v1/responses",
            {"input": "hi", "thinking_budget": 5, "degas": {"task": "caption"}},
            "thinking_budget",
        ),
        (
            "/api/chat",
            {
                "model": "fake-vl",
                "messages": [{"role": "user", "content": "hi"}],
                "options": {"thinking_budget": 5},
            },
            "options.thinking_budget",
        ),
        (
            "/api/chat",
            {"model": "fake-vl", "messages": [], "options": {"thinking_budget": "5"}},
            "options.thinking_budget",
        ),
        (
            "/api/generate",
            {"model": "fake-vl", "prompt": "hi", "raw": True, "options": {"thinking_budget": 5}},
            "options.thinking_budget",
        ),
    ],
)
def test_budgets_are_refused_by_name_where_they_cannot_be(
    gateway: GatewayThread, path: str, body: Any, param: str
) -> None:
    """The model of this gateway does not think."""
    refused = ask(gateway.url, path, body)
    assert refused.status == 400
    error = refused.json["error"]
    assert param in (error if isinstance(error, str) else error["message"])


def test_a_constrained_answer_has_no_budget(chatty: Chatty) -> None:
    gateway, worker = chatty
    worker.reply("{}")
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "thinking_budget": 5,
        "response_format": {"type": "json_object"},
    }
    assert ask(gateway.url, "/v1/chat/completions", body).status == 200
    assert worker.submits[-1].thinking is None


def test_a_budget_that_cannot_be_kept_is_refused(gateway: GatewayThread) -> None:
    """By a model that does not think, and by one whose marks are text."""
    with chat_model() as (spelt, _):
        for url, words in ((gateway.url, "does not think"), (spelt.url, "tokens of their own")):
            body = {"messages": [{"role": "user", "content": "hi"}], "thinking_budget": 5}
            refused = ask(url, "/v1/chat/completions", body)
            assert refused.status == 400 and refused.error["param"] == "thinking_budget"
            assert words in refused.error["message"]
