"""Owns `/v1/completions`: plain continuation of text or token ids. No sockets; runs on the gateway's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from gateway.api.answers import Collected, EventShape, Spelling, finish_reason, finite, usage_object
from gateway.api.chunks import ChunkFrame
from gateway.api.parameters import (
    MAX_TOP_LOGPROBS,
    Json,
    SamplingFields,
    choice_count,
    decode_body,
    invalid,
)
from gateway.api.prompts import Prompt
from gateway.api.requests import Length, check_fields, make_requests
from gateway.api.scored import NumScores, check_scores, echoed_logprobs, prompt_logprobs
from gateway.generation import (
    Core,
    Delta,
    End,
    GenerateRequest,
    PromptScore,
    RequestError,
    ServedModel,
    SpatialObject,
    TokenInfo,
)
from shared.errors import ErrorCode

_DEFAULT_MAX_TOKENS: Final = 16  # OpenAI's
_MAX_PROMPTS: Final = 64
_KIND: Final = "text_completion"

_TEXT, _ID = {"type": "string"}, {"type": "integer", "minimum": 0}
_PROMPT_FORMS: Final = [
    _TEXT,
    {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": _MAX_PROMPTS},
    {"type": "array", "items": _ID, "minItems": 1},
    {
        "type": "array",
        "items": {"type": "array", "items": _ID, "minItems": 1},
        "minItems": 1,
        "maxItems": _MAX_PROMPTS,
    },
]

_encode = msgspec.json.encode
TokenIds = Annotated[list[Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]], Meta(min_length=1)]


class CompletionBody(SamplingFields, kw_only=True):
    """The request's JSON. `prompt` is checked by hand: msgspec cannot tell its four forms apart."""

    REFUSED = ("suffix",)

    prompt: Annotated[Any, Meta(extra_json_schema={"anyOf": _PROMPT_FORMS})]
    echo: bool | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] | None = None  # 0: the prompt alone is scored
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    prompt_logprobs: NumScores | None = None
    suffix: str | None = None
    best_of: int | None = None


_decode = msgspec.json.Decoder(CompletionBody).decode


class Completion(EventShape):
    """One parsed and prepared request. Choice i continues prompt i // n."""

    def __init__(
        self,
        request_id: str,
        body: CompletionBody,
        requests: list[GenerateRequest],
        echoes: list[str],
        num_prompts: int,
    ) -> None:
        self.requests = requests
        self.stream = bool(body.stream)
        self._tokens = requests[0].model.tokens
        self._echoes = echoes
        self._num_choices = len(requests) // num_prompts
        self._num_top = body.logprobs
        self._num_prompt_top = body.prompt_logprobs
        self._scores_echo = bool(body.echo) and body.logprobs is not None
        self._is_silent = body.max_tokens == 0
        self._spellings = [Spelling(self._tokens, 0 if self._scores_echo else len(echo)) for echo in echoes]
        self._frame = ChunkFrame(f"cmpl-{request_id}", _KIND, requests[0].model_id, body)

    # ------------------------------------------------------------ the stream, see `transport.sse.Shape`

    def opening(self) -> bytes:
        """The prompts, where they are to be echoed; scored ones come with their scores."""
        if self._scores_echo:
            return b""
        return b"".join(
            self._chunk(index, echo, None, None) for index, echo in enumerate(self._echoes) if echo
        )

    def delta(self, index: int, delta: Delta) -> bytes:
        """One chunk; a scored prompt's is before it."""
        before = b""
        if self._scores_echo and delta.prompt is not None:
            before = self._said(index, self._echoes[index], self._echoed(index, delta.prompt), None)
        return before if self._is_silent else before + self._chunk(index, delta.text, delta.logprobs, None)

    def around(self, index: int) -> tuple[bytes, bytes] | None:
        """A chunk is its text and what never changes."""
        mark = "\ue000"
        before, behind = self._chunk(index, mark, None, None).split(_encode(mark))
        return before, behind

    def found(self, index: int, found: SpatialObject) -> bytes:
        """A completion finds no objects."""
        return b""

    def end(self, index: int, end: End) -> bytes:
        """The chunk with the finish reason."""
        return self._chunk(index, "", None, self._reason(end))

    def closing(self, ends: Sequence[End]) -> bytes:
        """Usage, if asked for, and the end mark."""
        return self._frame.closing(self._usage(ends))

    def _chunk(self, index: int, text: str, infos: list[TokenInfo] | None, reason: str | None) -> bytes:
        return self._said(
            index, text, self._logprobs(infos, self._spellings[index]) if infos else None, reason
        )

    def _said(self, index: int, text: str, logprobs: Json | None, reason: str | None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return self._frame.head + b',"choices":[' + _encode(choice) + self._frame.tail

    # ------------------------------------------------------------ the whole answer

    def answer(self, choices: Sequence[Collected]) -> Json:
        """The answer of a request that does not stream."""
        said = [self._choice(index, choice) for index, choice in enumerate(choices)]
        return self._frame.whole(
            _KIND, said, self._usage([choice.end for choice in choices if choice.end is not None])
        )

    def _choice(self, index: int, choice: Collected) -> Json:
        logprobs: Json | None = self._echoed(index, choice.prompt) if self._scores_echo else None
        if self._num_top is not None and not self._is_silent:
            answered = self._logprobs(choice.infos, self._spellings[index])
            logprobs = (
                answered if logprobs is None else {name: logprobs[name] + answered[name] for name in answered}
            )
        told: Json = {
            "index": index,
            "text": self._echoes[index] + ("" if self._is_silent else choice.text),
            "logprobs": logprobs,
            "finish_reason": self._reason(choice.end),
        }
        if self._num_prompt_top is not None:
            ids = self.requests[index].prompt_ids
            told["prompt_logprobs"] = prompt_logprobs(ids, choice.prompt, self._num_prompt_top, self._tokens)
        return told

    def _reason(self, end: End | None) -> str:
        """A worker makes one token at least; where none was asked for, it is nobody's."""
        return "length" if self._is_silent else finish_reason(end)

    def _echoed(self, index: int, scores: Sequence[PromptScore]) -> Json:
        ids, spelling = self.requests[index].prompt_ids, self._spellings[index]
        return echoed_logprobs(self._echoes[index], ids, scores, self._num_top or 0, spelling)

    def _usage(self, ends: Sequence[End]) -> Json:
        """OpenAI's `usage`; unlike chat's, it adds up several prompts."""
        usage = usage_object(ends)
        if self._is_silent:
            usage["completion_tokens"] = 0
        usage["prompt_tokens"] = sum(end.usage.prompt_tokens for end in ends[:: self._num_choices])
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        return usage

    def _logprobs(self, infos: Sequence[TokenInfo], spelling: Spelling) -> Json:
        """The older form: parallel lists. The tokens join to the text; the sampled one is among the most likely."""
        spelt = [spelling.step(info.token_id) for info in infos]
        top: list[dict[str, float]] = []
        for info, (text, _) in zip(infos, spelt, strict=True):
            names = {info.token_id: text}
            likely: dict[str, float] = {}
            for token_id, logprob in [*info.top, (info.token_id, info.logprob)]:
                name = names.get(token_id)
                likely.setdefault(
                    self._tokens.token_text(token_id) if name is None else name, finite(logprob)
                )
            top.append(likely)
        return {
            "tokens": [text for text, _ in spelt],
            "token_logprobs": [finite(info.logprob) for info in infos],
            "top_logprobs": top,
            "text_offset": [start for _, start in spelt],
        }


async def prepare(core: Core, data: bytes, *, request_id: str, tenant: str) -> Completion:
    """Check a body and prepare everything that can fail before submitting. Raises `RequestError`."""
    body = decode_body(_decode, data)
    num_scores = _num_scores(body)
    model = core.model(body.model)
    count = choice_count(body, core.config.max_n)
    if body.best_of not in (None, 1, count):
        message = f"best_of: at most n, {count}, is supported: every answer made is returned"
        raise RequestError(ErrorCode.UNSUPPORTED, message, param="best_of")
    prompts = await _read_prompts(core, model, body.prompt)
    checked = await check_fields(
        core,
        model,
        body,
        tenant=tenant,
        num_logprobs=-1 if body.logprobs is None else body.logprobs,
        num_prompt_logprobs=num_scores,
        count=count,
        num_prompts=len(prompts),
    )
    asked = [Prompt(ids) for _, ids in prompts]
    if num_scores >= 0:
        param = "prompt_logprobs" if body.prompt_logprobs is not None else "echo"
        check_scores(asked, num_scores, count, param)
    length = Length(1 if body.max_tokens == 0 else body.max_tokens, "max_tokens", default=_DEFAULT_MAX_TOKENS)
    requests = make_requests(checked, request_id, asked, length)
    echoes = []
    for text, ids in prompts:
        echo = (text if text is not None else model.decode(ids)) if body.echo else ""
        echoes += [echo] * count
    return Completion(request_id, body, requests, echoes, len(prompts))


def _num_scores(body: CompletionBody) -> int:
    """How many log-probabilities each prompt token gets besides its own; -1: none at all. Raises `RequestError`."""
    if body.prompt_logprobs is not None and body.stream:
        raise invalid("come with whole answers; leave stream out", "prompt_logprobs")
    wanted = [-1]
    if body.echo and body.logprobs is not None:
        wanted.append(body.logprobs)
    if body.prompt_logprobs is not None:
        wanted.append(body.prompt_logprobs)
    if body.max_tokens == 0 and len(wanted) == 1 and not body.echo:
        raise invalid("0 tokens go with echo or prompt_logprobs; at least 1", "max_tokens")
    return max(wanted)


async def _read_prompts(core: Core, model: ServedModel, given: Any) -> list[tuple[str | None, list[int]]]:
    """The prompts as (text where given as text, ids). Raises `RequestError`."""
    if isinstance(given, list) and given and all(type(item) is int for item in given):
        listed: list[Any] = [given]
    else:
        listed = given if isinstance(given, list) else [given]
    if not listed:
        raise invalid("at least one prompt is needed", "prompt")
    if len(listed) > _MAX_PROMPTS:
        raise invalid(f"at most {_MAX_PROMPTS} prompts are accepted", "prompt")
    card = model.card
    prompts: list[tuple[str | None, list[int]]] = []
    for place, item in enumerate(listed):
        if isinstance(item, str):
            if len(item) > core.config.max_prompt_chars:
                message = f"prompt: at most {core.config.max_prompt_chars} characters are accepted"
                raise RequestError(ErrorCode.PAYLOAD_TOO_LARGE, message, param="prompt")
            prompts.append((item, model.start_ids + await model.encode(item, parse_special=True)))
            # Many short prompts take as long as one long one: let the loop serve streams between them.
            await asyncio.sleep(0)
            continue
        try:
            ids = msgspec.convert(item, TokenIds)
        except msgspec.ValidationError:
            message = "expected text, a list of texts, token ids, or a list of lists of token ids"
            raise invalid(message, f"prompt[{place}]" if listed is given else "prompt") from None
        if max(ids) >= card.vocab_size:
            raise invalid(f"token ids are between 0 and {card.vocab_size - 1}", "prompt")
        prompts.append((None, ids))
    return prompts
