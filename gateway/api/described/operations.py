"""Owns the list of what can be asked over HTTP: each operation's body, answers, errors and an example. Read, never run: no thread.

Bodies are the structs that requests are read into (`gateway.api.fields`), so the description has exactly their fields.
"""

from __future__ import annotations

from typing import Final

from gateway.api import (
    anthropic,
    chat,
    completions,
    moondream,
    ollama,
    ollama_models,
    response_bodies,
    segments,
    tokenize,
)
from gateway.api.described import answers, moondream_answers, other_answers, resumed_operations
from gateway.api.described.operation import SSE, Operation

BODY_ERRORS: Final = (400, 401, 404, 408, 413, 417, 422, 429, 500, 503)
READ_ERRORS: Final = (400, 401, 404, 408, 413, 417, 429, 500, 503)
PLAIN_ERRORS: Final = (400, 401, 417, 500)
OPEN_ERRORS: Final = (400, 417, 500)

_IMAGE: Final = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAADAAAAAwAQMAAABtzGvEAAAABlBMVEX69uvERjzIjkrsAAAAV0lEQVR42rXOMQ5FYBQF4c8l"
    "oXw7YCmWYie29i/FEpQKeRQSt1Uwzckkpxg+oV1BvxNMNTVFVULFKASDuN6h4ZfW0aU9mI0tbWdN+7MIBwXm4y7Lzvc4AeBX"
    "D7CEOH1SAAAAAElFTkSuQmCC"
)
"""A red disc."""


_MESSAGES: Final = [{"role": "user", "content": "What is a ballet?"}]
_FREE = {"max_tokens": 32}

_GENERATING: Final = (
    Operation(
        "POST",
        "/v1/chat/completions",
        "OpenAI",
        "Answer a conversation",
        body=chat.ChatBody,
        example={"messages": _MESSAGES, **_FREE},
        answers={200: answers.ChatCompletion},
        stream=(SSE, answers.ChatChunk),
    ),
    Operation(
        "POST",
        "/v1/completions",
        "OpenAI",
        "Continue a text",
        body=completions.CompletionBody,
        example={"prompt": "The quick brown fox", **_FREE},
        answers={200: answers.TextCompletion},
        stream=(SSE, answers.TextCompletion),
    ),
    Operation(
        "POST",
        "/v1/responses",
        "OpenAI",
        "Make a response",
        body=response_bodies.CreateBody,
        example={"input": "What is a ballet?", "max_output_tokens": 32},
        answers={200: answers.Response},
        stream=(SSE, answers.ResponseEvent),
    ),
    Operation(
        "POST",
        "/v1/messages",
        "Anthropic",
        "Answer a conversation",
        body=anthropic.MessagesBody,
        example={"model": "MODEL", "messages": _MESSAGES, **_FREE},
        answers={200: other_answers.MessageAnswered},
        stream=(SSE, other_answers.MessageEvent),
    ),
    Operation(
        "POST",
        "/api/chat",
        "Ollama",
        "Answer a conversation",
        text="Streams unless `stream` is false.",
        body=ollama.ChatBody,
        example={"model": "MODEL", "messages": _MESSAGES, "stream": False},
        answers={200: other_answers.OllamaChatAnswer},
        stream=("application/x-ndjson", other_answers.OllamaChatAnswer),
    ),
    Operation(
        "POST",
        "/api/generate",
        "Ollama",
        "Answer a prompt",
        text="Streams unless `stream` is false.",
        body=ollama.GenerateBody,
        example={"model": "MODEL", "prompt": "What is a ballet?", "stream": False},
        answers={200: other_answers.OllamaGenerated},
        stream=("application/x-ndjson", other_answers.OllamaGenerated),
    ),
    Operation(
        "POST",
        "/v1/query",
        "Moondream",
        "Ask about a picture",
        body=moondream.QueryBody,
        example={"question": "What is in the picture?", "image_url": _IMAGE},
        answers={200: moondream_answers.QueryAnswer},
        stream=(SSE, moondream_answers.MoondreamChunk),
    ),
    Operation(
        "POST",
        "/v1/caption",
        "Moondream",
        "Describe a picture",
        body=moondream.CaptionBody,
        example={"image_url": _IMAGE, "length": "short"},
        answers={200: moondream_answers.CaptionAnswer},
        stream=(SSE, moondream_answers.MoondreamChunk),
    ),
    Operation(
        "POST",
        "/v1/detect",
        "Moondream",
        "Find boxes of what is named",
        body=moondream.ObjectBody,
        example={"image_url": _IMAGE, "object": "circle"},
        answers={200: moondream_answers.DetectAnswer},
        stream=(SSE, moondream_answers.MoondreamChunk),
    ),
    Operation(
        "POST",
        "/v1/point",
        "Moondream",
        "Point at what is named",
        body=moondream.ObjectBody,
        example={"image_url": _IMAGE, "object": "circle"},
        answers={200: moondream_answers.PointAnswer},
        stream=(SSE, moondream_answers.MoondreamChunk),
    ),
    Operation(
        "POST",
        "/v1/segment",
        "Moondream",
        "Outline what is named",
        text="The path's numbers are fractions of the box: scale it by the box's sides, then move it to the box's corner.",
        body=segments.SegmentBody,
        example={"image_url": _IMAGE, "object": "circle"},
        answers={200: moondream_answers.SegmentAnswer},
        stream=(SSE, moondream_answers.SegmentChunk),
    ),
)

_TOLD: Final = (
    Operation(
        "POST",
        "/v1/messages/count_tokens",
        "Anthropic",
        "Count a prompt's tokens",
        body=anthropic.CountBody,
        example={"model": "MODEL", "messages": _MESSAGES},
        answers={200: other_answers.TokensCounted},
        errors=READ_ERRORS,
    ),
    Operation(
        "POST",
        "/tokenize",
        "Tokens",
        "Text or a conversation to token ids",
        body=tokenize.TokenizeBody,
        example={"prompt": "The quick brown fox", "return_token_strs": True},
        answers={200: other_answers.Tokenized},
        errors=READ_ERRORS,
    ),
    Operation(
        "POST",
        "/detokenize",
        "Tokens",
        "Token ids to text",
        body=tokenize.DetokenizeBody,
        example={"tokens": [20, 30, 40]},
        answers={200: other_answers.Detokenized},
        errors=READ_ERRORS,
    ),
    Operation(
        "POST",
        "/api/show",
        "Ollama",
        "What a model is",
        body=ollama_models.ShowBody,
        example={"model": "MODEL"},
        answers={200: other_answers.OllamaShown},
        errors=READ_ERRORS,
    ),
    Operation(
        "GET",
        "/api/tags",
        "Ollama",
        "What is served",
        answers={200: other_answers.OllamaModels},
    ),
    Operation(
        "GET",
        "/api/ps",
        "Ollama",
        "What is loaded: the same",
        answers={200: other_answers.OllamaModels},
    ),
    Operation(
        "GET",
        "/api/version",
        "Ollama",
        "Which version of the interface this is",
        answers={200: other_answers.OllamaVersion},
    ),
    Operation(
        "GET",
        "/v1/stats",
        "Moondream",
        "How busy it is, as moondream-station tells it",
        answers={200: other_answers.Stats},
    ),
    Operation("GET", "/v1/models", "OpenAI", "What is served", answers={200: answers.Models}),
    Operation(
        "GET",
        "/v1/models/{model_id}",
        "OpenAI",
        "One served model",
        answers={200: answers.Model},
        errors=(400, 401, 404, 417, 500, 503),
        parameters=(
            {
                "name": "model_id",
                "in": "path",
                "required": True,
                "description": "its name, or an alias",
                "schema": {"type": "string", "minLength": 1},
            },
        ),
    ),
)

_SOCKET: Final = Operation(
    "GET",
    "/v1/responses",
    "OpenAI",
    "Responses over a WebSocket",
    text="Opens a WebSocket (version 13). Its messages are JSON texts; `x-messages` has their shapes. Browsers, which set no "
    "headers, offer the key as subprotocol `openai-insecure-api-key.<key>` or send it first (`degas.authenticate`).",
    answers={101: ("", "The WebSocket is open.")},
    errors=(400, 401, 403, 417, 426, 429, 500),
    socket=(response_bodies.ClientEvent, answers.ResponseEvent),
)

_HEALTH: Final = tuple(
    Operation(
        "GET", path, "Server", "The process lives", answers={200: other_answers.Health}, errors=OPEN_ERRORS,
        needs_key=False,
    )
    for path in ("/healthz", "/health")
) + tuple(
    Operation(
        "GET", path, "Server", "New work would be served",
        answers={200: other_answers.Readiness, 503: other_answers.Readiness}, public="readiness",
    )
    for path in ("/readyz", "/v1/health/ready")
)  # fmt: skip

_SERVER: Final = (
    Operation(
        "GET",
        "/metrics",
        "Server",
        "Figures for Prometheus",
        answers={200: ("text/plain", "Prometheus text.")},
        public="metrics",
    ),
    Operation(
        "GET",
        "/debug/trace",
        "Server",
        "Record the worker's next steps",
        text="Answers when so many steps have run: a worker that has nothing to do runs none, and after a minute this is a 503.",
        answers={200: ("application/json", "Events as Chrome's trace viewer and Perfetto read them.")},
        errors=(*PLAIN_ERRORS, 503),
        parameters=(
            {
                "name": "steps",
                "in": "query",
                "schema": {"type": "integer", "minimum": 1, "maximum": 10_000, "default": 200},
            },
        ),
    ),
    Operation(
        "GET",
        "/openapi.json",
        "Server",
        "This description",
        answers={200: ("application/json", "An OpenAPI 3.1 document.")},
    ),
    Operation(
        "GET",
        "/docs",
        "Server",
        "This description as a page",
        answers={200: ("text/html", "A page that reads `/openapi.json`.")},
        public="page",
    ),
)

_REFUSED_METHODS: Final = {"delete": "DELETE", "blobs/{digest}": "POST"}
_REFUSED: Final = tuple(
    Operation(
        _REFUSED_METHODS.get(name, "POST"),
        f"/api/{name}",
        "Ollama",
        "Refused: models are not managed over HTTP, and none makes embeddings",
        parameters=(
            (
                {
                    "name": "digest",
                    "in": "path",
                    "required": True,
                    "schema": {"type": "string", "minLength": 1},
                },
            )
            if "{digest}" in name
            else ()
        ),
    )
    for name in ollama_models.REFUSED
)

OPERATIONS: Final = (
    *_GENERATING,
    _SOCKET,
    *resumed_operations.OPERATIONS,
    *_TOLD,
    *_HEALTH,
    *_SERVER,
    *_REFUSED,
)
"""Everything that is served, but for the page's files."""
