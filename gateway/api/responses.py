"""Owns what a Responses request asks the core for: its checks, its prompt, its echo. No sockets; gateway's loop."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from gateway.api.conversations import Conversations, Turn
from gateway.api.parameters import (
    TOKENS_PER_OBJECT,
    Json,
    invalid,
)
from gateway.api.prompts import Message, Prompt, compose_chat, takes_questions, task_prompt
from gateway.api.requests import Length, Objects, check_fields, make_requests
from gateway.api.response_bodies import CreateBody, DegasOptions, Item, Part, Reasoning, TextOptions
from gateway.api.response_events import response_id_of
from gateway.api.response_stream import Opening
from gateway.api.structured import Wanted, schema_grammar
from gateway.generation import Core, GenerateRequest, RequestError, ServedModel, no_pictures
from shared.errors import ErrorCode
from shared.protocol import Grammar

LOGPROBS_INCLUDE: Final = "message.output_text.logprobs"

_ROLES: Final = ("user", "assistant", "system", "developer")
_INSTEAD: Final = {"max_tokens": "max_output_tokens", "response_format": "text.format"}


@dataclass(frozen=True, slots=True)
class InputRead:
    """A body's input: texts by role in order, and the most recent picture."""

    messages: tuple[tuple[str, str], ...]
    image_url: str | None = None
    image_param: str = "input"

    @property
    def question(self) -> str:
        """The last user message."""
        return next((text for role, text in reversed(self.messages) if role == "user"), "").strip()


def read_input(body: CreateBody, max_chars: int) -> InputRead:
    """Flatten `input` to texts and a picture. Raises `RequestError` for what Degas does not take."""
    if isinstance(body.input, str):
        asked = InputRead((("user", body.input),))
    else:
        asked = _read_items(body.input or ())
    size = sum(len(text) for _, text in asked.messages) + len(body.instructions or "")
    if size > max_chars:
        message = f"input: {size} characters; at most {max_chars} are accepted"
        raise RequestError(ErrorCode.PAYLOAD_TOO_LARGE, message, param="input")
    return asked


def _read_items(items: Sequence[Item]) -> InputRead:
    messages: list[tuple[str, str]] = []
    picture: tuple[str | None, str] = (None, "input")
    for index, item in enumerate(items):
        where = f"input[{index}]"
        if item.type != "message":
            message = f"items of type {item.type[:40]!r} are not supported"
            raise RequestError(ErrorCode.UNSUPPORTED, f"{where}: {message}", param=f"{where}.type")
        if item.role not in _ROLES:
            raise invalid(f"one of {', '.join(_ROLES)} is expected", f"{where}.role")
        if isinstance(item.content, str):
            messages.append((item.role, item.content))
            continue
        text, found = _read_parts(item.content or (), f"{where}.content")
        messages.append((item.role, text))
        if len(found) > 1:
            message = "one picture a message is supported; an earlier message's is replaced by a later one's"
            raise RequestError(ErrorCode.UNSUPPORTED, message, param=found[1][1])
        picture = found[0] if found else picture
    return InputRead(tuple(messages), *picture)


def _read_parts(parts: Sequence[Part], where: str) -> tuple[str, list[tuple[str, str]]]:
    """A message's text, and its pictures: each one's URL and its field's name."""
    texts: list[str] = []
    pictures: list[tuple[str, str]] = []
    for index, part in enumerate(parts):
        param = f"{where}[{index}]"
        if part.type in ("input_text", "output_text", "text"):
            texts.append(part.text or "")
        elif part.type == "input_image":
            if part.image_url is None:
                message = "pictures are taken as a data URL in image_url, not by file_id"
                raise RequestError(ErrorCode.UNSUPPORTED, message, param=f"{param}.image_url")
            pictures.append((part.image_url, f"{param}.image_url"))
        else:
            message = (
                f"{param}: content of type {part.type[:40]!r} is not supported; use input_text or input_image"
            )
            raise RequestError(ErrorCode.UNSUPPORTED, message, param=f"{param}.type")
    return "\n".join(texts), pictures


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready to submit, its opening, and the turn it will leave behind (less the answer)."""

    request: GenerateRequest
    opening: Opening
    turn: Turn


async def prepare(
    core: Core,
    body: CreateBody,
    *,
    tenant: str,
    previous: Turn | None = None,
    stream_id: str | None = None,
) -> Prepared:
    """Check a body and prepare everything that can fail before submitting. Raises `RequestError`."""
    for name, instead in _INSTEAD.items():
        if getattr(body, name) is not None:
            raise RequestError(ErrorCode.UNSUPPORTED, f"{name} is called {instead} here", param=name)
    if body.n not in (None, 1):
        raise invalid("one answer a response", "n")
    if body.tool_choice not in (None, "none", "auto"):
        raise invalid("there are no tools to choose from", "tool_choice")
    model = core.model(body.model)
    options = body.degas or DegasOptions()
    _check_options(options)
    asked = read_input(body, core.config.max_prompt_chars)
    task = options.task if options.task in TOKENS_PER_OBJECT else "text"
    checked = await check_fields(
        core,
        model,
        body,
        tenant=tenant,
        num_logprobs=_num_logprobs(body, task),
        wanted=_format(body.text),
    )
    messages = (previous.messages if previous else ()) + asked.messages
    prompt = await _compose(core, model, asked, options, messages, body.instructions)
    image = previous.image if previous else None
    if asked.image_url is not None:
        image = await core.prepare_image(model, asked.image_url, param=asked.image_param)
    if image is None and options.task != "query":
        raise invalid(f"{options.task} needs a picture: an input_image with a data URL", "input")
    prompt = replace(prompt, images=[] if image is None else [image])
    response_id = "resp_" + secrets.token_hex(16)
    length = Length(body.max_output_tokens, "max_output_tokens")
    objects = None if task == "text" else Objects(task, options.max_objects)
    (request,) = make_requests(checked, response_id, [prompt], length, objects)
    opening = Opening(response_id, request.model_id, task, _echo(body, request), stream_id)
    return Prepared(request, opening, Turn(messages, image))


def _check_options(options: DegasOptions) -> None:
    """Raises `RequestError` for an argument that the task has no use for."""
    used = {
        "caption": ("length", "object"),
        "detect": ("object", "max_objects"),
        "point": ("object", "max_objects"),
    }
    defaults = DegasOptions()
    for name in ("length", "object", "max_objects"):
        if name not in used.get(options.task, ()) and getattr(options, name) != getattr(defaults, name):
            raise invalid(f"{options.task} has no use for it; leave it out", f"degas.{name}")


def _num_logprobs(body: CreateBody, task: str) -> int:
    """`num_logprobs` as in `Sampling`. Raises `RequestError` for a task whose answer shows no tokens' text."""
    by_include = LOGPROBS_INCLUDE in (body.include or ())
    if body.top_logprobs is None and not by_include:
        return -1
    if task != "text":
        param = "include" if by_include else "top_logprobs"
        message = f"{param}: {task} answers in coordinates, which have no log-probabilities; leave it out"
        raise RequestError(ErrorCode.UNSUPPORTED, message, param=param)
    return body.top_logprobs or 0


async def _compose(
    core: Core,
    model: ServedModel,
    asked: InputRead,
    options: DegasOptions,
    messages: tuple[tuple[str, str], ...],
    instructions: str | None,
) -> Prompt:
    """The prompt without its picture. Moondream gets the last user turn; a model with a chat template gets all turns."""
    card = model.card
    if options.task == "caption":
        return Prompt(task_prompt(card, f"caption_{options.length}"), strip_start=True)
    if options.task in ("detect", "point"):
        name = options.object.strip()
        if not name:
            raise invalid(f"{options.task} needs the name of an object", "degas.object")
        return Prompt(task_prompt(card, options.task, await model.encode(" " + name)))
    if not asked.question:
        raise invalid("a user message with text is needed", "input")
    if takes_questions(card):
        return Prompt(task_prompt(card, "query", await model.encode(asked.question)), strip_start=True)
    if asked.image_url is not None:
        raise no_pictures(card, asked.image_param)
    turns = [Message(role=role, content=text) for role, text in messages]  # type: ignore[arg-type]  # roles were checked
    if instructions:
        turns.insert(0, Message(role="system", content=instructions))
    return await compose_chat(core, model, turns)


def _format(text: TextOptions | None) -> Wanted | None:
    wanted = text.format if text is not None else None
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object" and wanted.schema is None:
        return Grammar("json_object", "{}"), "text.format"
    if wanted.schema is None:
        raise invalid("json_schema needs a schema", "text.format.schema")
    return schema_grammar(wanted.schema, "text.format.schema", strict=wanted.strict)


def _echo(body: CreateBody, request: GenerateRequest) -> Json:
    """The request's own fields as every response object repeats them."""
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": request.max_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": bool(body.parallel_tool_calls),
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": _reasoning(body.reasoning),
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": request.sampling.temperature,
        "text": _text(body.text),
        "tool_choice": "none",
        "tools": [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": request.sampling.top_p,
        "truncation": body.truncation or "disabled",
        "user": body.user,
    }


def _text(given: TextOptions | None) -> Json:
    wanted = given.format if given is not None else None
    verbosity = given.verbosity if given is not None else None
    return {
        "format": {"type": "text"} if wanted is None else wanted.echo(),
        "verbosity": verbosity or "medium",
    }


def _reasoning(given: Reasoning | None) -> Json:
    return {"effort": None, "summary": None} if given is None else msgspec.to_builtins(given)


def recall(body: CreateBody, tenant: str, *stores: Conversations) -> Turn | None:
    """The turn that `previous_response_id` names, with the earlier answers that `input` names by id put in their places.

    Raises `RequestError` for what is not held here any more.
    """
    items = body.input if isinstance(body.input, list) else []
    for index, item in enumerate(items):
        if item.type != "item_reference":
            continue
        turn = _held(tenant, response_id_of(item.id or ""), stores)
        if turn is None:
            param = f"input[{index}].id"
            message = f"{param}: this item is not held here any more; send the message itself"
            raise RequestError(ErrorCode.NOT_FOUND, message, param=param)
        items[index] = Item(role="assistant", content=turn.answer)
    if body.previous_response_id is None:
        return None
    previous = _held(tenant, body.previous_response_id, stores)
    if previous is None:
        message = (
            "this response is not held here any more; send the whole input again without previous_response_id"
        )
        raise RequestError(ErrorCode.NOT_FOUND, message, param="previous_response_id")
    return previous


def _held(tenant: str, response_id: str, stores: Sequence[Conversations]) -> Turn | None:
    for store in stores:
        turn = store.recall(tenant, response_id)
        if turn is not None:
            return turn
    return None
