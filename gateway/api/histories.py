"""Owns whether a model's chat template shows what a history says. No sockets; gateway's loop.

A template may pass over a message's `name`, its `tool_calls` or a tool's result without a word; the answer would then be
about another conversation than the client's. What is passed over is found out by rendering once more without it; what was
found to be shown is remembered, so that a growing history is not rendered again and again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final
from weakref import WeakKeyDictionary

from gateway.generation import ChatOptions, RequestError, ServedModel
from shared.errors import ErrorCode

_FIELDS: Final = ("name", "tool_calls")
_RESULT_ROLES: Final = ("tool", "function")

_MAX_KNOWN: Final = 256

Told = Sequence[Mapping[str, Any]]

_SHOWN: Final[WeakKeyDictionary[ServedModel, set[tuple[Any, ...]]]] = WeakKeyDictionary()
"""Roles and fields that a model's templates were found to show: beside which template, with tools or without, and variables."""


def check_no_history(model: ServedModel, messages: Told) -> None:
    """For a model that is asked one question at a time. Raises `RequestError` UNSUPPORTED for what it has no place for."""
    for index, message in enumerate(messages):
        for name in (*_FIELDS, "tool_call_id"):
            if message.get(name):
                raise _passed_over(model, f"messages[{index}].{name}")
        if message["role"] in _RESULT_ROLES:
            raise _passed_over(model, f"messages[{index}].role")


async def check_shown(
    model: ServedModel, messages: Told, options: ChatOptions, ids: list[int], places: Sequence[int]
) -> None:
    """`ids` are these messages, rendered. Raises `RequestError` UNSUPPORTED for a field that does not show in them.

    Messages of one role are looked at together: a template treats them alike. `places` are the messages' places in the body.
    """
    known = _SHOWN.setdefault(model, set())
    for role, name in _used(messages):
        kind = (role, name, options.template, bool(options.tools), hash(repr(options.variables)))
        if kind in known:
            continue
        first = next(i for i, message in enumerate(messages) if message["role"] == role and message.get(name))
        changed = [_without(message, name) if message["role"] == role else message for message in messages]
        try:
            shows = await model.encode_chat(changed, options) != ids
        except RequestError:
            shows = True  # the template needs it
        if not shows:
            place = "role" if name == "content" else name
            raise _passed_over(model, f"messages[{places[first]}].{place}")
        if len(known) >= _MAX_KNOWN:
            known.clear()
        known.add(kind)


def _used(messages: Told) -> list[tuple[str, str]]:
    """Pairs of role and field that occur and might be passed over, in order."""
    used: dict[tuple[str, str], None] = {}
    for message in messages:
        # A result's name only repeats its call's.
        names = ("content",) if message["role"] in _RESULT_ROLES else _FIELDS
        for name in names:
            if message.get(name):
                used[message["role"], name] = None
    return list(used)


def _without(message: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if name == "content":
        return {**message, "content": "another result"}
    return {key: value for key, value in message.items() if key != name}


def _passed_over(model: ServedModel, param: str) -> RequestError:
    message = f"{param}: model {model.card.model_id} has no place for this in its prompt; leave it out"
    return RequestError(ErrorCode.UNSUPPORTED, message, param=param)
