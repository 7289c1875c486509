"""The official openai client, unmodified: chat, completions, models, errors, cancel."""

from __future__ import annotations

import asyncio

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from shared import protocol as wire
from shared.errors import ErrorCode, FinishReason
from tests.fake_worker import Action, End, FakeWorker, Token, ids_text, text_ids
from tests.gateway_thread import GatewayThread
from tests.keys import ANY_KEY

ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "what is it?"}]


def test_whole_answer(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.reply(" A wörld 🎈")
    answer = client.chat.completions.create(model="fake-vl", messages=ASK)
    assert answer.choices[0].message.content == "A wörld 🎈"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion" and answer.model == "fake-vl"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(text_ids(" A wörld 🎈"))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    prompt = wire.unpack_i32(worker.submits[0].prompt).tolist()
    assert prompt == [0, 1, 8, 2, *text_ids("what is it?"), 3]


def test_stream_has_the_shape_clients_expect(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.reply("héllo")
    chunks = list(
        client.chat.completions.create(
            model="fake-vl", messages=ASK, stream=True, stream_options={"include_usage": True}
        )
    )
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "héllo"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-2].choices[0].delta.content is None
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_length_and_stop(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.reply("one two three")
    cut = client.chat.completions.create(model="fake-vl", messages=ASK, max_completion_tokens=3)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("one", "length")
    stopped = client.chat.completions.create(model="fake-vl", messages=ASK, stop=["o t", "zzz"])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("one tw", "stop")
    assert stopped.usage is not None and stopped.usage.completion_tokens == 9


def test_a_matched_stop_string_frees_the_worker(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.reply("a STOP " + "b" * 500)
    client.chat.completions.create(model="fake-vl", messages=ASK, stop="STOP", max_tokens=600)
    assert worker.wait_cancelled(1) == [worker.submits[0].sequence_id]


def test_several_choices(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.reply("same")
    answer = client.chat.completions.create(model="fake-vl", messages=ASK, n=3, temperature=1, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert all(choice.message.content == "same" for choice in answer.choices)
    assert [submit.sampling.seed for submit in worker.submits] == [7, 8, 9]
    chunks = list(client.chat.completions.create(model="fake-vl", messages=ASK, n=2, stream=True))
    for index in range(2):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in mine) == "same"
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["stop"]


def test_sampling_reaches_the_worker(client: openai.OpenAI, worker: FakeWorker) -> None:
    client.chat.completions.create(
        model="fake-vl",
        messages=ASK,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=42,
        logit_bias={"20": -100},
        max_tokens=5,
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2},
    )
    sampling = worker.submits[0].sampling
    assert worker.submits[0].max_tokens == 5
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 5, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert (sampling.repetition_penalty, sampling.seed, sampling.logit_bias) == (1.1, 42, {20: -100.0})
    assert (sampling.suppress_ids, sampling.min_tokens) == ([3], 2)


def test_logprobs(client: openai.OpenAI, worker: FakeWorker) -> None:
    def script(_: wire.Submit) -> list[Action]:
        told = [wire.TokenLogprobs(0, 0, -0.25, wire.pack_i32([12, 13]), [-0.25, -float("inf")])] * 3
        return [*(Token(i, logprob=t) for i, t in zip(text_ids("é!"), told, strict=True)), End()]

    worker.script = script
    answer = client.chat.completions.create(model="fake-vl", messages=ASK, logprobs=True, top_logprobs=2)
    assert worker.submits[0].sampling.num_logprobs == 2
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [entry.bytes for entry in logprobs.content] == [[0xC3], [0xA9], [ord("!")]]
    assert [top.logprob for top in logprobs.content[0].top_logprobs] == [-0.25, -9999.0]
    chunks = client.chat.completions.create(
        model="fake-vl", messages=ASK, logprobs=True, top_logprobs=2, stream=True
    )
    entries = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content or []]
    assert len(entries) == 3


def test_picture_and_question(client: openai.OpenAI, worker: FakeWorker, picture_url: str) -> None:
    client.chat.completions.create(
        model="fake-vl",
        messages=[
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": picture_url}}]},
            {"role": "assistant", "content": "I see"},
            {"role": "user", "content": [{"type": "text", "text": "which colour?"}]},
        ],
    )
    submit, (crop, canvas) = worker.submits[0], worker.payloads[0]
    assert ids_text(wire.unpack_i32(submit.prompt).tolist()) == "be briefI seewhich colour?"
    image = submit.images[0]
    assert image.runs == [(1, 64)]
    assert len(crop) == 56 * 56 * 3
    assert len(canvas) == image.sheets[1].height * image.sheets[1].width * 3
    assert set(crop[0::3]) == {255} and set(crop[1::3]) == {0}


def test_response_format_becomes_a_grammar(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.reply('{"a":1}')
    schema: dict[str, object] = {"type": "object", "properties": {"a": {"type": "integer"}}}
    client.chat.completions.create(
        model="fake-vl",
        messages=ASK,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    grammar = worker.submits[0].grammar
    assert grammar is not None and grammar.kind == "json_schema" and '"integer"' in grammar.source


def test_errors_are_the_clients_own_exceptions(client: openai.OpenAI, worker: FakeWorker) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=ASK)
    assert missing.value.code == "model_not_found" and "fake-vl" in missing.value.message
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="fake-vl", messages=ASK, temperature=9)
    assert wrong.value.param == "temperature" and "2.0" in wrong.value.message
    with pytest.raises(openai.BadRequestError) as too_long:
        client.chat.completions.create(model="fake-vl", messages=ASK, max_tokens=2047)
    assert too_long.value.code == "context_length_exceeded"
    assert str(2048 - 5 - len("what is it?")) in too_long.value.message
    worker.reject(ErrorCode.QUEUE_FULL, retry_after_s=3.0)
    with pytest.raises(openai.RateLimitError) as busy:
        client.chat.completions.create(model="fake-vl", messages=ASK, stream=True)
    assert busy.value.response.headers["retry-after"] == "3"


def test_the_client_retries_a_full_queue_by_itself(gateway: GatewayThread, worker: FakeWorker) -> None:
    answers: list[list[Action]] = []

    def script(submit: wire.Submit) -> list[Action]:
        from tests.fake_worker import Reject

        answers.append([])
        if len(answers) == 1:
            return [Reject(ErrorCode.QUEUE_FULL, retry_after_s=0.05)]
        return [*map(Token, text_ids("ok")), End()]

    worker.script = script
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=ANY_KEY, max_retries=2) as client:
        assert (
            client.chat.completions.create(model="fake-vl", messages=ASK).choices[0].message.content == "ok"
        )
    assert len(answers) == 2


def test_an_error_in_mid_stream_is_raised(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.script = lambda _: [
        *map(Token, text_ids("so far")),
        End(FinishReason.ERROR, ErrorCode.NUMERICAL_ERROR, "NaN in a row"),
    ]
    text = ""
    with pytest.raises(openai.APIError, match="NaN in a row"):
        for chunk in client.chat.completions.create(model="fake-vl", messages=ASK, stream=True):
            text += chunk.choices[0].delta.content or ""
    assert text == "so far"


def test_closing_a_stream_cancels_in_the_worker(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.reply("x" * 900)
    stream = client.chat.completions.create(model="fake-vl", messages=ASK, stream=True, max_tokens=1000)
    next(iter(stream))
    stream.close()
    assert worker.wait_cancelled(1) == [worker.submits[0].sequence_id]


async def test_a_cancelled_task_cancels_in_the_worker(gateway: GatewayThread, worker: FakeWorker) -> None:
    worker.hold()
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=ANY_KEY) as client:
        asking = asyncio.create_task(client.chat.completions.create(model="fake-vl", messages=ASK))
        await asyncio.to_thread(worker.wait_submits, 1)
        asking.cancel()
        await asyncio.to_thread(worker.wait_cancelled, 1)
    gateway.wait_for(lambda: gateway.gateway.service.num_in_flight == 0)


def test_completions(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.reply("continued")
    answer = client.completions.create(model="fake-vl", prompt="once", echo=True, max_tokens=50)
    assert answer.object == "text_completion" and answer.choices[0].text == "oncecontinued"
    several = client.completions.create(model="fake-vl", prompt=["a", "b"], max_tokens=50)
    assert [choice.index for choice in several.choices] == [0, 1]
    ids = client.completions.create(model="fake-vl", prompt=text_ids("ids"), max_tokens=50)
    assert ids.choices[0].text == "continued"
    assert wire.unpack_i32(worker.submits[-1].prompt).tolist() == text_ids("ids")
    chunks = list(client.completions.create(model="fake-vl", prompt="once", stream=True, max_tokens=50))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "continued"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_best_of_n_are_all_n(client: openai.OpenAI) -> None:
    """As LangChain asks for several completions: `best_of` is what OpenAI's default for it would be."""
    answer = client.completions.create(model="fake-vl", prompt="once", n=2, best_of=2, max_tokens=50)
    assert [choice.index for choice in answer.choices] == [0, 1]
    with pytest.raises(openai.BadRequestError, match="at most n, 2,") as refused:
        client.completions.create(model="fake-vl", prompt="once", n=2, best_of=3, max_tokens=50)
    assert refused.value.param == "best_of"


def test_completions_usage_in_a_stream(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.reply("ab")
    chunks = list(
        client.completions.create(
            model="fake-vl", prompt="once", stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 2
    assert chunks[-1].choices == []


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("fake-vl", "model", "degas")
    assert client.models.retrieve("fake-vl").created == model.created
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_request_id_is_echoed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model="fake-vl", messages=ASK, extra_headers={"x-request-id": "mine-1"}
    )
    assert answer.headers["x-request-id"] == "mine-1" == answer.request_id
