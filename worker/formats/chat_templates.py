"""Owns finding a folder's chat template, whether it is one, and which tokens end a turn in it. Any thread."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import structlog

from worker.formats.errors import CheckpointError
from worker.formats.json_files import read_object

log = structlog.get_logger()

# The marks that families write at the end of a turn. Some are not the tokenizer's end of text, and some folders name
# only the end of text.
_TURN_ENDS = (
    *(
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|eot|>",
        "<end_of_turn>",
        "<turn|>",
        "<|end|>",
        "<|return|>",
    ),
    *("<|end_of_text|>", "<|endoftext|>", "<end_of_utterance>", "<|end_of_turn|>", "<|endofassistant|>"),
    *("<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>", "</s>", "[|endofturn|]", "<|end_of_role|>"),
)
_NO_END = ("<|end_of_role|>",)  # Granite's: ends the name of a role, in the middle of a turn
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def turn_ends(template: str) -> tuple[str, ...]:
    """The marks that end a turn in this template, as text."""
    return tuple(mark for mark in _TURN_ENDS if mark in template and mark not in _NO_END)


def find_template(folder: Path) -> str:
    """The template of a Hugging Face folder, from whichever of its files has one; empty where none has.

    Raises CheckpointError on files that cannot be read.
    """
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        return _text(plain)
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = _chosen(read_object(folder / name).get("chat_template"), folder / name)
        if found:
            return found
    named = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return _text(named[0]) if len(named) == 1 else ""


def _chosen(found: Any, file: Path) -> str:
    """One template out of the value in a folder's file: a text, or a list (or object) of named templates."""
    if found is None or isinstance(found, str):
        return found or ""
    if isinstance(found, list):
        found = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)}
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise CheckpointError("'chat_template' is neither a text nor a list of named ones", file=file)
    if not found:
        return ""
    for name in ("default", "chat", "chatml"):
        if name in found:
            return str(found[name])
    others = [name for name in found if name not in ("tool_use", "rag")]
    chosen = others[0] if len(others) == 1 else next(iter(found))
    return str(found[chosen])


def warn_missing(path: Path) -> None:
    """Say that a model has no template, and what to do."""
    log.warning(
        "no_chat_template",
        model=str(path),
        means="chat has no form that this model was trained on; completions work",
        to_do="serve an instruct model; or a folder, with the template in chat_template.jinja",
    )


def check_template(template: str, file: Path) -> str:
    """Returns `template`. Raises CheckpointError, naming `file`, if it is no Jinja template.

    Only its syntax is checked, and only where Jinja is installed: gateways render, workers do not.
    """
    try:
        from jinja2 import Environment, TemplateSyntaxError
    except ImportError:
        return template
    grammar = Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"], autoescape=False)
    try:
        grammar.parse(_GENERATION.sub("", template))
    except (TemplateSyntaxError, RecursionError) as error:
        line = getattr(error, "lineno", "?")
        raise CheckpointError(
            f"the chat template cannot be used: line {line}: {error}; put a working one into "
            "chat_template.jinja beside the model",
            file=file,
        ) from None
    return template


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"not readable as text: {error}", file=path) from error
