"""Owns the shapes of what every interface but OpenAI's answers, for the description at `/openapi.json`. Read, never built: no thread."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from gateway.api.described.answers import Told
from gateway.api.parameters import Json

# ------------------------------------------------------------ Anthropic's


class AnthropicErrorDetail(Told, kw_only=True):
    """What went wrong."""

    type: str
    message: str


class AnthropicError(Told, kw_only=True):
    """Anthropic's error shape."""

    type: Literal["error"]
    error: AnthropicErrorDetail


class TextBlock(Told, kw_only=True, tag_field="type", tag="text"):
    """Text for the reader."""

    text: str


class ThinkingBlock(Told, kw_only=True, tag_field="type", tag="thinking"):
    """The model's thinking. The signature means nothing here."""

    thinking: str
    signature: str


class ToolUseBlock(Told, kw_only=True, tag_field="type", tag="tool_use"):
    """A call."""

    id: str
    name: str
    input: Json


class MessageUsage(Told, kw_only=True):
    """Tokens; a prompt's cached part is counted apart."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageAnswered(Told, kw_only=True):
    """An answer of `/v1/messages`."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageStart(Told, kw_only=True, tag_field="type", tag="message_start"):
    """The message, still without content."""

    message: MessageAnswered


class BlockStart(Told, kw_only=True, tag_field="type", tag="content_block_start"):
    """A block opens."""

    index: int
    content_block: TextBlock | ThinkingBlock | ToolUseBlock


class BlockDelta(Told, kw_only=True, tag_field="type", tag="content_block_delta"):
    """More of the open block: `text_delta`, `thinking_delta`, `signature_delta` or `input_json_delta`."""

    index: int
    delta: Json


class BlockStop(Told, kw_only=True, tag_field="type", tag="content_block_stop"):
    """A block is whole."""

    index: int


class StopDelta(Told, kw_only=True):
    """Why the answer ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Told, kw_only=True, tag_field="type", tag="message_delta"):
    """The end, and what it cost."""

    delta: StopDelta
    usage: MessageUsage


class MessageStop(Told, kw_only=True, tag_field="type", tag="message_stop"):
    """Nothing follows."""


class Ping(Told, kw_only=True, tag_field="type", tag="ping"):
    """A sign of life."""


MessageEvent = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | Ping
"""The data of one event of a streamed message."""


class TokensCounted(Told, kw_only=True):
    """The tokens of a prompt, its pictures' included."""

    input_tokens: int


# ------------------------------------------------------------ Ollama's


class OllamaError(Told, kw_only=True):
    """Ollama's error shape: words alone."""

    error: str


class OllamaFunction(Told, kw_only=True):
    """`function` of a call: arguments are an object."""

    name: str
    arguments: Json


class OllamaCall(Told, kw_only=True):
    """A call."""

    id: str
    function: OllamaFunction


class OllamaMessage(Told, kw_only=True):
    """The assistant's turn, or what a line adds to it."""

    role: Literal["assistant"]
    content: str
    thinking: str | UnsetType = UNSET
    tool_calls: list[OllamaCall] | UnsetType = UNSET


class _OllamaSaid(Told, kw_only=True):
    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load"] | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET


class OllamaChatAnswer(_OllamaSaid, kw_only=True):
    """The answer of `/api/chat`, or one line of it. Durations are in nanoseconds."""

    message: OllamaMessage


class OllamaGenerated(_OllamaSaid, kw_only=True):
    """The answer of `/api/generate`, or one line of it. Durations are in nanoseconds."""

    response: str
    thinking: str | UnsetType = UNSET


class OllamaDetails(Told, kw_only=True):
    """What a model is."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(Told, kw_only=True):
    """A served model."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails
    expires_at: str | UnsetType = UNSET
    size_vram: int | UnsetType = UNSET


class OllamaModels(Told, kw_only=True):
    """What is served."""

    models: list[OllamaModel]


class OllamaShown(Told, kw_only=True):
    """What `/api/show` says of a model."""

    modelfile: str
    parameters: str
    template: str
    details: OllamaDetails
    model_info: Json
    capabilities: list[str]
    modified_at: str


class OllamaVersion(Told, kw_only=True):
    """The version of Ollama whose interface this follows."""

    version: str


# ------------------------------------------------------------ tokens and health


class Tokenized(Told, kw_only=True):
    """Token ids."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class Detokenized(Told, kw_only=True):
    """Text."""

    prompt: str


class Health(Told, kw_only=True):
    """Whether the process lives."""

    status: Literal["live"]


class Readiness(Told, kw_only=True):
    """Whether new work would be served, and why not."""

    status: Literal["ready", "not ready"]
    reason: str


class Stats(Told, kw_only=True):
    """`GET /v1/stats`."""

    status: Literal["running", "stopped"]
    model: str | None
    workers: int
    queue_size: int
    max_queue_size: int
    processing: int
    timeouts: int
    default_timeout: float
    requests_processed: int
