"""The official ollama client, unmodified: chat and generate whole and streamed, tools, thinking, what is served, errors."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import ollama
import pytest
from PIL import Image

from shared import protocol as wire
from tests.contract.chat_model import chat_model
from tests.fake_worker import FakeWorker, text_ids
from tests.gateway_thread import GatewayThread

ASK = [{"role": "user", "content": "rain?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The sky over a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture
def llama(gateway: GatewayThread) -> ollama.Client:
    return ollama.Client(host=gateway.url)


@pytest.fixture
def chatting() -> Iterator[tuple[ollama.Client, FakeWorker]]:
    with chat_model() as (gateway, worker):
        yield ollama.Client(host=gateway.url), worker


def test_chat_whole_and_streamed(llama: ollama.Client, worker: FakeWorker) -> None:
    worker.reply("It räins.")
    whole = llama.chat("fake-vl", ASK)
    assert whole.message.content == "It räins." and whole.done and whole.done_reason == "stop"
    assert whole.eval_count == len(text_ids("It räins.")) and whole.prompt_eval_count
    pieces = list(llama.chat("fake-vl", ASK, stream=True))
    assert "".join(piece.message.content or "" for piece in pieces) == "It räins."
    assert [piece.done for piece in pieces[:-1]] == [False] * (len(pieces) - 1) and pieces[-1].done


def test_generate_whole_streamed_and_without_a_prompt(llama: ollama.Client, worker: FakeWorker) -> None:
    worker.reply("Yes")
    assert llama.generate("fake-vl", "rain?").response == "Yes"
    assert "".join(piece.response or "" for piece in llama.generate("fake-vl", "rain?", stream=True)) == "Yes"
    assert llama.generate("fake-vl", "").done_reason == "load"
    cut = llama.generate("fake-vl", "rain?", options={"num_predict": 1, "temperature": 0, "seed": 3})
    assert (cut.response, cut.done_reason) == ("Y", "length")


def test_a_picture_reaches_the_worker(llama: ollama.Client, worker: FakeWorker) -> None:
    file = io.BytesIO()
    Image.new("RGB", (90, 60), "red").save(file, "PNG")
    worker.reply("Red.")
    llama.generate("fake-vl", "what colour?", images=[base64.b64encode(file.getvalue()).decode()])
    llama.chat("fake-vl", [{**ASK[0], "images": [file.getvalue()]}])
    assert [len(submit.images) for submit in worker.submits] == [1, 1]


def test_tools_and_thinking(chatting: tuple[ollama.Client, FakeWorker]) -> None:
    client, worker = chatting
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    worker.reply(f"<think>hm</think>{call}")
    whole = client.chat("fake-vl", ASK, tools=[TOOL], think=True)
    assert whole.message.thinking == "hm" and whole.message.tool_calls is not None
    assert whole.message.tool_calls[0].function.arguments == {"city": "Oslo"}
    pieces = list(client.chat("fake-vl", ASK, tools=[TOOL], stream=True))
    calls = [called for piece in pieces for called in piece.message.tool_calls or ()]
    assert [(one.function.name, one.function.arguments) for one in calls] == [("weather", {"city": "Oslo"})]
    history: list[Any] = [*ASK, whole.message, {"role": "tool", "content": "wet", "tool_name": "weather"}]
    client.chat("fake-vl", history, tools=[TOOL])
    prompt = wire.unpack_i32(worker.submits[-1].prompt).tolist()
    assert "wet" in bytes(i - 10 for i in prompt if i >= 10).decode()


def test_what_is_served(llama: ollama.Client, chatting: tuple[ollama.Client, FakeWorker]) -> None:
    assert [model.model for model in llama.list().models] == ["fake-vl"]
    assert [(model.model, model.size) for model in llama.ps().models] == [("fake-vl", 1234)]
    shown = llama.show("fake-vl")
    assert shown.capabilities == ["completion", "vision"]
    assert chatting[0].show("fake-vl").capabilities == ["completion", "tools", "thinking"]


def test_a_schema_is_a_constraint(llama: ollama.Client, worker: FakeWorker) -> None:
    worker.reply('{"a": 1}')
    llama.chat("fake-vl", ASK, format={"type": "object", "properties": {"a": {"type": "integer"}}})
    llama.chat("fake-vl", ASK, format="json")
    assert [submit.grammar is not None for submit in worker.submits] == [True, True]


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda client: client.chat("other", ASK), "does not exist"),
        (lambda client: client.pull("llama3"), "/api/pull: models are not managed"),
        (lambda client: client.embed("fake-vl", "x"), "no model here makes embeddings"),
        (lambda client: client.chat("fake-vl", ASK, options={"num_predict": 0}), "options.num_predict"),
        (lambda client: client.chat("fake-vl", ASK, options={"mirostat": 2}), "options.mirostat"),
        (lambda client: client.chat("fake-vl", ASK, options={"mirostat_tau": 5.0}), "options.mirostat_tau"),
        (lambda client: client.generate("fake-vl", "x", suffix="y"), "suffix is not supported"),
        (lambda client: client.chat("fake-vl", ASK, think=True), "think"),
        (lambda client: client.chat("fake-vl", ASK, format={"type": "odd"}), "format"),
        (lambda client: client.chat("fake-vl", [{**ASK[0], "images": ["!!!!"]}]), "base64"),
    ],
)
def test_refusals_are_the_clients_own_exceptions(llama: ollama.Client, ask: object, words: str) -> None:
    assert callable(ask)
    with pytest.raises(ollama.ResponseError, match=words):
        ask(llama)
