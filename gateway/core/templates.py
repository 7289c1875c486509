"""Owns chat templates: the model folder's Jinja text, compiled as transformers does, in a sandbox, within bounds.

`render_async` runs on one thread kept for this. When a template does not end within its deadline the thread is
replaced, and the request gets an error. Short conversations through the plainest templates need no thread (`template_bounds`).
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, Final

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import new_context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from gateway.core.chat_format import read_format
from gateway.core.template_bounds import ends_at_once
from gateway.core.tokens import ModelTokens
from gateway.generation import ChatOptions, RequestError
from shared.errors import ErrorCode
from shared.protocol import MAX_TEMPLATE_CHARS, ModelCard

Messages = Sequence[Mapping[str, Any]]

DEFAULT: Final = "default"
WITH_TOOLS: Final = "tool_use"

_DEADLINE_S: Final = 2.0
_MAX_OUTPUT_CHARS: Final = 4 << 20
_SHORT_TURNS: Final = 64
_SHORT_CHARS: Final = 4096  # as `gateway.core.catalog` encodes on the loop
_MAX_WORDS: Final = 500  # characters of a template's own error message
_REASONING: Final = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # the names that templates and clients use for the same field
_END: Final = f"zq{secrets.token_hex(12)}end "  # marks where a message to be continued ends
VIDEO_MARK: Final = f"zq{secrets.token_hex(12)}video"
"""Stands for a video in a prompt where the chat template, which knows none, is shown text in its place."""


class ChatTemplate:
    """One model's template, compiled."""

    def __init__(self, source: str, tokens: ModelTokens, card: ModelCard) -> None:
        """Raises `RequestError` for a template that does not compile."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise RequestError(ErrorCode.INTERNAL, f"the chat template is longer than {MAX_TEMPLATE_CHARS}")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        environment.globals["dict"] = _Dict()
        environment.globals["namespace"] = _Namespace
        try:
            self._template = environment.from_string(source)
            self._ends_at_once = ends_at_once(environment.parse(source))
        except (TemplateError, RecursionError) as error:
            raise RequestError(ErrorCode.INTERNAL, f"the chat template does not compile: {error}") from None
        self._globals = dict(self._template.globals)
        self.source = source
        self.format = read_format(source)
        self._special_text = tokens.special_text
        self._special = card.special_tokens or {
            name: tokens.token_text(token_id)
            for name, token_id in (("bos_token", card.bos_id), ("eos_token", next(iter(card.eos_ids), None)))
            if token_id is not None
        }
        self._wants_parts: bool | None = None
        clip = None if card.image is None else card.image.clip
        self._marks_videos = clip is not None and not clip.layout.placeholder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="template")

    def render(self, messages: Messages, options: ChatOptions) -> str:
        """The prompt's text. Raises `RequestError` naming what the template objects to."""
        return self._special_text.restore(self.render_guarded(messages, options))

    def render_guarded(self, messages: Messages, options: ChatOptions) -> str:
        """As `render`, but users' words that look like special tokens stay replaced (see `special_text`)."""
        try:
            return self._render(messages, options)
        except RequestError as error:
            error.message = self._special_text.restore(error.message)
            raise
        except Exception as error:  # a template can raise anything its expressions can
            kind = str(error) if isinstance(error, _Objection) else type(error).__name__
            words = self._special_text.restore(kind).replace(_END, "")[:_MAX_WORDS]
            message = f"the model's chat template does not accept these messages: {words}"
            raise RequestError(ErrorCode.INVALID_REQUEST, message, param="messages") from None

    async def render_async(self, messages: Messages, options: ChatOptions) -> str:
        """As `render_guarded`, on the template thread unless it is sure to end at once. Raises `RequestError`."""
        if self._ends_at_once and _is_short(messages, options):
            return self.render_guarded(messages, options)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_DEADLINE_S):
                return await loop.run_in_executor(self._thread, self.render_guarded, messages, options)
        except TimeoutError:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="template")
            message = f"rendering the messages took longer than {_DEADLINE_S:g} s"
            raise RequestError(ErrorCode.INVALID_REQUEST, message, param="messages") from None

    def _render(self, messages: Messages, options: ChatOptions) -> str:
        plain = [_present(message) for message in self._special_text.protect(list(messages))]
        end = _mark_end(plain) if options.continue_final_message else ""
        variables = {
            "tools": self._special_text.protect(list(options.tools)) if options.tools else None,
            "documents": None,
            **self._special,
            **(self._special_text.protect(options.variables) if options.variables else {}),
            "add_generation_prompt": options.add_generation_prompt,
        }
        try:
            text = self._generate(_with_parsed_arguments(plain), variables)
        except (
            TypeError
        ):  # a template that joins a call's arguments to text needs them as JSON text, as clients send them
            text = self._generate(plain, variables)
        return self._cut_at_end(text, end) if end else text

    def _cut_at_end(self, text: str, end: str) -> str:
        """The rendered text up to the mark. Raises `RequestError` where the template changed the message."""
        place = text.rfind(_END.strip())
        if place < 0 or end not in text or "content" not in self.source:
            message = (
                "continue_final_message: the model's chat template does not show the last message as it is"
            )
            raise RequestError(ErrorCode.INVALID_REQUEST, message, param="continue_final_message")
        # If the template has trimmed the space in front of the mark, trim the text before the mark as well.
        cut = text[:place] if text.startswith(_END, place) else text[:place].rstrip()
        return cut.replace(_END, "").replace(_END.strip(), "")

    def _generate(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        pieces, size = [], 0
        # Not `generate`, which walks through the environment's chained names twice at every call.
        template = self._template
        names = {**self._globals, **variables, "messages": self._as_content(messages)}
        context = new_context(template.environment, template.name, template.blocks, names, shared=True)
        for piece in template.root_render_func(context):
            size += len(piece)
            if size > _MAX_OUTPUT_CHARS:
                message = f"the rendered prompt is longer than {_MAX_OUTPUT_CHARS} characters"
                raise RequestError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, message, param="messages")
            pieces.append(piece)
        return "".join(pieces)

    def _as_content(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Contents in the form that this template reads: text, or a list of parts if it shows only parts. Messages with
        pictures keep their parts, since only those say where a picture stands."""
        if self._wants_parts is None:
            self._wants_parts = not self._shows("probe") and self._shows([{"type": "text", "text": "probe"}])
        if self._wants_parts:
            messages = [_with_parts(message) for message in messages]
        elif any(isinstance(message.get("content"), list) for message in messages):
            messages = [
                {**message, "content": _joined(message["content"])}
                if isinstance(message.get("content"), list) and not _has_picture(message["content"])
                else message
                for message in messages
            ]
        return [_with_marks(message) for message in messages] if self._marks_videos else messages

    def _shows(self, content: object) -> bool:
        try:
            messages = [{"role": "user", "content": content}]
            return "probe" in self._template.render(
                messages=messages, tools=None, add_generation_prompt=True, **self._special
            )
        except Exception:  # the template takes another kind of content
            return False


def _is_short(messages: Messages, options: ChatOptions) -> bool:
    """A few turns of text, and nothing else."""
    if len(messages) > _SHORT_TURNS or options.tools or options.variables:
        return False
    num_chars = 0
    for message in messages:
        for value in message.values():
            if isinstance(value, str):
                num_chars += len(value)
            elif value is not None:
                return False
    return num_chars <= _SHORT_CHARS


def choose_template(
    templates: Mapping[str, ChatTemplate], model_id: str, options: ChatOptions
) -> ChatTemplate:
    """The template that a conversation is rendered by: the one it names; with tools `tool_use`, if the model has that;
    else `default`. Raises `RequestError` UNSUPPORTED if the model has no such template, or none at all."""
    if not templates:
        message = (
            f"model {model_id} has no chat template, so it cannot chat: use /v1/completions, or serve it with "
            "--chat-template FILE"
        )
        raise RequestError(ErrorCode.UNSUPPORTED, message, param="messages")
    if options.template is not None:
        found = templates.get(options.template)
        if found is None:
            message = (
                f"chat_template: model {model_id} has no template of this name; it has {', '.join(templates)}. "
                "Templates themselves are not taken from requests"
            )
            raise RequestError(ErrorCode.UNSUPPORTED, message, param="chat_template")
        if options.tools and not found.format.shows_tools:
            message = "chat_template: this template shows no tools; leave one of the two out"
            raise RequestError(ErrorCode.UNSUPPORTED, message, param="chat_template")
        return found
    return templates.get(WITH_TOOLS if options.tools else DEFAULT, templates[DEFAULT])


def _present(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without its empty fields, with its reasoning under every name that templates read."""
    present = {key: value for key, value in message.items() if value is not None}
    reasoning = next((present[name] for name in _REASONING if name in present), None)
    if reasoning is not None:
        present = {"thinking": reasoning, **present, "reasoning_content": reasoning}
    return present


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose text is a part, for templates that read nothing else."""
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def _with_marks(message: dict[str, Any]) -> dict[str, Any]:
    """A message with a mark as text in place of each video."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    mark = {"type": "text", "text": VIDEO_MARK}
    return {**message, "content": [mark if part.get("type") == "video" else part for part in content]}


def _has_picture(parts: list[Any]) -> bool:
    """Or a video."""
    return any(isinstance(part, Mapping) and part.get("type") in ("image", "video") for part in parts)


def _joined(parts: list[Any]) -> str:
    return "\n".join(part["text"] for part in parts if isinstance(part, Mapping) and "text" in part)


def _with_parsed_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects: clients send JSON text, and most templates write JSON again."""
    return [
        {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(arguments := function.get("arguments"), str):
        return call
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": parsed}} if isinstance(parsed, dict) else call


def _mark_end(messages: list[dict[str, Any]]) -> str:
    """Mark the end of the last message's text; returns that text, stripped. Raises `RequestError` without any."""
    last = messages[-1]
    content = last.get("content")
    if isinstance(content, str) and content.strip():
        last["content"] = content + _END
        return content.strip()
    for part in reversed(content) if isinstance(content, list) else ():
        if isinstance(part, dict) and isinstance(part.get("text"), str) and part["text"].strip():
            text: str = part["text"]
            part["text"] = text + _END
            return text.strip()
    message = "continue_final_message: the last message has no text to go on with"
    raise RequestError(ErrorCode.INVALID_REQUEST, message, param="continue_final_message")


# -------------------------------------------------------------------- what templates may use beside Jinja's own


class _GenerationBlocks(Extension):
    """`{% generation %} … {% endgeneration %}`: marks for training what an assistant wrote; here it is only shown."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own protocol

    def parse(self, parser: Parser) -> nodes.Node:
        """See `Extension.parse`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_shown"), [], [], body).set_lineno(line)

    def _shown(self, caller: Callable[[], str]) -> str:
        return caller()


class _Objection(TemplateError):
    """Raised by a template through `raise_exception`."""


class _Dict:
    """`dict` without its class's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """See `dict.fromkeys`."""
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` that keeps no underscored name, so that a template reaches none of Python's attributes through it."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=…)` works, as in Jinja's
        self, *given = args
        attributes = dict(*given, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: object) -> None:
    raise _Objection(str(message)[:_MAX_WORDS])


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)  # local time, as in transformers


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML, which models were not trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
