"""Owns the shapes of what OpenAI's interfaces answer, for the description at `/openapi.json`. Read, never built: no thread.

Answers are written as bytes where they are made; these say what is in them, and the tests hold one to the other.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from gateway.api import response_events as events
from gateway.api.parameters import Json


class Told(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Parent of every answer's shape: fields without a default are always there."""


class ErrorDetail(Told, kw_only=True):
    """What went wrong: `code` for programs, `message` for people, `param` the field at fault."""

    message: str
    type: str
    param: str | None
    code: str


class Error(Told, kw_only=True):
    """OpenAI's error shape."""

    error: ErrorDetail


class CachedTokens(Told, kw_only=True):
    """The part of the prompt that was computed before."""

    cached_tokens: int


class TokenUsage(Told, kw_only=True):
    """Tokens counted over all choices; a prompt that they share counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class LikelyToken(Told, kw_only=True):
    """One of the most likely tokens at a place."""

    token: str
    logprob: float
    bytes: list[int]


class ScoredToken(LikelyToken, kw_only=True):
    """A sampled token and its log-probability."""

    top_logprobs: list[LikelyToken]


class Logprobs(Told, kw_only=True):
    """Chat's log-probabilities: one entry a token."""

    content: list[ScoredToken]
    refusal: None


class PromptToken(Told, kw_only=True):
    """One token's log-probability in a prompt. `rank` 1 is the most likely token of its place."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptToken] | None]
"""One entry a token of the prompt, by token id; null for the first, and where there is nothing to score."""


class CalledFunction(Told, kw_only=True):
    """`function` of a call: arguments are JSON text."""

    name: str
    arguments: str


class CallSaid(Told, kw_only=True):
    """A tool call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(Told, kw_only=True):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CallSaid] | UnsetType = UNSET


Reason = Literal["stop", "length", "tool_calls", "deadline"]


class ChatChoice(Told, kw_only=True):
    """One answer of a chat."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: Reason


class ChatCompletion(Told, kw_only=True):
    """The whole answer of a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class FunctionDelta(Told, kw_only=True):
    """More of a call."""

    arguments: str
    name: str | UnsetType = UNSET


class CallDelta(Told, kw_only=True):
    """More of a call; its first delta names it."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class ChatDelta(Told, kw_only=True):
    """What a chunk adds."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CallDelta] | UnsetType = UNSET


class ChatChunkChoice(Told, kw_only=True):
    """One answer's part of a chunk."""

    index: int
    delta: ChatDelta
    logprobs: Logprobs | None
    finish_reason: Reason | None


class ChatChunk(Told, kw_only=True):
    """The data of one event of a streamed chat; `[DONE]` follows the last."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: TokenUsage | UnsetType | None = UNSET


class CompletionLogprobs(Told, kw_only=True):
    """The older form: parallel lists. Null for a prompt's first token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Told, kw_only=True):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "deadline"] | None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class TextCompletion(Told, kw_only=True):
    """The whole answer of a completion, or the data of one event of a streamed one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: TokenUsage | UnsetType | None = UNSET


class ModelDefaults(Told, kw_only=True):
    """What applies where a request says nothing."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int


class Model(Told, kw_only=True):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    family: str
    description: str
    context_tokens: int
    capabilities: list[str]
    takes_images: bool
    max_images: int
    max_frames: int
    thinking: Literal["none", "optional", "always"]
    chat_templates: list[str]
    defaults: ModelDefaults


class Models(Told, kw_only=True):
    """What is served."""

    object: Literal["list"]
    data: list[Model]


class InputDetails(Told, kw_only=True):
    """Of `input_tokens`."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(Told, kw_only=True):
    """Of `output_tokens`."""

    reasoning_tokens: int


class ResponseUsage(Told, kw_only=True):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseError(Told, kw_only=True):
    """Why a response failed: `code` is the interface's, `type` Degas's own."""

    code: str
    message: str
    type: str
    param: str | None


class ResponseTimings(Told, kw_only=True):
    """Degas's own figures, in seconds."""

    task: Literal["text", "detect", "point"]
    finish_reason: str
    time_to_first_token_s: float
    total_s: float
    queue_s: float
    prefill_s: float
    decode_s: float
    tokens_per_second: float | None
    retry_after_s: float | UnsetType = UNSET


class Response(Told, kw_only=True):
    """A response: what was asked, and the output as items (`message`, `reasoning`, `function_call`)."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    error: ResponseError | None
    incomplete_details: Json | None
    model: str
    output: list[Json]
    usage: ResponseUsage | None
    background: bool
    instructions: str | None
    max_output_tokens: int
    max_tool_calls: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: Json
    safety_identifier: str | None
    service_tier: str
    store: bool
    temperature: float
    text: Json
    tool_choice: Any
    tools: list[Json]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    user: str | None
    completed_at: int | UnsetType = UNSET
    degas: ResponseTimings | UnsetType = UNSET


ResponseEvent = (
    events.Created
    | events.InProgress
    | events.ItemAdded
    | events.PartAdded
    | events.TextDelta
    | events.TextDone
    | events.ThoughtDelta
    | events.ThoughtDone
    | events.ArgumentsDelta
    | events.ArgumentsDone
    | events.PartDone
    | events.ItemDone
    | events.ObjectFound
    | events.Completed
    | events.Incomplete
    | events.Failed
)
"""The events of a response, as server-sent events or as a WebSocket's messages."""
