"""Owns chat templates: the model folder's Jinja text, in a sandbox, off the loop, within bounds.

`render_async` runs on one thread kept for this; a template that does not come back within its deadline costs
that thread, which is then replaced, and the request gets an error.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import msgspec
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.core.tokens import ModelTokens
from gateway.generation import ChatOptions, RequestError
from shared.errors import ErrorCode
from shared.protocol import ModelCard

_DEADLINE_S: Final = 2.0
_MAX_TEMPLATE_CHARS: Final = 256 << 10
_MAX_OUTPUT_CHARS: Final = 4 << 20


class ChatTemplate:
    """One model's template, compiled."""

    def __init__(self, source: str, tokens: ModelTokens, card: ModelCard) -> None:
        """Raises `RequestError` for a template that does not compile."""
        self.source = source
        if len(source) > _MAX_TEMPLATE_CHARS:
            raise RequestError(ErrorCode.INTERNAL, f"the chat template is longer than {_MAX_TEMPLATE_CHARS}")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = time.strftime
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise RequestError(ErrorCode.INTERNAL, f"the chat template does not compile: {error}") from None
        self._special = {
            "bos_token": tokens.token_text(card.bos_id) if card.bos_id is not None else "",
            "eos_token": tokens.token_text(card.eos_ids[0]) if card.eos_ids else "",
        }
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="template")

    def render(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> str:
        """The prompt's text. Raises `RequestError` naming what the template objects to."""
        try:
            pieces = self._template.generate(
                messages=messages, add_generation_prompt=options.add_generation_prompt, **self._special
            )
            text, size = [], 0
            for piece in pieces:
                size += len(piece)
                if size > _MAX_OUTPUT_CHARS:
                    message = f"the rendered prompt is longer than {_MAX_OUTPUT_CHARS} characters"
                    raise RequestError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, message, param="messages")
                text.append(piece)
        except RequestError:
            raise
        except Exception as error:  # a template can raise anything its expressions can
            kind = str(error) if isinstance(error, _Objection) else type(error).__name__
            message = f"the model's chat template does not accept these messages: {kind}"
            raise RequestError(ErrorCode.INVALID_REQUEST, message, param="messages") from None
        return "".join(text)

    async def render_async(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> str:
        """As `render`, on the template thread. Raises `RequestError`."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_DEADLINE_S):
                return await loop.run_in_executor(self._thread, self.render, messages, options)
        except TimeoutError:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="template")
            message = f"rendering the messages took longer than {_DEADLINE_S:g} s"
            raise RequestError(ErrorCode.INVALID_REQUEST, message, param="messages") from None


class _Objection(TemplateError):
    """What a template says through `raise_exception`."""


def _raise_exception(message: object) -> None:
    raise _Objection(str(message)[:200])


def _to_json(value: object, indent: int | None = None) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML, which models were not trained on."""
    text = msgspec.json.encode(value)
    return (msgspec.json.format(text, indent=indent) if indent else text).decode()
