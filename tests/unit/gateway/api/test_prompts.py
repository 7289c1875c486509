"""Chat templates, prompts of models without one, and what a template may not do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from gateway.core.templates import ChatTemplate
from gateway.core.tokens import ModelTokens
from gateway.generation import ChatOptions, RequestError
from shared import protocol as wire
from tests.fake_worker import CARD, FakeWorker, byte_tokenizer, text_ids
from tests.gateway_thread import GatewayThread
from tests.http_client import ask

TOKENS = ModelTokens(byte_tokenizer().to_str().encode())
CHATML = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|4|>{% endif %}"
)


def render(source: str, *texts: str) -> str:
    messages: list[dict[str, object]] = [{"role": "user", "content": text} for text in texts]
    return ChatTemplate(source, TOKENS, CARD).render(messages, ChatOptions())


def test_a_template_sees_the_whole_conversation() -> None:
    assert render(CHATML, "a", "b") == "<|0|>[user]a[user]b<|4|>"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ raise_exception('no system messages') }}",
        "{{ 1 / 0 }}",
        "{% include 'etc/passwd' %}",
        "{% for a in range(9999) %}{{ 'x' * 1000 }}{% endfor %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(RequestError) as caught:
        render(source, "secret question")
    assert "secret question" not in caught.value.message


def test_a_template_that_does_not_compile_is_refused() -> None:
    with pytest.raises(RequestError, match="compile"):
        render("{% if %}", "a")


@pytest.mark.slow
def test_a_template_that_does_not_come_back_costs_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.core.templates._DEADLINE_S", 0.1)
    slow = "{% for a in range(9999) %}{% for b in range(700) %}{% endfor %}{% endfor %}"
    template = ChatTemplate(slow + CHATML, TOKENS, CARD)

    async def work() -> None:
        with pytest.raises(RequestError, match="took longer"):
            await template.render_async([{"role": "user", "content": "a"}], ChatOptions())

    asyncio.run(work())


def test_what_users_type_is_never_a_control_token() -> None:
    assert TOKENS.encode("<|0|>") == text_ids("<|0|>")
    assert TOKENS.encode_parsed("<|0|>") == [0]


LLAMA = msgspec.structs.replace(CARD, family="llama", image=None, templates={}, suppress_ids=[])


def test_a_templated_model_through_the_gateway() -> None:
    worker = FakeWorker(card=LLAMA, chat_template=CHATML.encode())
    with worker, GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_ready()
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
        assert ask(gateway.url, "/v1/chat/completions", {"messages": messages}).status == 200
        prompt = wire.unpack_i32(worker.submits[0].prompt).tolist()
        assert prompt == [0, *text_ids("[system]s[user]u"), 4]
        part: dict[str, Any] = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
        with_picture = {"messages": [{"role": "user", "content": [part]}]}
        refused = ask(gateway.url, "/v1/chat/completions", with_picture)
        assert refused.status == 400 and "pictures" in refused.error["message"]
        assert ask(gateway.url, "/v1/query", {"question": "x"}).status == 400


def test_without_a_template_chat_is_refused_in_words() -> None:
    with FakeWorker(card=LLAMA) as worker, GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_ready()
        answer = ask(gateway.url, "/v1/chat/completions", {"messages": [{"role": "user", "content": "u"}]})
        assert answer.status == 400 and "/v1/completions" in answer.error["message"]
        assert "--chat-template FILE" in answer.error["message"]
        answer = ask(gateway.url, "/v1/responses", {"input": "u"})
        assert answer.status == 400 and "/v1/completions" in answer.error["message"]
        assert ask(gateway.url, "/v1/models", method="GET").json["data"][0]["chat_templates"] == []
        assert ask(gateway.url, "/v1/completions", {"prompt": "u"}).status == 200


def test_more_pictures_than_the_model_takes_are_refused_with_its_bound(
    gateway: GatewayThread, worker: FakeWorker, data_url: Callable[..., str]
) -> None:
    def turn(text: str, *colours: str) -> dict[str, Any]:
        parts = [{"type": "image_url", "image_url": {"url": data_url(colour=colour)}} for colour in colours]
        return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}

    chat = "/v1/chat/completions"
    answer = ask(gateway.url, chat, {"messages": [turn("a", "red"), turn("compare", *["blue"] * 16)]})
    assert (answer.status, answer.error["code"]) == (400, "unsupported")
    assert answer.error["param"] == "messages[1].content[15].image_url.url"
    assert "at most 16" in answer.error["message"]
    assert ask(gateway.url, chat, {"messages": [turn("a", "red"), turn("b", "blue", "red")]}).status == 200
    digests = [image.digest for image in worker.submits[0].images]
    assert digests[0] == digests[2] != digests[1]
