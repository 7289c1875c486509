"""What a history says is shown to the model, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest

from gateway.api import chat
from gateway.core.templates import ChatTemplate
from gateway.core.tokens import ModelTokens
from gateway.generation import ChatOptions, RequestError
from shared.errors import ErrorCode
from tests.fake_worker import CARD, byte_tokenizer, ids_text, text_ids
from tests.unit.gateway.api.fake_core import FakeCore, FakeModel

TOKENS = ModelTokens(byte_tokenizer().to_str().encode())
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "hi", "name": "ann"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
    {"role": "user", "content": "so?"},
]
WHOLE = (
    "{% for m in messages %}{{ m.role }} {{ m.name }} {{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}\n"
    "{% endfor %}"
)


class Templated(FakeModel):
    """A text model with a real template."""

    def __init__(self, source: str) -> None:
        super().__init__(
            msgspec.structs.replace(CARD, family="llama", image=None, templates={}),
            template_names=["default"],
        )
        self.template = ChatTemplate(source, TOKENS, self.card)

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> list[int]:
        return text_ids(self.template.render(list(messages), options))


async def ask(model: FakeModel, messages: list[dict[str, Any]]) -> str:
    """The prompt, or the field that was refused."""
    try:
        body = json.dumps({"messages": messages}).encode()
        prepared = await chat.prepare(FakeCore(model), body, request_id="r", tenant="t")
    except RequestError as error:
        assert (
            error.code is ErrorCode.UNSUPPORTED and error.param is not None and error.param in error.message
        )
        return "refused " + error.param
    return ids_text(prepared.requests[0].prompt_ids)


async def test_a_template_that_shows_all_of_a_history_gets_it() -> None:
    prompt = await ask(Templated(WHOLE), HISTORY)
    assert "ann" in prompt and '"name": "f"' in prompt and "sunny" in prompt


@pytest.mark.parametrize(
    ("hidden", "param"),
    [
        ("m.name", "messages[0].name"),
        ("m.tool_calls | tojson if m.tool_calls", "messages[1].tool_calls"),
        ("m.content", "messages[2].role"),
    ],
)
async def test_what_a_template_passes_over_is_refused_by_name(hidden: str, param: str) -> None:
    source = WHOLE.replace("{{ " + hidden + " }}", "{{ m.content if m.role == 'user' }}")
    assert await ask(Templated(source), HISTORY) == "refused " + param


async def test_a_field_shown_for_another_role_only_is_refused() -> None:
    source = WHOLE.replace("{{ m.name }}", "{{ m.name if m.role == 'assistant' }}")
    messages = [
        {**HISTORY[0]},
        {"role": "assistant", "content": "x", "name": "bob"},
        {"role": "user", "content": "y"},
    ]
    assert await ask(Templated(source), messages) == "refused messages[0].name"
    assert "bob" in await ask(Templated(source), messages[1:])


async def test_a_template_that_needs_the_field_shows_it() -> None:
    source = "{% for m in messages %}{{ raise_exception('whose?') if not m.name }}{{ m.content }}{% endfor %}"
    assert await ask(Templated(source), [HISTORY[0]]) == "hi"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (HISTORY[0], "messages[0].name"),
        ({**HISTORY[1], "content": "x"}, "messages[0].tool_calls"),
        (HISTORY[2], "messages[0].tool_call_id"),
        ({"role": "tool", "content": "x"}, "messages[0].role"),
    ],
)
async def test_a_model_that_is_asked_one_question_refuses_what_it_has_no_place_for(
    message: dict[str, Any], param: str
) -> None:
    assert await ask(FakeModel(), [message, {"role": "user", "content": "q"}]) == "refused " + param


class Counted(Templated):
    """Counts how often a conversation is rendered."""

    num = 0

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> list[int]:
        self.num += 1
        return await super().encode_chat(messages, options)


async def test_what_was_found_to_be_shown_is_not_looked_for_again() -> None:
    model = Counted(WHOLE)
    await ask(model, HISTORY)
    assert model.num == 4  # once for the prompt, and once for each of name, tool_calls and the result
    await ask(model, [*HISTORY, {"role": "assistant", "content": "", "tool_calls": [CALL]}])
    assert model.num == 5
    await ask(model, [{"role": "system", "content": "s", "name": "bob"}])  # another role's name
    assert model.num == 7


async def test_what_is_passed_over_is_refused_each_time() -> None:
    model = Counted(WHOLE.replace("{{ m.name }}", ""))
    for _ in range(2):
        assert await ask(model, HISTORY) == "refused messages[0].name"
