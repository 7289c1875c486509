"""Owns the fields that OpenAI's generation endpoints share: their bounds, checks and meaning.

Which fields are known at all, and what becomes of the others, is the rule in `gateway.api.fields`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from gateway.api.fields import Known, check_refused
from gateway.generation import RequestError
from shared.errors import ErrorCode
from shared.protocol import ModelCard, Sampling

MAX_STOPS: Final = 16
MAX_STOP_CHARS: Final = 512
MAX_BIASES: Final = 1024
MAX_TOP_LOGPROBS: Final = 20
TOKENS_PER_OBJECT: Final = {"detect": 3, "point": 2}
DEFAULT_MAX_OBJECTS: Final = 50
MAX_OBJECTS: Final = 150
_INT64: Final = 1 << 63

Json = dict[str, Any]
T = TypeVar("T")
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Verbosity = Literal["low", "medium", "high"]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Unit = Annotated[float, Meta(ge=0.0, le=1.0)]
Budget = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Count = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]

_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_UNKNOWN = re.compile(r"unknown field `(?P<name>[^`]*)`")


class StreamOptions(Known, kw_only=True):
    """`stream_options`."""

    IGNORED = ("include_obfuscation",)  # padding, which this server never sends

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(Known, kw_only=True):
    """`response_format.json_schema`."""

    IGNORED = ("name", "description")

    schema: Json | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Known, kw_only=True):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema: Json | None = None  # of a json_object, as some servers take it
    strict: bool | None = None


class StructuredOutputs(Known, kw_only=True):
    """`structured_outputs`, vLLM's name for constraints beyond JSON. One of the first five."""

    IGNORED = ("disable_fallback", "disable_any_whitespace")

    json: Json | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    disable_fallback: bool | None = None
    disable_any_whitespace: bool | None = None


class SamplingFields(Known, kw_only=True):
    """What `/v1/chat/completions` and `/v1/completions` have in common."""

    IGNORED: ClassVar[tuple[str, ...]] = (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
    )

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    n: Count | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Meta(ge=-_INT64, le=_INT64 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=(1 << 31) - 1)] | None = None
    min_p: Unit | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10.0)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100.0, le=100.0)]] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Meta(ge=-1000, le=1000)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Json | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    user: str | None = None
    metadata: Any = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None


def decode_body(decode: Callable[[bytes], T], data: bytes) -> T:
    """Parse JSON to a struct, by the rule in `fields`. Raises `RequestError` naming the field and what it may be."""
    try:
        body = decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        text = str(error)
        where = _PATH.search(text)
        param = where["path"] if where is not None else None
        if where is not None:
            text = text[: where.start()]
        unknown = _UNKNOWN.search(text)
        if unknown is not None:
            param = f"{param}.{unknown['name']}" if param else unknown["name"]
            text = "this parameter is not known here; leave it out"
        raise invalid(text[:500], param[:200] if param else None) from None
    except RecursionError:
        raise invalid("the JSON is nested too deeply", None) from None
    check_refused(body)
    return body


def invalid(text: str, param: str | None) -> RequestError:
    """An INVALID_REQUEST about one field."""
    message = f"{param}: {text[0].lower()}{text[1:]}" if param else text
    return RequestError(ErrorCode.INVALID_REQUEST, message, param=param)


def renamed(error: RequestError, param: str) -> RequestError:
    """The error under another name of its field: that of the interface which was asked."""
    if error.param and param != error.param:
        error.message = error.message.replace(error.param, param, 1)
        error.param = param
    return error


def stops(value: str | list[str] | None) -> list[str]:
    """The stop strings. Raises `RequestError`."""
    listed = [value] if isinstance(value, str) else list(value or ())
    if len(listed) > MAX_STOPS:
        raise invalid(f"at most {MAX_STOPS} stop strings are accepted", "stop")
    for stop in listed:
        if not stop:
            raise invalid("a stop string may not be empty", "stop")
        if len(stop) > MAX_STOP_CHARS:
            raise invalid(f"a stop string may have at most {MAX_STOP_CHARS} characters", "stop")
    return listed


def samplings(fields: SamplingFields, card: ModelCard, num_logprobs: int, count: int) -> list[Sampling]:
    """How each of `count` choices is sampled: alike, but for the seed. Raises `RequestError`."""
    temperature = card.default_temperature if fields.temperature is None else fields.temperature
    seed = int.from_bytes(os.urandom(8)) >> 1 if fields.seed is None else fields.seed % _INT64
    first = Sampling(
        temperature=temperature,
        top_k=card.default_top_k if fields.top_k is None else max(0, fields.top_k),
        top_p=card.default_top_p if fields.top_p is None else fields.top_p,
        min_p=card.default_min_p if fields.min_p is None else fields.min_p,
        seed=seed,
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        repetition_penalty=(
            card.default_repetition_penalty
            if fields.repetition_penalty is None
            else fields.repetition_penalty
        ),
        logit_bias=_biases(fields.logit_bias, card),
        suppress_ids=list(card.suppress_ids),
        num_logprobs=num_logprobs,
        min_tokens=fields.min_tokens or 0,
    )
    return [first, *(msgspec.structs.replace(first, seed=(seed + i) % _INT64) for i in range(1, count))]


def stop_ids(fields: SamplingFields, card: ModelCard) -> list[int]:
    """The ids that end an answer: none where the client asked to ignore them, as load generators do."""
    return [] if fields.ignore_eos else list(card.eos_ids)


def _biases(given: dict[str, float] | None, card: ModelCard) -> dict[int, float]:
    if not given:
        return {}
    if len(given) > MAX_BIASES:
        raise invalid(f"at most {MAX_BIASES} tokens may be biased", "logit_bias")
    biases: dict[int, float] = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < card.vocab_size):
            raise invalid(f"keys are token ids from 0 to {card.vocab_size - 1}", "logit_bias")
        biases[int(key)] = bias
    return biases


def choice_count(fields: SamplingFields, max_n: int) -> int:
    """How many choices are asked for. Raises `RequestError`."""
    count = 1 if fields.n is None else fields.n
    if count > max_n:
        raise invalid(f"at most {max_n} choices are made", "n")
    return count


def token_budget(
    asked: int | None, card: ModelCard, room: int, param: str, min_tokens: int | None = None
) -> int:
    """How many tokens may be generated: what was asked, else the model's default or what still fits.

    Raises `RequestError` for more than can ever fit, and for less than `min_tokens`.
    """
    if asked is None:
        asked = max(1, min(max(card.default_max_tokens, min_tokens or 0), room))
    if asked < (min_tokens or 0):
        raise invalid(f"may be at most {asked}, the number of tokens generated", "min_tokens")
    if asked > card.context_tokens:
        message = f"at most {room} tokens fit after this prompt"
        raise RequestError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, f"{param}: {message}", param=param)
    return asked
