"""Which chat templates are sure to end at once, and may be rendered without a thread."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.core.template_bounds import ends_at_once
from gateway.core.templates import ChatTemplate
from gateway.core.tokens import ModelTokens
from gateway.generation import ChatOptions
from loadtest.gateway.engine import CHAT_TEMPLATE, tokenizer_json
from shared.protocol import ModelCard

CARD = ModelCard("m", "llama", 4096, 9000, None, [])


def verdict(source: str) -> bool:
    return ends_at_once(ImmutableSandboxedEnvironment(extensions=[loopcontrols]).parse(source))


@pytest.mark.parametrize(
    "source",
    [
        CHAT_TEMPLATE,
        "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content | trim }}",
        "{% set first = messages[0]['content'].strip() %}{% for m in messages[1:] %}{{ first ~ m.content }}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    ],
)
def test_plain_templates_end_at_once(source: str) -> None:
    assert verdict(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(100000) %}x{% endfor %}",
        "{% for a in messages %}{% for b in messages %}x{% endfor %}{% endfor %}",
        "{% for c in messages[0].content %}x{% endfor %}",
        "{% set messages = messages[0].content %}{% for c in messages %}x{% endfor %}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{% for m in messages if m.content * 9 %}x{% endfor %}",
        "{% set x = 'a' %}{% set x = x + x %}{{ x }}",
        "{% set n = namespace(x='a') %}{% for m in messages %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ 'a' * 1000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ messages[0].content.replace('', 'x') }}",
        "{{ messages[0].content.rjust(1000000000) }}",
        "{{ 'a' | center(1000000000) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set x %}{{ messages[0].content }}{% endset %}{{ x }}",
        "{{ messages | tojson }}",
        "{{ raise_exception(*messages) }}",
        "{{ messages[0].content }}" * 1000,
    ],
)
def test_whatever_could_take_longer_does_not(source: str) -> None:
    assert not verdict(source)


@pytest.mark.parametrize(
    ("messages", "options", "on_thread"),
    [
        ([{"role": "user", "content": "hello"}], ChatOptions(), False),
        ([{"role": "user", "content": "x" * 5000}], ChatOptions(), True),
        ([{"role": "user", "content": "x"}] * 65, ChatOptions(), True),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], ChatOptions(), True),
        ([{"role": "user", "content": "x"}], ChatOptions(variables={"a": [1] * 9}), True),
        ([{"role": "user", "content": "x"}], ChatOptions(tools=[{"type": "function"}]), True),
    ],
)
def test_only_short_conversations_go_without_the_thread(
    messages: list[dict[str, Any]], options: ChatOptions, on_thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = ChatTemplate(CHAT_TEMPLATE, ModelTokens(tokenizer_json()), CARD)
    handed: list[object] = []
    submit = template._thread.submit

    def noted(*job: Any) -> Any:
        handed.append(job)
        return submit(*job)

    monkeypatch.setattr(template._thread, "submit", noted)

    said = asyncio.run(template.render_async(messages, options))

    assert bool(handed) == on_thread
    assert said == template.render_guarded(messages, options)
    assert said.endswith("<|im_start|>assistant\n")
