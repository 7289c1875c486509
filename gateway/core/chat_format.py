"""Owns what a chat template tells of its model's habits: whether it takes tools, how it calls them, how it thinks."""

from __future__ import annotations

from typing import Final

from jinja2 import Environment, TemplateError, meta
from jinja2.ext import loopcontrols

from gateway.generation import ChatFormat

_DIALECTS: Final = (  # the first mark that a template holds decides
    ("[TOOL_CALLS]", "mistral"),
    ("<|tool_call_start|>", "lfm"),
    ("<|tool_call|>", "granite"),
    ("<tool_call>", "tagged"),
    ("<|python_tag|>", "llama"),
    ('"parameters":', "llama"),
    ("'parameters':", "llama"),
)
_THINKING: Final = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


def read_format(source: str) -> ChatFormat:
    """The habits of the model whose template this is. A template that uses `tools` in no known way gets ours."""
    knows_tools = "tools" in _variables(source)
    dialect = next((name for mark, name in _DIALECTS if mark in source), None) if knows_tools else None
    thinking = next((marks for marks in _THINKING if marks[1] in source), None)
    return ChatFormat(
        shows_tools=dialect is not None,
        dialect=dialect or "tagged",
        thinking=thinking,
        can_skip_thinking="enable_thinking" in source,
    )


def _variables(source: str) -> set[str]:
    try:
        tree = Environment(extensions=[loopcontrols]).parse(source)
    except (TemplateError, RecursionError):
        # Only marks for training, such as {% generation %}, are beyond this: the name alone decides then.
        return {"tools"} if "tools" in source else set()
    return meta.find_undeclared_variables(tree)
