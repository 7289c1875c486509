"""The official anthropic client, unmodified: messages whole and streamed, tools, thinking, pictures, counting, errors."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import anthropic
import pytest
from anthropic.types import MessageParam, ToolParam
from PIL import Image

from shared import protocol as wire
from shared.errors import ErrorCode, FinishReason
from tests.contract.chat_model import chat_model
from tests.fake_worker import Action, End, FakeWorker, Token, text_ids
from tests.gateway_thread import GatewayThread

ASK: list[MessageParam] = [{"role": "user", "content": "rain?"}]
WEATHER: ToolParam = {
    "name": "weather",
    "description": "The sky over a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = 'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture
def claude(gateway: GatewayThread) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def chatting() -> Iterator[tuple[anthropic.Anthropic, FakeWorker]]:
    """A client of a model with a chat template that shows tools and thinks."""
    with (
        chat_model() as (gateway, worker),
        anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0) as client,
    ):
        yield client, worker


def test_whole_message(claude: anthropic.Anthropic, worker: FakeWorker) -> None:
    worker.reply("It rains.")
    answer = claude.messages.create(model="fake-vl", max_tokens=40, messages=ASK)
    (block,) = answer.content
    assert block.type == "text" and block.text == "It rains."
    assert (answer.role, answer.stop_reason, answer.model) == ("assistant", "end_turn", "fake-vl")
    assert answer.usage.output_tokens == len(text_ids("It rains."))
    counted = claude.messages.count_tokens(model="fake-vl", messages=ASK)
    assert counted.input_tokens == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)


def test_stream_by_the_clients_own_helper(claude: anthropic.Anthropic, worker: FakeWorker) -> None:
    worker.reply("It räins.")
    with claude.messages.stream(model="fake-vl", max_tokens=40, messages=ASK) as stream:
        assert "".join(stream.text_stream) == "It räins."
        message = stream.get_final_message()
    assert message.stop_reason == "end_turn" and message.usage.output_tokens == 10


def test_length_and_stop_sequences(claude: anthropic.Anthropic, worker: FakeWorker) -> None:
    worker.reply("one two three")
    cut = claude.messages.create(model="fake-vl", max_tokens=3, messages=ASK)
    assert cut.stop_reason == "max_tokens"
    stopped = claude.messages.create(model="fake-vl", max_tokens=40, messages=ASK, stop_sequences=["two"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "two")


def test_a_picture_reaches_the_worker(claude: anthropic.Anthropic, worker: FakeWorker) -> None:
    file = io.BytesIO()
    Image.new("RGB", (90, 60), "red").save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    worker.reply("Red.")
    content: MessageParam = {
        "role": "user",
        "content": [
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}},
            {"type": "text", "text": "what colour?"},
        ],
    }
    claude.messages.create(model="fake-vl", max_tokens=40, messages=[content])
    assert len(worker.submits[0].images) == 1


def test_tools_and_thinking_whole_and_streamed(chatting: tuple[anthropic.Anthropic, FakeWorker]) -> None:
    client, worker = chatting
    worker.reply(f"<think>\nhm\n</think>\n\n{CALL}")
    answer = client.messages.create(model="fake-vl", max_tokens=400, messages=ASK, tools=[WEATHER])
    assert [block.type for block in answer.content] == ["thinking", "text", "tool_use"]
    thinking, text, call = answer.content
    assert thinking.type == "thinking" and thinking.thinking == "hm"
    assert text.type == "text" and text.text == "Let me look."
    assert call.type == "tool_use" and (call.name, call.input) == ("weather", {"city": "Oslo"})
    assert answer.stop_reason == "tool_use"
    with client.messages.stream(model="fake-vl", max_tokens=400, messages=ASK, tools=[WEATHER]) as stream:
        streamed = stream.get_final_message()
    assert [block.type for block in streamed.content] == ["thinking", "text", "tool_use"]
    last = streamed.content[-1]
    assert last.type == "tool_use" and last.input == {"city": "Oslo"}
    assert streamed.stop_reason == "tool_use"


def test_a_history_with_calls_and_results_is_shown_to_the_model(
    chatting: tuple[anthropic.Anthropic, FakeWorker],
) -> None:
    client, worker = chatting
    worker.reply("It rains.")
    history: list[MessageParam] = [
        *ASK,
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "wet", "is_error": True}
            ],
        },
    ]
    client.messages.create(
        model="fake-vl", max_tokens=40, messages=history, system="Be brief.", tools=[WEATHER]
    )
    prompt = wire.unpack_i32(worker.submits[0].prompt).tolist()
    text = bytes(i - 10 for i in prompt if i >= 10).decode()
    assert "Be brief." in text and '"city": "Oslo"' in text and "Error: wet" in text


def test_a_tool_can_be_forced(chatting: tuple[anthropic.Anthropic, FakeWorker]) -> None:
    client, worker = chatting
    worker.reply('{"name": "weather", "arguments": {"city": "Oslo"}}')
    answer = client.messages.create(
        model="fake-vl",
        max_tokens=100,
        messages=ASK,
        tools=[WEATHER],
        tool_choice={"type": "tool", "name": "weather"},
    )
    (call,) = answer.content
    assert call.type == "tool_use" and call.input == {"city": "Oslo"}
    assert worker.submits[0].grammar is not None


def test_refusals_are_the_clients_own_exceptions(claude: anthropic.Anthropic, worker: FakeWorker) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        claude.messages.create(model="other", max_tokens=4, messages=ASK)
    body = missing.value.body
    assert isinstance(body, dict) and body["type"] == "error" and body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        claude.messages.create(model="fake-vl", max_tokens=5000, messages=ASK)
    with pytest.raises(anthropic.BadRequestError, match="colour: this parameter is not known"):
        claude.messages.create(model="fake-vl", max_tokens=4, messages=ASK, extra_body={"colour": 1})
    with pytest.raises(anthropic.BadRequestError, match=r"content\[0\]"):
        wrong: MessageParam = {"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}  # fmt: skip
        claude.messages.create(model="fake-vl", max_tokens=4, messages=[wrong])


def test_an_error_in_mid_stream_is_raised(claude: anthropic.Anthropic, worker: FakeWorker) -> None:
    def script(_: wire.Submit) -> list[Action]:
        return [Token(50), End(FinishReason.ERROR, ErrorCode.WORKER_LOST, "gone")]

    worker.script = script
    with pytest.raises(anthropic.APIStatusError, match="gone"):
        list(claude.messages.create(model="fake-vl", max_tokens=4, messages=ASK, stream=True))
