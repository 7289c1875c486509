"""What templates tell of their models' habits."""

from __future__ import annotations

import pytest

from gateway.core.chat_format import read_format

LOOP = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "shows", "dialect"),
    [
        (LOOP, False, "tagged"),
        (LOOP + "{% if tools %}<tool_call>{% endif %}", True, "tagged"),
        (LOOP + "{% if tools is defined %}[TOOL_CALLS]{{ tools }}{% endif %}", True, "mistral"),
        (LOOP + "{{ tools }}<|tool_call_start|>", True, "lfm"),
        (LOOP + "{{ tools }}<|tool_call|>", True, "granite"),
        (LOOP + '{{ tools | tojson }}\'{"name": , "parameters": }\'', True, "llama"),
        (LOOP + "{{ tools }}", False, "tagged"),  # in a way that nobody here could read
        (LOOP + "<tool_call>", False, "tagged"),
        ("{% generation %}{{ tools }}<tool_call>{% endgeneration %}", True, "tagged"),
    ],
)
def test_tools(source: str, shows: bool, dialect: str) -> None:
    found = read_format(source)
    assert (found.shows_tools, found.dialect) == (shows, dialect)


def test_thinking() -> None:
    assert read_format(LOOP).thinking is None
    found = read_format("{{ content.split('</think>') }}{% if enable_thinking is defined %}x{% endif %}")
    assert (found.thinking, found.can_skip_thinking) == (("<think>", "</think>"), True)
