"""Owns the one list of what can go wrong between processes. Imported by every process."""

from __future__ import annotations

from enum import StrEnum


class ErrorCode(StrEnum):
    """A fault as it travels between processes and, mapped by `gateway.errors`, to clients."""

    INVALID_REQUEST = "invalid_request"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN_ORIGIN = "forbidden_origin"
    NOT_FOUND = "not_found"
    MODEL_NOT_FOUND = "model_not_found"
    UNSUPPORTED = "unsupported"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    INVALID_GRAMMAR = "invalid_grammar"
    QUEUE_FULL = "queue_full"
    RATE_LIMITED = "rate_limit_exceeded"
    LOADING = "loading"
    SHUTTING_DOWN = "shutting_down"
    WORKER_LOST = "worker_lost"
    QUARANTINED = "quarantined"
    OUT_OF_MEMORY = "out_of_memory"
    NUMERICAL_ERROR = "numerical_error"
    DEVICE_ERROR = "device_error"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    SLOW_CLIENT = "slow_client"
    CANCELLED = "cancelled"
    VERSION_SKEW = "version_skew"
    STREAM_GAP = "stream_gap"
    INTERNAL = "internal_error"


class FinishReason(StrEnum):
    """Why a sequence ended. Exactly one travels with every accepted request."""

    STOP = "stop"
    LENGTH = "length"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    ERROR = "error"
