"""Chat templates render as transformers renders them: `trl`'s public ones, and small ones for each feature."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.core.templates import ChatTemplate
from gateway.core.tokens import ModelTokens
from gateway.generation import ChatOptions, RequestError
from shared.errors import ErrorCode
from tests.fake_worker import CARD, byte_tokenizer

TOKENS = ModelTokens(byte_tokenizer().to_str().encode())
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
NAMED = msgspec.structs.replace(CARD, special_tokens=SPECIAL)

_CALL = {"name": "weather", "arguments": {"city": "Genève", "days": [1, 2]}}
_CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "What is the weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "abcdefghi", "type": "function", "function": _CALL}],
    },
    {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": '{"sun": true}'},
    {"role": "assistant", "content": "Sunny."},
    {"role": "user", "content": "Thanks!"},
]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hello, <b>wörld</b> & 'you'"}],
    "several": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  Hi \n"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye", "name": "ann"},
    ],
    "thought": [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "Two and two."},
        {"role": "user", "content": "3+3?"},
    ],
    "thought inside": [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\n4"},
        {"role": "user", "content": "3+3?"},
    ],
    "called": _CALLED,
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "!"}]}
    ],
    "unfinished": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two, "}],
    "two users": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
}
OPTIONS = {
    "answer": ChatOptions(),
    "no prompt": ChatOptions(add_generation_prompt=False),
    "unthinking": ChatOptions(variables={"enable_thinking": False, "thinking": False}),
    "going on": ChatOptions(add_generation_prompt=False, continue_final_message=True),
}

OWN = {
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% if loop.index > 3 %}{% break %}{% endif %}{{ m.content }}|{% endfor %}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "tojson": (
        "{{ messages[0] | tojson }}{{ messages | tojson(indent=2) }}"
        "{{ messages[0] | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}"
    ),
    "words": "{{ raise_exception('roles must alternate, said ' ~ messages[0].role) }}",
    "time": "{{ strftime_now('%Y') | length }}{{ bos_token }}{{ pad_token }}{{ messages[-1].content | trim }}",
    "namespace": (
        "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{{ n.x }}{{ m.name }}"
        "{% endfor %}{{ dict(a=1) | tojson }}"
    ),
    "underscores": "{% set n = namespace(__x=1) %}{{ n.__x }}",
    "blocks": "  {% if messages %}\n{{ messages[0].content }}\n  {% endif %}\n{# nothing #}\nend",
    "parts": (
        "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }};{% endif %}"
        "{% endfor %}{% endfor %}"
    ),
    "calls": (
        "{% for m in messages %}{{ m.role }}{{ m.tool_call_id or '' }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{{ m.content }}{% endfor %}"
    ),
}


def oracle(source: str, messages: list[dict[str, Any]], options: ChatOptions) -> str | None:
    """As transformers has it; None where it refuses."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template(
            [messages],
            chat_template=source,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
            **{**SPECIAL, **options.variables},
        )
    except Exception:
        return None
    text: str = rendered[0]
    return text


def ours(template: ChatTemplate, messages: list[dict[str, Any]], options: ChatOptions) -> str | None:
    try:
        return template.render(messages, options)
    except RequestError as error:
        assert error.code is ErrorCode.INVALID_REQUEST
        return None


def check(source: str) -> int:
    """Compare every conversation under every option; how many were rendered."""
    template = ChatTemplate(source, TOKENS, NAMED)
    num_rendered = 0
    for name, messages in CONVERSATIONS.items():
        for how, options in OPTIONS.items():
            expected = oracle(source, messages, options)
            found = ours(template, messages, options)
            if name == "parts" and found != expected:
                # Templates that read text only get the parts joined, where transformers shows a list's repr or fails.
                joined = [{**message, "content": "Hello\n!"} for message in messages]
                expected = oracle(source, joined, options)
            if found != expected:
                # Templates that read parts only get texts as parts, as transformers' processors do; its tokenizers pass
                # over the text in silence.
                parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
                expected = oracle(source, parts, options)
            assert found == expected, (name, how)
            num_rendered += found is not None
    return num_rendered


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_own_templates_render_as_transformers_does(name: str) -> None:
    assert check(OWN[name]) or name in ("words", "underscores")


def public_templates() -> list[Path]:
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        return []
    return sorted((Path(found.origin).parent / "chat_templates").glob("*.jinja"))


@pytest.mark.slow
@pytest.mark.skipif(not public_templates(), reason="trl is not installed: pip install --no-deps trl")
@pytest.mark.parametrize("file", public_templates(), ids=lambda file: file.stem)
def test_public_templates_render_as_transformers_does(file: Path) -> None:
    assert check(file.read_text()) > 0


def test_an_objection_is_the_templates_own_words() -> None:
    with pytest.raises(RequestError, match="roles must alternate, said user") as caught:
        ChatTemplate(OWN["words"], TOKENS, CARD).render(CONVERSATIONS["one"], ChatOptions())
    assert (caught.value.code, caught.value.param) == (ErrorCode.INVALID_REQUEST, "messages")


def test_a_calls_arguments_are_json_text_or_an_object_as_the_template_wants_them() -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": '{"a":"é"}'}}]
    messages = [{"role": "assistant", "content": None, "tool_calls": calls}]
    for source, expected in (
        ("{{ messages[0].tool_calls[0].function.arguments | tojson }}", '{"a": "é"}'),
        ("{{ 'args: ' + messages[0].tool_calls[0].function.arguments }}", 'args: {"a":"é"}'),
    ):
        assert ChatTemplate(source, TOKENS, CARD).render(messages, ChatOptions()) == expected


@pytest.mark.parametrize("content", [None, "", "  ", [{"type": "text", "text": " "}]])
def test_nothing_cannot_be_gone_on_with(content: Any) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", TOKENS, CARD)
    with pytest.raises(RequestError) as caught:
        template.render(
            [{"role": "assistant", "content": content}], ChatOptions(False, continue_final_message=True)
        )
    assert caught.value.param == "continue_final_message"
