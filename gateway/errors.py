"""Owns the one table from `ErrorCode` to HTTP status, WebSocket close code and gRPC status."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import msgspec

from gateway.generation import RequestError
from shared.errors import ErrorCode


class Status(NamedTuple):
    """How one code looks to clients. `grpc` is the number of a `grpc.StatusCode`."""

    http: int
    websocket: int
    grpc: int
    type: str


_INVALID_ARGUMENT, _DEADLINE_EXCEEDED, _NOT_FOUND, _PERMISSION_DENIED = 3, 4, 5, 7
_RESOURCE_EXHAUSTED, _FAILED_PRECONDITION, _ABORTED, _INTERNAL = 8, 9, 10, 13
_UNAVAILABLE, _UNAUTHENTICATED, _CANCELLED = 14, 16, 1

# QUARANTINED and DEADLINE_EXCEEDED are 4xx on purpose: official SDKs repeat 408, 409, 429 and 5xx by themselves,
# and a repeat of these two would do the same damage again.
STATUSES: Final[dict[ErrorCode, Status]] = {
    ErrorCode.INVALID_REQUEST: Status(400, 1007, _INVALID_ARGUMENT, "invalid_request_error"),
    ErrorCode.UNAUTHORIZED: Status(401, 3000, _UNAUTHENTICATED, "authentication_error"),
    ErrorCode.FORBIDDEN_ORIGIN: Status(403, 3003, _PERMISSION_DENIED, "permission_error"),
    ErrorCode.NOT_FOUND: Status(404, 1008, _NOT_FOUND, "invalid_request_error"),
    ErrorCode.MODEL_NOT_FOUND: Status(404, 1008, _NOT_FOUND, "invalid_request_error"),
    ErrorCode.UNSUPPORTED: Status(400, 1003, _INVALID_ARGUMENT, "invalid_request_error"),
    ErrorCode.PAYLOAD_TOO_LARGE: Status(413, 1009, _RESOURCE_EXHAUSTED, "invalid_request_error"),
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: Status(400, 1008, _INVALID_ARGUMENT, "invalid_request_error"),
    ErrorCode.INVALID_GRAMMAR: Status(400, 1008, _INVALID_ARGUMENT, "invalid_request_error"),
    ErrorCode.QUEUE_FULL: Status(429, 1013, _RESOURCE_EXHAUSTED, "rate_limit_error"),
    ErrorCode.RATE_LIMITED: Status(429, 1013, _RESOURCE_EXHAUSTED, "rate_limit_error"),
    ErrorCode.LOADING: Status(503, 1013, _UNAVAILABLE, "service_unavailable_error"),
    ErrorCode.SHUTTING_DOWN: Status(503, 1012, _UNAVAILABLE, "service_unavailable_error"),
    ErrorCode.WORKER_LOST: Status(503, 1013, _UNAVAILABLE, "service_unavailable_error"),
    ErrorCode.QUARANTINED: Status(422, 1008, _FAILED_PRECONDITION, "invalid_request_error"),
    ErrorCode.OUT_OF_MEMORY: Status(503, 1013, _RESOURCE_EXHAUSTED, "service_unavailable_error"),
    ErrorCode.NUMERICAL_ERROR: Status(500, 1011, _INTERNAL, "server_error"),
    ErrorCode.DEVICE_ERROR: Status(503, 1011, _UNAVAILABLE, "service_unavailable_error"),
    ErrorCode.DEADLINE_EXCEEDED: Status(422, 1008, _DEADLINE_EXCEEDED, "invalid_request_error"),
    ErrorCode.SLOW_CLIENT: Status(408, 1008, _ABORTED, "invalid_request_error"),
    ErrorCode.CANCELLED: Status(499, 1000, _CANCELLED, "invalid_request_error"),
    ErrorCode.VERSION_SKEW: Status(503, 1011, _UNAVAILABLE, "service_unavailable_error"),
    ErrorCode.STREAM_GAP: Status(500, 1011, _INTERNAL, "server_error"),
    ErrorCode.INTERNAL: Status(500, 1011, _INTERNAL, "server_error"),
}

_ANTHROPIC_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}

RETRY_AFTER_S: Final[dict[ErrorCode, float]] = {
    ErrorCode.QUEUE_FULL: 1.0,
    ErrorCode.RATE_LIMITED: 1.0,
    ErrorCode.LOADING: 2.0,
    ErrorCode.SHUTTING_DOWN: 5.0,
    ErrorCode.WORKER_LOST: 2.0,
    ErrorCode.OUT_OF_MEMORY: 1.0,
    ErrorCode.DEVICE_ERROR: 5.0,
}
"""`Retry-After` in seconds for errors that carry none: every 429 and 503 names a time."""


def http_status(error: RequestError) -> int:
    """The HTTP status of an error."""
    return STATUSES[error.code].http


def websocket_close(error: RequestError) -> int:
    """The WebSocket close code of an error that ends the connection."""
    return STATUSES[error.code].websocket


def grpc_status(error: RequestError) -> int:
    """The number of the `grpc.StatusCode` of an error."""
    return STATUSES[error.code].grpc


def error_object(error: RequestError) -> dict[str, object]:
    """The inner object of OpenAI's error shape."""
    return {
        "message": error.message,
        "type": STATUSES[error.code].type,
        "param": error.param,
        "code": error.code.value,
    }


def anthropic_error(error: RequestError) -> dict[str, object]:
    """Anthropic's error shape."""
    kind = _ANTHROPIC_TYPES.get(http_status(error), "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def ollama_error(error: RequestError) -> dict[str, object]:
    """Ollama's error shape: words alone."""
    return {"error": error.message}


_OWN_SHAPES: Final = {"/v1/messages": anthropic_error, "/api/": ollama_error}
"""The error shapes other than OpenAI's, by how their interfaces' paths begin."""

_FAMILIES: Final = {"/v1/messages": "anthropic", "/api/": "ollama"}


def error_family(path: str) -> str:
    """Whose error shape the interface at `path` has: openai, anthropic or ollama."""
    return next((name for start, name in _FAMILIES.items() if path.startswith(start)), "openai")


def has_own_errors(path: str) -> bool:
    """Whether the interface that `path` belongs to has another error shape than OpenAI's."""
    return path.startswith(tuple(_OWN_SHAPES))


def error_body(error: RequestError, path: str = "") -> bytes:
    """The error as JSON, in the shape of the interface that `path` belongs to; OpenAI's for all others."""
    shape = next((own for start, own in _OWN_SHAPES.items() if path.startswith(start)), None)
    return msgspec.json.encode({"error": error_object(error)} if shape is None else shape(error))


def retry_after_s(error: RequestError) -> float:
    """Seconds a client should wait before trying again; 0 when trying again is pointless."""
    return error.retry_after_s or RETRY_AFTER_S.get(error.code, 0.0)


def error_headers(error: RequestError) -> dict[str, str]:
    """`Retry-After` in whole seconds, and in milliseconds as OpenAI's SDKs prefer it."""
    wait_s = retry_after_s(error)
    if wait_s <= 0:
        return {}
    return {
        "Retry-After": str(max(1, math.ceil(wait_s))),
        "retry-after-ms": str(max(1, round(wait_s * 1000))),
    }
