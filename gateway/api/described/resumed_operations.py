"""Owns the description of resumable streams: their own routes, and the headers that generating routes take. No thread."""

from __future__ import annotations

from typing import Final

from gateway.api.described import answers
from gateway.api.described.operation import SSE, Operation
from gateway.api.parameters import Json

_ERRORS: Final = (400, 401, 404, 417, 500)

_ID: Final[Json] = {
    "name": "id",
    "in": "path",
    "required": True,
    "description": "the answer's id, as its first event has it",
    "schema": {"type": "string", "minLength": 1, "maxLength": 64},
}
_AFTER: Final[Json] = {
    "name": "starting_after",
    "in": "query",
    "description": "the sequence number of the last event seen; -1: none was",
    "schema": {"type": "integer", "minimum": -1},
}
_STREAM: Final[Json] = {
    "name": "stream",
    "in": "query",
    "description": "events rather than the whole response",
    "schema": {"type": "boolean", "default": False},
}
_LAST_EVENT: Final[Json] = {
    "name": "Last-Event-ID",
    "in": "header",
    "description": "the `id:` of the last event seen",
    "schema": {"type": "string", "maxLength": 128},
}
RESUMABLE: Final[tuple[Json, ...]] = (
    {
        "name": "X-Degas-Resumable",
        "in": "header",
        "description": "`true`: the stream outlives its connection for a while, and its events have ids",
        "schema": {"type": "string", "enum": ["true", "false"]},
    },
)
"""The header that every route with a stream of server-sent events takes."""

OPERATIONS: Final = (
    Operation(
        "GET",
        "/v1/streams/{id}",
        "Streams",
        "Go on with a resumable stream",
        text="Behind `Last-Event-ID`, or `starting_after`. 204: it has ended, and nothing follows.",
        answers={200: ("text/event-stream", "The events that follow."), 204: ("", "It has ended.")},
        errors=_ERRORS,
        parameters=(_ID, _AFTER, _LAST_EVENT),
    ),
    Operation(
        "DELETE",
        "/v1/streams/{id}",
        "Streams",
        "Cancel a resumable stream",
        answers={204: ("", "It is cancelled.")},
        errors=_ERRORS,
        parameters=(_ID,),
    ),
    Operation(
        "GET",
        "/v1/responses/{id}",
        "OpenAI",
        "A resumable response: whole, or its events from a place on",
        answers={200: answers.Response, 204: ("", "It has ended, and nothing follows.")},
        stream=(SSE, answers.ResponseEvent),
        errors=_ERRORS,
        parameters=(_ID, _STREAM, _AFTER, _LAST_EVENT),
    ),
    Operation(
        "POST",
        "/v1/responses/{id}/cancel",
        "OpenAI",
        "Cancel a resumable response",
        answers={200: answers.Response},
        errors=_ERRORS,
        parameters=(_ID,),
    ),
)
