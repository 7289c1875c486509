"""Owns what a Responses request asks the core for: its checks, its prompt, its echo. No sockets; gateway's loop."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from gateway.api.conversations import Conversations, Turn
from gateway.api.parameters import TOKENS_PER_OBJECT, Json, invalid, renamed
from gateway.api.prompts import (
    Message,
    Prompt,
    compose_chat,
    effort_variables,
    pictures_of,
    takes_questions,
    task_prompt,
)
from gateway.api.requests import Length, Objects, check_fields, make_requests
from gateway.api.response_bodies import CreateBody, DegasOptions, Reasoning, TextOptions
from gateway.api.response_events import response_id_of
from gateway.api.response_input import InputRead, read_input
from gateway.api.response_object import Opening
from gateway.api.spoken import budget_asked, thought_budget
from gateway.api.structured import Wanted, schema_grammar
from gateway.api.tools import ToolsAsked, read_tools, tool_of
from gateway.generation import ChatOptions, Core, GenerateRequest, RequestError, ServedModel
from shared.errors import ErrorCode
from shared.protocol import Grammar

LOGPROBS_INCLUDE: Final = "message.output_text.logprobs"

_INSTEAD: Final = {"max_tokens": "max_output_tokens", "response_format": "text.format"}


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
    tools = _tools(body)
    model = core.model(body.model)
    options = body.degas or DegasOptions()
    _check_options(options)
    if tools is not None and options.task != "query":
        message = f"{options.task} answers in a form of its own and calls no tools; leave them out"
        raise invalid(message, "tools")
    budget, param = budget_asked(body.thinking_budget, body.thinking_token_budget)
    if budget is not None and options.task != "query":
        raise invalid(f"{options.task} answers without thinking; leave it out", param)
    asked = read_input(body, core.config.max_prompt_chars)
    task = options.task if options.task in TOKENS_PER_OBJECT else "text"
    checked = await check_fields(
        core,
        model,
        body,
        tenant=tenant,
        num_logprobs=_num_logprobs(body, task),
        wanted=_format(body.text),
        tools=tools,
    )
    conversation = _conversation(body, asked, previous)
    is_constrained = checked.grammar is not None
    if options.task == "query":
        effort = body.reasoning.effort if body.reasoning is not None else None
        prompt = await _compose(core, model, asked, conversation, effort, tools, is_constrained)
    else:
        prompt = await _compose_task(core, model, options, conversation)
    response_id = "resp_" + secrets.token_hex(16)
    length = Length(body.max_output_tokens, "max_output_tokens")
    objects = None if task == "text" else Objects(task, options.max_objects, options.logprobs)
    thinking = thought_budget(model, prompt.reading, budget, param)
    (request,) = make_requests(checked, response_id, [prompt], length, objects, thinking=thinking)
    opening = Opening(
        response_id, request.model_id, task, _echo(body, request, tools), stream_id, prompt.reading
    )
    messages = previous.messages if previous is not None else ()
    return Prepared(request, opening, Turn((*messages, *asked.messages)))


def _check_options(options: DegasOptions) -> None:
    """Raises `RequestError` for an argument that the task has no use for."""
    used = {
        "caption": ("length", "object"),
        "detect": ("object", "max_objects", "logprobs"),
        "point": ("object", "max_objects", "logprobs"),
    }
    defaults = DegasOptions()
    for name in ("length", "object", "max_objects", "logprobs"):
        if name not in used.get(options.task, ()) and getattr(options, name) != getattr(defaults, name):
            raise invalid(f"{options.task} has no use for it; leave it out", f"degas.{name}")


def _num_logprobs(body: CreateBody, task: str) -> int:
    """`num_logprobs` as in `Sampling`. Raises `RequestError` for a task whose answer shows no tokens' text."""
    by_include = LOGPROBS_INCLUDE in (body.include or ())
    if body.top_logprobs is None and not by_include:
        return -1
    if task != "text":
        param = "include" if by_include else "top_logprobs"
        message = f"{param}: {task} answers in coordinates, whose log-probabilities degas.logprobs gives; leave it out"
        raise RequestError(ErrorCode.UNSUPPORTED, message, param=param)
    return body.top_logprobs or 0


def _tools(body: CreateBody) -> ToolsAsked | None:
    """The body's tools, as chat has them. Raises `RequestError`."""
    choice = body.tool_choice
    if isinstance(choice, dict) and choice.get("type") != "function":
        message = (
            'tool_choice: only "none", "auto", "required" and {"type": "function", "name": …} are supported'
        )
        raise RequestError(ErrorCode.UNSUPPORTED, message, param="tool_choice")
    offered = [
        tool_of(tool.name, tool.description, tool.parameters, strict=tool.strict) for tool in body.tools or ()
    ]
    try:
        return read_tools(offered, choice, body.parallel_tool_calls)
    except RequestError as error:
        raise renamed(error, (error.param or "").replace("].function.", "].")) from None


@dataclass(frozen=True, slots=True)
class _Conversation:
    """All messages of a request, and where in its body each one stands."""

    messages: list[Message]
    places: list[str]

    def named(self, error: RequestError) -> RequestError:
        """An error about one of the messages, as one about this body."""
        param = error.param or ""
        if param == "messages":
            return renamed(error, "input")
        if not param.startswith("messages["):
            return error
        number, _, rest = param[len("messages[") :].partition("]")
        place = self.places[int(number)]
        is_part = rest.startswith(".content[") and place.startswith("input[")
        return renamed(error, place + rest.removesuffix(".url") if is_part else place)


def _conversation(body: CreateBody, asked: InputRead, previous: Turn | None) -> _Conversation:
    earlier = previous.messages if previous is not None else ()
    messages = [*earlier, *asked.messages]
    places = ["previous_response_id"] * len(earlier) + [*asked.places]
    if body.instructions:
        messages.insert(0, Message(role="system", content=body.instructions))
        places.insert(0, "instructions")
    return _Conversation(messages, places)


async def _compose(
    core: Core,
    model: ServedModel,
    asked: InputRead,
    conversation: _Conversation,
    effort: str | None,
    tools: ToolsAsked | None,
    is_constrained: bool,
) -> Prompt:
    """The prompt of the whole conversation. Raises `RequestError` under the body's own names."""
    card = model.card
    has_more = asked.has_results or any(message.num_pictures for message in asked.messages)
    if not asked.question and (takes_questions(card) or not has_more):
        raise invalid("a user message with text is needed", "input")
    try:
        variables = effort_variables(effort) if model.template_names else {}
        return await compose_chat(
            core,
            model,
            conversation.messages,
            ChatOptions(variables=variables) if variables else None,
            tools=tools,
            is_constrained=is_constrained,
        )
    except RequestError as error:
        raise conversation.named(error) from None


async def _compose_task(
    core: Core, model: ServedModel, options: DegasOptions, conversation: _Conversation
) -> Prompt:
    """The prompt of one of Moondream's other tasks, about the conversation's last picture."""
    card = model.card
    if options.task == "caption":
        prompt = Prompt(task_prompt(card, f"caption_{options.length}"), strip_start=True)
    else:
        name = options.object.strip()
        if not name:
            raise invalid(f"{options.task} needs the name of an object", "degas.object")
        prompt = Prompt(task_prompt(card, options.task, await model.encode(" " + name)))
    pictures = pictures_of(conversation.messages)
    if not pictures:
        raise invalid(f"{options.task} needs a picture: an input_image with a data URL", "input")
    url, param = pictures[-1]
    try:
        return replace(prompt, images=[await core.prepare_image(model, url, param=param)])
    except RequestError as error:
        raise conversation.named(error) from None


def _format(text: TextOptions | None) -> Wanted | None:
    wanted = text.format if text is not None else None
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object" and wanted.schema is None:
        return Grammar("json_object", "{}"), "text.format"
    if wanted.schema is None:
        raise invalid("json_schema needs a schema", "text.format.schema")
    return schema_grammar(wanted.schema, "text.format.schema", strict=wanted.strict)


def _echo(body: CreateBody, request: GenerateRequest, tools: ToolsAsked | None) -> Json:
    """The request's own fields as every response object repeats them."""
    choice = body.tool_choice or ("auto" if body.tools else "none")
    if tools is not None and tools.named is not None:
        choice = {"type": "function", "name": tools.named}
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": request.max_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": _reasoning(body.reasoning),
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": request.sampling.temperature,
        "text": _text(body.text),
        "tool_choice": choice,
        "tools": [tool.echo() for tool in body.tools or ()],
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
        found = next((held for held in turn.answer if held.id == item.id), None) if turn is not None else None
        if found is None:
            param = f"input[{index}].id"
            message = f"{param}: this item is not held here any more; send the item itself"
            raise RequestError(ErrorCode.NOT_FOUND, message, param=param)
        items[index] = found
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
