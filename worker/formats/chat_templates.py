"""Owns finding a model's chat templates, whether they are some, and which tokens end a turn in them. Any thread."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import structlog

from shared.protocol import MAX_TEMPLATE_CHARS
from worker.formats.errors import CheckpointError
from worker.formats.json_files import read_object

log = structlog.get_logger()

Templates = dict[str, str]
"""Chat templates by name. The one called `default` is used unless another is asked for; empty where a model has none."""

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
DEFAULT = "default"
_SPECIAL = ("tool_use", "rag")  # templates for conversations with more than messages in them
_NO_END = ("<|end_of_role|>",)  # Granite's: ends the name of a role, in the middle of a turn
_INSTEAD = "Give a working one: --chat-template FILE"
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def turn_ends(templates: Templates) -> tuple[str, ...]:
    """The marks that end a turn in these templates, as text."""
    whole = "".join(templates.values())
    return tuple(mark for mark in _TURN_ENDS if mark in whole and mark not in _NO_END)


def find_templates(folder: Path) -> Templates:
    """The templates of a Hugging Face folder, from whichever of its files has some.

    Raises CheckpointError on files that cannot be read.
    """
    named = {
        file.stem: _text(file) for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    }
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        return named | {DEFAULT: _text(plain)}
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = _read(read_object(folder / name).get("chat_template"), folder / name)
        if found:
            return with_default(found | named)
    return with_default(named)


def _read(found: Any, file: Path) -> Templates:
    """The value in a folder's file: a text, or a list (or object) of named templates."""
    if found is None or isinstance(found, str):
        return {DEFAULT: found} if found else {}
    if isinstance(found, list):
        found = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)}
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise CheckpointError("'chat_template' is neither a text nor a list of named ones", file=file)
    return {name: text for name, text in found.items() if text}


def with_default(found: Templates) -> Templates:
    """The same templates, one of them under the name `default` too."""
    if not found or DEFAULT in found:
        return found
    names = [*("chat", "chatml"), *(name for name in found if name not in _SPECIAL), *found]
    return {DEFAULT: next(found[name] for name in names if name in found), **found}


def choose_templates(found: Templates, asked: str | None, path: Path) -> Templates:
    """The templates that the model at `path` is served with: `found`, unless `asked` names one of them, which is then the
    default, or a file with one, which is then the only one. Each is checked. Raises CheckpointError."""
    if asked is None:
        num_chars = sum(map(len, found.values()))
        if num_chars > MAX_TEMPLATE_CHARS:
            raise CheckpointError(
                f"chat templates of {num_chars} characters; at most {MAX_TEMPLATE_CHARS} are accepted. {_INSTEAD}",
                file=path,
            )
        for text in found.values():
            check_template(text, path)
        return found
    if asked in found:
        return choose_templates({**found, DEFAULT: found[asked]}, None, path)
    file = Path(asked).expanduser()
    if not file.is_file():
        names = f"; this model's own templates are {', '.join(found)}" if found else ""
        raise CheckpointError(
            f"chat_template names no file with a Jinja template{names}",
            file=file if "/" in asked else Path(asked),
        )
    return choose_templates({DEFAULT: _text(file)}, None, file)


def warn_missing(path: Path) -> None:
    """Say that a model has no template, and what to do."""
    log.warning(
        "no_chat_template",
        model=str(path),
        means="chat is refused, completions work",
        to_do="serve the instruct model of the same name, or give a template: --chat-template FILE",
    )


def check_template(template: str, file: Path) -> None:
    """Raise CheckpointError, naming `file`, if it is no Jinja template.

    It is compiled as gateways do it, which render it later, and only where Jinja is installed.
    """
    try:
        from jinja2 import Environment, TemplateSyntaxError
    except ImportError:
        return
    grammar = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)
    try:
        grammar.compile(_GENERATION.sub("", template), raw=True)
    except (TemplateSyntaxError, RecursionError) as error:
        line = getattr(error, "lineno", "?")
        raise CheckpointError(
            f"the chat template cannot be used: line {line}: {error}. {_INSTEAD}", file=file
        ) from None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"not readable as text: {error}", file=path) from error
