"""What clients see of texts and tokens: first spaces, offsets, white space, counts, and answers that go on with a message."""

from __future__ import annotations

import json
from typing import Any, TypedDict

import msgspec
import pytest

from gateway.core.templates import choose_template
from gateway.generation import ChatOptions, RequestError
from shared import protocol as wire
from shared.errors import ErrorCode
from tests.fake_worker import CARD, End, FakeWorker, Token, ids_text, text_ids
from tests.gateway_thread import GatewayThread
from tests.http_client import Opened, ask
from tests.unit.gateway.core.test_tokens import piece_tokenizer

LLAMA = msgspec.structs.replace(
    CARD, family="llama", image=None, templates={}, suppress_ids=[], bos_id=1, eos_ids=[2]
)
PIECES = piece_tokenizer()
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}{{ mood }}"
)


class Files(TypedDict, total=False):
    """What a worker announces beside its card."""

    tokenizer_json: bytes
    chat_template: bytes


COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def scored(*token_ids: int) -> Any:
    """A script that says these tokens, each with a likely rival."""
    rival = wire.TokenLogprobs(0, 0, -1.0, wire.pack_i32([11]), [-0.1])
    return lambda _: [*(Token(token_id, logprob=rival) for token_id in token_ids), End()]


def piece(text: str) -> int:
    """The id of a piece that is in the vocabulary."""
    token_id = PIECES.token_to_id(text)
    assert token_id is not None
    return token_id


def prompt_of(worker: FakeWorker) -> list[int]:
    return wire.unpack_i32(worker.submits[-1].prompt).tolist()


@pytest.mark.slow
def test_a_completion_keeps_its_first_space_and_a_chat_answer_has_none() -> None:
    worker = FakeWorker(card=LLAMA, tokenizer_json=PIECES.to_str().encode(), chat_template=TEMPLATE.encode())
    upon = [piece("▁upon"), piece("▁a")]
    worker.script = scored(*upon)
    with worker, GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_ready()
        body = {"prompt": "Once", "logprobs": 0}
        (choice,) = ask(gateway.url, COMPLETIONS, body).json["choices"]
        assert choice["text"] == " upon a" == "".join(choice["logprobs"]["tokens"])
        assert choice["logprobs"]["text_offset"] == [0, 5]
        assert prompt_of(worker) == [1, PIECES.token_to_id("▁Once")]
        (choice,) = ask(gateway.url, COMPLETIONS, {"prompt": "Once", "echo": True}).json["choices"]
        assert choice["text"] == "Once upon a"
        (choice,) = ask(gateway.url, COMPLETIONS, {"prompt": prompt_of(worker), "echo": True}).json["choices"]
        assert choice["text"] == "Once upon a"
        ask(gateway.url, COMPLETIONS, {"prompt": "[INST]</s>"})
        assert prompt_of(worker)[1:] == [3, 2]  # special tokens are parsed here …
        user: dict[str, Any] = {"role": "user", "content": "</s>"}
        answer = ask(gateway.url, CHAT, {"messages": [user], "logprobs": True}).json["choices"][0]
        assert answer["message"]["content"] == "upon a"
        assert [token["token"] for token in answer["logprobs"]["content"]] == [" upon", " a"]
        assert prompt_of(worker).count(2) == 0  # … and text there
        said = [user, {"role": "assistant", "content": "Once", "prefix": True}]
        answer = ask(gateway.url, CHAT, {"messages": said}).json["choices"][0]
        assert answer["message"]["content"] == " upon a" and prompt_of(worker)[-1] == PIECES.token_to_id(
            "▁Once"
        )
        with Opened(gateway.url, CHAT, {"messages": [user], "stream": True}) as opened:
            deltas = [event["choices"][0]["delta"] for event in opened.events() if isinstance(event, dict)]
        assert "".join(delta.get("content", "") for delta in deltas) == "upon a"
        constrained = {"messages": [user], "guided_choice": [" upon a", " no"]}
        answer = ask(gateway.url, CHAT, constrained).json["choices"][0]
        assert answer["message"]["content"] == " upon a"


def test_repeated_prompts_count_each(gateway: GatewayThread, worker: FakeWorker) -> None:
    usage = ask(gateway.url, COMPLETIONS, {"prompt": ["abcd", "abcd"], "n": 2}).json["usage"]
    assert usage["prompt_tokens"] == 10 and usage["total_tokens"] == 10 + usage["completion_tokens"]


def test_offsets_are_where_tokens_begin_and_the_sampled_token_is_among_the_likely(
    gateway: GatewayThread, worker: FakeWorker
) -> None:
    text = "né🙂x"
    worker.script = scored(*text_ids(text))
    (choice,) = ask(gateway.url, COMPLETIONS, {"prompt": "p", "logprobs": 1, "echo": False}).json["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == text == "".join(logprobs["tokens"])
    assert logprobs["text_offset"] == [0, 1, 1, 2, 2, 2, 2, 3]
    for token, likely in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert token in likely and len(likely) == 2
    worker.script = scored(*text_ids(text))
    body = {"prompt": "p", "logprobs": 1, "stream": True}
    with Opened(gateway.url, COMPLETIONS, body) as opened:
        events = [event["choices"][0] for event in opened.events() if isinstance(event, dict)]
    offsets = [offset for event in events if event["logprobs"] for offset in event["logprobs"]["text_offset"]]
    assert offsets == logprobs["text_offset"]


def test_a_choice_comes_to_the_letter(gateway: GatewayThread, worker: FakeWorker) -> None:
    worker.reply(" no")
    messages = [{"role": "user", "content": "?"}]
    for more, expected in (({"guided_choice": [" yes", " no"]}, " no"), ({}, "no")):
        answer = ask(gateway.url, CHAT, {"messages": messages, **more})
        assert answer.json["choices"][0]["message"]["content"] == expected


@pytest.fixture
def templated() -> Any:
    return FakeWorker(card=LLAMA, chat_template=(b"{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
        b"{{ mood }}{% if add_generation_prompt %}>{% endif %}{% if tone == 'x' %}{{ raise_exception('no x') }}{% endif %}"))  # fmt: skip


def test_prefill_and_template_variables(templated: FakeWorker) -> None:
    user, begun = {"role": "user", "content": "u"}, {"role": "assistant", "content": "One, "}
    with templated as worker, GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_ready()

        def asked(**body: Any) -> str | tuple[str, str | None]:
            answer = ask(gateway.url, CHAT, body)
            if answer.status != 200:
                assert answer.status == 400
                return answer.error["code"], answer.error["param"]
            return bytes(token_id - 10 for token_id in prompt_of(worker)[0:]).decode()

        assert asked(messages=[user]) == "user:u;>"
        assert asked(messages=[user], add_generation_prompt=False) == "user:u;"
        assert asked(messages=[user, begun], continue_final_message=True) == "user:u;assistant:One, "
        assert asked(messages=[user, {**begun, "prefix": True}]) == "user:u;assistant:One, "
        assert asked(messages=[user], chat_template_kwargs={"mood": "glad"}) == "user:u;glad>"
        many = {"mood": "x" * 20_000}
        assert asked(messages=[user], chat_template_kwargs=many) == (
            "invalid_request",
            "chat_template_kwargs",
        )
        for name in ("messages", "tools", "_x"):
            code = "invalid_request" if name == "_x" else "unsupported"
            param = f"chat_template_kwargs.{name}"
            assert asked(messages=[user], chat_template_kwargs={name: 1}) == (code, param)
        assert asked(messages=[{**begun, "prefix": True}, user]) == ("invalid_request", "messages[0].prefix")
        assert asked(messages=[{**user, "prefix": True}]) == ("invalid_request", "messages[0].prefix")
        both = {"continue_final_message": True, "add_generation_prompt": True}
        assert asked(messages=[user, begun], **both) == ("invalid_request", "add_generation_prompt")
        refused = ask(gateway.url, CHAT, {"messages": [user], "chat_template_kwargs": {"tone": "x"}})
        assert refused.status == 400 and "no x" in refused.error["message"]
        assert asked(messages=[user], tools=[{"type": "function"}]) == ("invalid_request", "tools[0]")


def test_named_templates_are_chosen_by_name_and_for_tools(templated: FakeWorker) -> None:
    named = {"tool_use": "T{{ tools | tojson }}", "rag": "R"}
    templated.card = msgspec.structs.replace(
        LLAMA, capabilities=["chat", "completions"], chat_templates=named
    )
    user = {"role": "user", "content": "u"}
    with templated as worker, GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_ready()
        (model,) = gateway.gateway.service.models()
        tools = [{"type": "function", "function": {"name": "f"}}]
        for options, expected in (
            (ChatOptions(), "user:u;>"),
            (ChatOptions(tools=tools), "T" + json.dumps(tools)),
            (ChatOptions(template="rag"), "R"),
            (ChatOptions(template="tool_use"), "Tnull"),
        ):
            chosen = choose_template(model.templates, "m", options)
            assert chosen.render([user], options) == expected
        with pytest.raises(RequestError, match="shows no tools"):
            choose_template(model.templates, "m", ChatOptions(template="rag", tools=tools))
        for name, expected in (("default", "user:u;>"), ("rag", "R")):
            assert ask(gateway.url, CHAT, {"messages": [user], "chat_template": name}).status == 200
            assert ids_text(prompt_of(worker)) == expected
        for name in ("nosuch", "{{ messages }}"):
            refused = ask(gateway.url, CHAT, {"messages": [user], "chat_template": name})
            assert (refused.status, refused.error["param"]) == (400, "chat_template")
            assert "it has default, tool_use, rag" in refused.error["message"]
        listed = ask(gateway.url, "/v1/models", method="GET").json["data"][0]
        assert listed["chat_templates"] == ["default", "tool_use", "rag"]


def test_a_model_without_a_template_refuses_what_only_a_template_could_do(
    gateway: GatewayThread, worker: FakeWorker
) -> None:
    messages = [{"role": "user", "content": "u"}]
    answer = ask(gateway.url, CHAT, {"messages": messages, "chat_template_kwargs": {"a": 1}})
    assert (answer.status, answer.error["param"]) == (400, "chat_template_kwargs")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"tokenizer_json": b"{"}, "tokenizer cannot be read"),
        ({"chat_template": b"{% if %}"}, "does not compile"),
        ({"chat_template": b"\xff"}, "utf-8"),
    ],
)
def test_a_model_that_cannot_be_used_is_told_of_once_and_is_not_loading(files: Files, reason: str) -> None:
    with FakeWorker(**files) as worker, GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_for(lambda: reason in gateway.gateway.service.readiness()[1])
        ready = ask(gateway.url, "/readyz")
        assert ready.status == 503 and reason in ready.json["reason"] and "fake-vl" in ready.json["reason"]
        answer = ask(gateway.url, COMPLETIONS, {"prompt": "p"})
        assert answer.status == 500 and reason in answer.error["message"]
        link = gateway.gateway.service.workers[0].link
        num_hellos = len(worker.hellos)
        gateway.call(link._send_hello)
        gateway.wait_for(lambda: len(worker.hellos) > num_hellos)
        assert gateway.gateway.service.metrics.num_workers_lost == 1
        with pytest.raises(RequestError) as caught:
            gateway.call(lambda: gateway.gateway.service.model(None))
        assert caught.value.code is ErrorCode.INTERNAL
