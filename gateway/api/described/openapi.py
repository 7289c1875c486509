"""Owns `/openapi.json`: made of the list of operations and of the structs that bodies are read into. Gateway's loop, once.

A field that is refused is described as such: only values that ask for nothing go with it. One that changes nothing says so.
"""

from __future__ import annotations

import functools
import re
import typing
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from gateway.api.described import answers, other_answers
from gateway.api.described.operation import SSE, Operation
from gateway.api.described.operations import BODY_ERRORS, OPERATIONS, PLAIN_ERRORS
from gateway.api.described.resumed_operations import RESUMABLE
from gateway.api.fields import NOTHING, Known
from gateway.api.parameters import Json
from gateway.errors import STATUSES, error_family

VERSION: Final = "3.1.0"

_REF: Final = "#/components/schemas/{name}"
_ERRORS: Final = {
    "openai": answers.Error,
    "anthropic": other_answers.AnthropicError,
    "ollama": other_answers.OllamaError,
}
_PHRASES: Final = {
    417: "an Expect header other than 100-continue",
    426: "another version of the WebSocket protocol",
}
_IGNORED_TEXT: Final = "Accepted, and changes nothing here."
_REFUSED_TEXT: Final = "Not supported: refused unless it asks for nothing."
_KEYED: Final[list[Json]] = [{"bearer": []}, {"x-api-key": []}, {"x-moondream-auth": []}, {}]
_TAGS: Final = {
    "OpenAI": "Chat, completions, responses and models, as OpenAI's clients ask for them.",
    "Anthropic": "Messages, as Anthropic's clients ask for them.",
    "Ollama": "Ollama's routes. Those that manage models are refused.",
    "Moondream": "Moondream's own routes: questions, captions, boxes and points.",
    "Tokens": "Texts to token ids and back, as vLLM has it.",
    "Streams": "Going on with an answer after a lost connection.",
    "Server": "Health, figures and this description.",
}
_INTRODUCTION: Final = """\
Degas serves small language and vision-language models behind the interfaces that people already use.

Where the operator has set keys, send one as `Authorization: Bearer …`, `x-api-key` or `X-Moondream-Auth`. Every answer has an \
`x-request-id`, the client's own if it sent one. A 429 and a 503 say in `Retry-After` when to try again. An unknown field of a \
body is a 400 that names it."""


@functools.cache
def document() -> bytes:
    """The whole description as JSON."""
    refs, schemas = _schemas()
    paths: Json = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, refs)
    described = {
        "openapi": VERSION,
        "info": {
            "title": "Degas",
            "version": "1",
            "description": _INTRODUCTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "headers": {
                "RequestId": {"description": "The request's id.", "schema": {"type": "string"}},
                "RetryAfter": {
                    "description": "Seconds after which to try again.",
                    "schema": {"type": "integer", "minimum": 1},
                },
            },
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                "x-moondream-auth": {"type": "apiKey", "in": "header", "name": "X-Moondream-Auth"},
            },
        },
    }
    return msgspec.json.encode(described)


# ------------------------------------------------------------ one operation


def _operation(operation: Operation, refs: dict[Any, Json]) -> Json:
    made: Json = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "operationId": _name(operation),
        "security": _KEYED if operation.needs_key else [{}],
        "responses": {**_answers(operation, refs), **_errors(operation, refs)},
    }
    if operation.text:
        made["description"] = operation.text
    assert operation.tag in _TAGS
    streams_events = operation.stream is not None and operation.stream[0] == SSE
    if streams_events and operation.body is not None:
        made["parameters"] = list(RESUMABLE)
    if operation.parameters:
        made["parameters"] = list(operation.parameters)
    if operation.public:
        made["x-public"] = operation.public
    if operation.body is not None:
        body: Json = {"schema": refs[operation.body]}
        if operation.example is not None:
            body["example"] = operation.example
        made["requestBody"] = {"required": True, "content": {"application/json": body}}
    if operation.socket is not None:
        made["x-messages"] = {
            side: {"anyOf": [refs[kind] for kind in typing.get_args(union)]}
            for side, union in zip(("client", "server"), operation.socket, strict=True)
        }
    if not operation.answers:
        made["deprecated"] = True
    return made


def _name(operation: Operation) -> str:
    words = re.findall(r"[a-z0-9_]+", operation.path)
    return "_".join([operation.method.lower(), *words])


def _answers(operation: Operation, refs: dict[Any, Json]) -> Json:
    said: Json = {}
    for status, answer in operation.answers.items():
        if isinstance(answer, tuple):
            media, text = answer
            said[str(status)] = {"description": text, **({"content": {media: {}}} if media else {})}
        else:
            content = {"application/json": {"schema": refs[answer]}}
            said[str(status)] = {"description": (answer.__doc__ or "").strip(), "content": content}
        if operation.stream is not None and status == 200:
            media, event = operation.stream
            said["200"]["content"][media] = {"schema": _streamed(media, event, refs)}
        said[str(status)]["headers"] = {"x-request-id": {"$ref": "#/components/headers/RequestId"}}
    return said


def _streamed(media: str, event: Any, refs: dict[Any, Json]) -> Json:
    """One event, or one line. OpenAPI 3.1 has no word for a sequence of them."""
    kinds = [refs[kind] for kind in _members(event)]
    data: Json = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    if media != SSE:
        return {"description": "One line, where the answer streams.", **data}
    return {
        "type": "object",
        "description": "One event, where `stream` is true. OpenAI's older interfaces end with the data `[DONE]`.",
        "properties": {
            "event": {"type": "string"},
            "id": {"type": "string", "description": "Of resumable streams."},
            "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": data},
        },
        "required": ["data"],
    }


def _errors(operation: Operation, refs: dict[Any, Json]) -> Json:
    family = _ERRORS[error_family(operation.path)]
    statuses = operation.errors or (BODY_ERRORS if operation.body is not None else PLAIN_ERRORS)
    said: Json = {}
    for status in statuses:
        if status in operation.answers:
            continue
        headers = {"x-request-id": {"$ref": "#/components/headers/RequestId"}}
        if status in (429, 503):
            headers["Retry-After"] = {"$ref": "#/components/headers/RetryAfter"}
        said[str(status)] = {
            "description": _PHRASES.get(status) or _codes(status),
            "headers": headers,
            "content": {"application/json": {"schema": refs[family]}},
        }
    return said


def _codes(status: int) -> str:
    return ", ".join(code.value for code, told in STATUSES.items() if told.http == status)


# ------------------------------------------------------------ schemas


def _members(kind: Any) -> tuple[Any, ...]:
    """A struct, or those of a union."""
    return (kind,) if isinstance(kind, type) else typing.get_args(kind)


def _wanted() -> list[type[msgspec.Struct]]:
    """Every struct that the description speaks of, in order."""
    found: dict[type[msgspec.Struct], None] = {}

    def add(annotation: Any) -> None:
        is_struct = isinstance(annotation, type) and issubclass(annotation, msgspec.Struct)
        if is_struct and annotation not in found:
            found[annotation] = None
            for field in msgspec.structs.fields(annotation):
                add(field.type)
        for inner in typing.get_args(annotation):
            add(inner)

    for operation in OPERATIONS:
        kinds = [operation.body, *operation.answers.values(), *(operation.stream or ())[1:]]
        for kind in (*kinds, *(operation.socket or ()), *_ERRORS.values()):
            if kind is not None and not isinstance(kind, tuple | str):
                add(kind)
    return list(found)


def _schemas() -> tuple[dict[Any, Json], Json]:
    """A reference for each struct, and the schemas they refer to."""
    wanted = _wanted()
    made, components = msgspec.json.schema_components(wanted, ref_template=_REF)
    for kind, ref in zip(wanted, made, strict=True):
        schema = components[ref["$ref"].rpartition("/")[2]]
        _mark(kind, schema)
    names = dict(_renamings(components))
    data = msgspec.json.encode([made, components]).decode()
    for old, new in names.items():
        data = data.replace(_REF.format(name=old) + '"', _REF.format(name=new) + '"')
    refs, components = msgspec.json.decode(data)
    renamed = {names.get(name, name): schema for name, schema in components.items()}
    for name, schema in renamed.items():
        schema["title"] = name
    return dict(zip(wanted, refs, strict=True)), renamed


def _renamings(components: Json) -> Iterator[tuple[str, str]]:
    """Structs of one name have their modules before it: short names for them."""
    for name in components:
        words = re.split(r"[._](?=[A-Z])|\.", name)
        if len(words) > 1:
            module = words[-2].rpartition("api_")[2] or words[-2]
            prefix = module.title().replace("_", "")
            yield name, words[-1] if words[-1].startswith(prefix) else prefix + words[-1]


def _mark(kind: type[msgspec.Struct], schema: Json) -> None:
    """Say which of a body's fields are refused and which change nothing."""
    properties: Json = schema.get("properties", {})
    for told in properties.values():
        if told.get("default", 0) is None:
            del told["default"]
    if not issubclass(kind, Known):
        return
    types = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    for name in kind.REFUSED:
        empty = [value for value in NOTHING if _fits(value, types[name])]
        if 0 in NOTHING and _fits(0, types[name]):
            empty += [0]  # equal to False, and so among those values
        properties[name] = {
            "enum": empty,
            "description": _REFUSED_TEXT,
            "deprecated": True,
            "x-refused": True,
        }
    for name in kind.IGNORED:
        properties[name].update({"description": _IGNORED_TEXT, "x-ignored": True})


def _fits(value: object, annotation: Any) -> bool:
    try:
        msgspec.convert(value, annotation, strict=True)
    except msgspec.ValidationError:
        return False
    return True
