"""The one rule for fields: at every object of every valid body an unknown one is refused by its path."""

from __future__ import annotations

import copy
import json
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from gateway.api import anthropic, chat, completions, moondream, ollama, ollama_models, prompts, tokenize
from gateway.api import response_bodies as bodies
from gateway.api.fields import Known
from gateway.api.parameters import decode_body
from gateway.generation import RequestError
from shared.errors import ErrorCode

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
COMMON: dict[str, Any] = {
    "model": "m",
    "stream": True,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
    "stop": ["x"],
    "metadata": {"free": "text"},
    "logit_bias": {"5": 1.0},
    "structured_outputs": {"json": SCHEMA},
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
    },
}
CALL = {"id": "c1", "type": "function", "index": 0, "function": {"name": "f", "arguments": "{}"}}
PICTURE = {"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}, "cache_control": {"free": 1}}
CHAT: dict[str, Any] = {
    **COMMON,
    "messages": [
        {"role": "system", "content": "s", "name": "n"},
        {"role": "user", "content": [{"type": "text", "text": "t"}, PICTURE]},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "annotations": []},
        {"role": "tool", "content": "r", "tool_call_id": "c1"},
    ],
    "chat_template_kwargs": {"free": 1},
    "prediction": {"type": "content", "content": "free"},
    "reasoning_effort": "low",
}
ANSWER = {
    "type": "message",
    "role": "assistant",
    "id": "msg_1",
    "status": "completed",
    "content": [{"type": "output_text", "text": "t", "annotations": [], "logprobs": []}],
}
RESPONSES: dict[str, Any] = {
    **{name: COMMON[name] for name in ("model", "stream", "metadata", "logit_bias")},
    "stream_options": {"include_obfuscation": True},
    "input": [
        ANSWER,
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "t"},
                {"type": "input_image", "image_url": "data:,", "detail": "auto"},
            ],
        },
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [{"type": "summary_text", "text": "t"}],
            "content": [{"type": "reasoning_text", "text": "t"}],
            "encrypted_content": "e",
            "status": "completed",
        },
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "c1",
            "name": "f",
            "arguments": "{}",
            "status": "completed",
        },
        {
            "type": "function_call_output",
            "call_id": "c1",
            "output": [{"type": "input_text", "text": "t"}],
        },
        {"type": "item_reference", "id": "msg_1"},
    ],
    "tools": [{"type": "function", "name": "f", "description": "d", "parameters": SCHEMA, "strict": True}],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "text": {
        "format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True},
        "verbosity": "low",
    },
    "reasoning": {"effort": "low", "summary": "auto"},
    "degas": {"task": "query", "resumable": True},
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
MESSAGES: dict[str, Any] = {
    "model": "m",
    "system": [{"type": "text", "text": "s", "cache_control": {"free": 1}}],
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "t"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}},
                {"type": "image", "source": {"type": "url", "url": "data:,"}},
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "h", "signature": "s"},
                {"type": "tool_use", "id": "1", "name": "f", "input": {"free": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "r"}]}
            ],
        },
    ],
    "tools": [{"name": "f", "input_schema": SCHEMA}],
    "tool_choice": {"type": "tool", "name": "f"},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
}
OLLAMA: dict[str, Any] = {"model": "m", "options": {"temperature": 0.5}, "format": SCHEMA, "keep_alive": "5m"}
OLLAMA_CALL = {"function": {"name": "f", "arguments": {"free": 1}}}
CREATE = {"type": "response.create", "stream_id": "a", "event_id": "e", **RESPONSES}
SETTINGS = {"temperature": 0.5, "max_tokens": 5}
FREE_HERE = {
    "messages": ("input_schema", "input"),
    "api": ("format", "arguments", "parameters"),
    "chat": ("parameters",),
    "response": ("parameters",),
}
"""Likewise, of single interfaces."""
FREE = ("metadata", "logit_bias", "schema", "json", "chat_template_kwargs", "prediction", "cache_control")
"""Fields whose own content is the client's, and checked where it is used."""

Decode = Callable[[bytes], Any]


def decoder(decode: Decode) -> Decode:
    """As a route decodes its body."""
    return lambda data: decode_body(decode, data)


VALID: dict[str, tuple[Decode, dict[str, Any]]] = {
    "chat": (decoder(chat._decode), CHAT),
    "completions": (decoder(completions._decode), {**COMMON, "prompt": "p", "logprobs": 1}),
    "responses": (bodies.parse_body, RESPONSES),
    "response.create": (lambda data: bodies.parse_event(data.decode()), CREATE),
    "response.cancel": (
        lambda data: bodies.parse_event(data.decode()),
        {"type": "response.cancel", "stream_id": "a", "event_id": "e"},
    ),
    "authenticate": (
        lambda data: bodies.parse_event(data.decode()),
        {"type": "degas.authenticate", "api_key": "none"},
    ),
    "resume": (
        lambda data: bodies.parse_event(data.decode()),
        {"type": "degas.resume", "response_id": "resp_1", "starting_after": 3, "event_id": "e"},
    ),
    "messages": (
        decoder(anthropic._decode_messages),
        {**MESSAGES, "max_tokens": 5, "metadata": {"user_id": "u"}},
    ),
    "messages/count": (decoder(anthropic._decode_count), MESSAGES),
    "api/chat": (
        decoder(ollama._decode_chat),
        {
            **OLLAMA,
            "messages": [{"role": "assistant", "content": "c", "tool_calls": [OLLAMA_CALL]}],
            "tools": [TOOL],
        },
    ),
    "api/generate": (decoder(ollama._decode_generate), {**OLLAMA, "prompt": "p"}),
    "api/show": (decoder(ollama_models._decode_show), {"model": "m"}),
    "chat with tools": (decoder(chat._decode), {**CHAT, "tools": [TOOL]}),
    "chat/tokenize": (
        decoder(tokenize._decode_tokenize),
        {"messages": CHAT["messages"], "tools": [TOOL]},
    ),
    "chat/detokenize": (decoder(tokenize._decode_detokenize), {"tokens": [1]}),
    "query": (
        decoder(moondream._decode_query),
        {
            "question": "q",
            "image_url": "data:,",
            "spatial_refs": [[0.5, 0.5]],
            "reasoning": True,
            "settings": SETTINGS,
        },
    ),
    "caption": (decoder(moondream._decode_caption), {"image_url": "data:,", "settings": SETTINGS}),
    "detect": (
        decoder(moondream._decode_object),
        {"image_url": "data:,", "object": "o", "logprobs": True, "settings": SETTINGS},
    ),
}


def objects(value: Any, route: str, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object with its path, those left out whose content is free."""
    free = (*FREE, *next((more for start, more in FREE_HERE.items() if route.startswith(start)), ()))
    if isinstance(value, dict):
        yield path, value
        for name, inner in value.items():
            if name not in free:
                yield from objects(inner, route, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from objects(inner, route, f"{path}[{index}]")


@pytest.mark.parametrize("name", VALID)
def test_the_bodies_are_valid(name: str) -> None:
    decode, body = VALID[name]
    decode(json.dumps(body).encode())


PLACES = [(name, path) for name, (_, body) in VALID.items() for path, _ in objects(body, name)]


@pytest.mark.parametrize(("name", "path"), PLACES, ids=[f"{name}:{path}" for name, path in PLACES])
@settings(max_examples=4, deadline=None)
@given(
    unknown=st.from_regex(r"[a-z_]{1,12}x_q", fullmatch=True), value=st.sampled_from([1, None, {}, "a", [{}]])
)
def test_an_unknown_field_is_refused_by_its_path(name: str, path: str, unknown: str, value: Any) -> None:
    decode, body = VALID[name]
    changed = copy.deepcopy(body)
    dict(objects(changed, name))[path][unknown] = value
    with pytest.raises(RequestError) as caught:
        decode(json.dumps(changed).encode())
    assert caught.value.code is ErrorCode.INVALID_REQUEST
    assert caught.value.param == (f"{path}.{unknown}" if path else unknown)
    assert caught.value.param in caught.value.message


def structs(kind: type[Known]) -> Iterator[type[Known]]:
    """All structs that clients' JSON is read into."""
    for child in kind.__subclasses__():
        yield child
        yield from structs(child)


ALL = sorted(set(structs(Known)), key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_struct_refuses_the_unknown_and_says_what_it_passes_over(kind: type[Known]) -> None:
    assert kind.__struct_config__.forbid_unknown_fields
    assert set(kind.REFUSED) | set(kind.IGNORED) <= set(kind.__struct_fields__)
    assert not set(kind.REFUSED) & set(kind.IGNORED)
    documented = (Path(__file__).parents[4] / "docs/api.md").read_text()
    assert [name for name in kind.IGNORED if f"`{name}`" not in documented] == []


def test_no_body_is_read_into_anything_else() -> None:
    for kind in ALL:
        for field in msgspec.structs.fields(kind):
            for inner in parts(field.type):
                if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
                    assert issubclass(inner, Known), (kind, field.name)


def parts(annotation: Any) -> Iterator[Any]:
    """An annotation and all within it."""
    yield annotation
    for inner in typing.get_args(annotation):
        yield from parts(inner)


@pytest.mark.parametrize(
    ("official", "kind"),
    [
        (chat_create_params.CompletionCreateParamsNonStreaming, chat.ChatBody),
        (completion_create_params.CompletionCreateParamsNonStreaming, completions.CompletionBody),
        (response_create_params.ResponseCreateParamsNonStreaming, bodies.CreateBody),
    ],
)
def test_every_field_of_the_official_client_is_known(official: Any, kind: type[Known]) -> None:
    assert set(typing.get_type_hints(official)) <= set(kind.__struct_fields__)


@pytest.mark.parametrize(
    "kind",
    [
        chat.ChatBody,
        prompts.Message,
        prompts.ToolCall,
        bodies.Part,
        bodies.Item,
        bodies.FunctionTool,
        moondream.Settings,
    ],
)
def test_refused_fields_are_named_with_their_path(kind: type[Known]) -> None:
    route, where = {
        chat.ChatBody: ("chat", ""),
        prompts.Message: ("chat", "messages[2]"),
        prompts.ToolCall: ("chat", "messages[2].tool_calls[0]"),
        bodies.Part: ("responses", "input[1].content[1]"),
        bodies.Item: ("responses", "input[3]"),
        bodies.FunctionTool: ("responses", "tools[0]"),
        moondream.Settings: ("query", "settings"),
    }[kind]
    decode, body = VALID[route]
    for name in kind.REFUSED:
        changed = copy.deepcopy(body)
        dict(objects(changed, route))[where][name] = "asked"
        with pytest.raises(RequestError) as caught:
            decode(json.dumps(changed).encode())
        param = f"{where}.{name}" if where else name
        assert (caught.value.code, caught.value.param) == (ErrorCode.UNSUPPORTED, param)
        dict(objects(changed, route))[where][name] = None
        decode(json.dumps(changed).encode())
