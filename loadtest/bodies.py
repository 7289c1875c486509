"""Owns the requests of each interface as they leave. An `Ask` in, bytes out."""

from __future__ import annotations

from typing import Any

import msgspec

from loadtest.questions import Ask
from loadtest.scenarios import Planned

SCHEMA_NAME = "answer"


def build_body(planned: Planned, ask: Ask, model: str | None, *, is_degas: bool = True) -> bytes:
    """The request's body; for `responses` the WebSocket message, its lane named after the request."""
    if planned.surface == "query":
        body = _query(ask)
    elif planned.surface == "chat":
        body = _chat(ask, is_degas=is_degas)
    elif planned.surface == "completions":
        body = _completions(ask)
    else:
        body = _responses(ask, lane_of(planned))
    if model is not None:
        body["model"] = model
    return msgspec.json.encode(body)


def lane_of(planned: Planned) -> str:
    """The WebSocket lane of a request: one of its own, since a lane answers one request after another."""
    return f"r{planned.index}"


def _query(ask: Ask) -> dict[str, Any]:
    body: dict[str, Any] = {
        "question": ask.messages[-1][1],
        "stream": True,
        "settings": {"max_tokens": ask.max_tokens, "temperature": 0},
    }
    if ask.picture is not None:
        body["image_url"] = ask.picture.data_url
    return body


def _chat(ask: Ask, *, is_degas: bool) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in ask.messages]
    if ask.picture is not None:
        messages[0]["content"] = [
            {"type": "image_url", "image_url": {"url": ask.picture.data_url}},
            {"type": "text", "text": ask.messages[0][1]},
        ]
    # Other servers of this interface may know the older name only, and would not stop.
    limit = "max_completion_tokens" if is_degas else "max_tokens"
    body: dict[str, Any] = {
        "messages": messages,
        limit: ask.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if ask.schema is not None:
        form = {"name": SCHEMA_NAME, "schema": ask.schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    return body


def _completions(ask: Ask) -> dict[str, Any]:
    body: dict[str, Any] = {
        "prompt": "\n".join(text for _, text in ask.messages),
        "max_tokens": ask.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if ask.schema is not None:
        form = {"name": SCHEMA_NAME, "schema": ask.schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    return body


def _responses(ask: Ask, lane: str) -> dict[str, Any]:
    items: list[dict[str, Any]] = []
    for role, text in ask.messages:
        kind = "output_text" if role == "assistant" else "input_text"
        parts: list[dict[str, Any]] = [{"type": kind, "text": text}]
        if ask.picture is not None and not items:
            parts.insert(0, {"type": "input_image", "image_url": ask.picture.data_url})
        items.append({"type": "message", "role": role, "content": parts})
    body: dict[str, Any] = {
        "type": "response.create",
        "stream_id": lane,
        "input": items,
        "max_output_tokens": ask.max_tokens,
        "temperature": 0,
        "store": False,
    }
    if ask.schema is not None:
        form = {"type": "json_schema", "name": SCHEMA_NAME, "schema": ask.schema, "strict": True}
        body["text"] = {"format": form}
    return body
