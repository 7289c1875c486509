"""Owns the models that workers announced: cards, tokenizers, templates, and what fits. Gateway's loop."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from gateway.config import GatewayConfig
from gateway.core.templates import ChatTemplate
from gateway.core.tokens import ModelTokens
from gateway.decisions.stream import StreamState
from gateway.generation import GenerateRequest, RequestError
from shared import protocol as wire
from shared.errors import ErrorCode

_INLINE_CHARS: Final = 4096  # longer texts are encoded on a thread


@dataclass(slots=True)
class ServedModel:
    """A model some worker announced."""

    card: wire.ModelCard
    limits: wire.Limits
    tokens: ModelTokens
    template: ChatTemplate | None

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return min(self.card.context_tokens, self.limits.max_sequence_tokens or self.card.context_tokens)

    def num_prompt(self, num_ids: int, num_images: int) -> int:
        """Tokens of a prompt, its pictures' included."""
        return num_ids + (self.card.image.num_tokens * num_images if self.card.image is not None else 0)

    def check(self, request: GenerateRequest) -> None:
        """Raises `RequestError` for a request this model can never hold, naming what would fit."""
        num_prompt = self.num_prompt(len(request.prompt_ids), len(request.images))
        if not request.prompt_ids:
            raise RequestError(
                ErrorCode.INVALID_REQUEST, "prompt: at least one token is needed", param="prompt"
            )
        if num_prompt + 1 > self.longest:
            message = (
                f"the prompt has {num_prompt} tokens, with the pictures'; at most {self.longest - 1} fit"
            )
            raise RequestError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, message, param="messages")
        if num_prompt + request.max_tokens > self.longest:
            message = (
                f"{num_prompt} prompt tokens and max_tokens {request.max_tokens} exceed the context of "
                f"{self.longest}; max_tokens may be at most {self.longest - num_prompt}"
            )
            raise RequestError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, message, param="max_tokens")
        if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= self.card.vocab_size:
            message = f"token ids are between 0 and {self.card.vocab_size - 1}"
            raise RequestError(ErrorCode.INVALID_REQUEST, message, param="prompt")

    def stream(self, request: GenerateRequest, started_s: float) -> StreamState:
        """A fresh output state for a request."""
        return StreamState(
            self.tokens.detokenizer(keep_special=request.echo_special),
            started_s=started_s,
            num_prompt=self.num_prompt(len(request.prompt_ids), len(request.images)),
            stops=request.stop,
            task=request.task,
            want_logprobs=request.sampling.num_logprobs >= 0,
            strip_start=request.strip_start,
        )

    async def encode(self, text: str, *, markup: bool = False) -> list[int]:
        """Token ids, off the loop when the text is long; `markup` is for rendered chat templates."""
        encode = self.tokens.encode_markup if markup else self.tokens.encode
        if len(text) <= _INLINE_CHARS:
            return encode(text)
        return await asyncio.to_thread(encode, text)


class Catalog:
    """Every model announced so far, by id."""

    def __init__(self, config: GatewayConfig) -> None:
        self._default = config.default_model
        self._aliases = config.model_aliases
        self._models: dict[str, ServedModel] = {}

    def models(self) -> list[ServedModel]:
        """All of them, oldest first."""
        return list(self._models.values())

    def announce(self, ready: wire.Ready, tokenizer_json: bytes, chat_template: bytes) -> ServedModel:
        """Take over what a worker says of its model; the newest announcement of a name counts.

        Raises `gateway.core.tokens.TokenizerError`, UnicodeDecodeError or `RequestError` for files of no use.
        """
        known = self._models.get(ready.model.model_id)
        if known is not None and known.tokens.matches(tokenizer_json):
            tokens = known.tokens
        else:
            tokens = ModelTokens(tokenizer_json)
        template = ChatTemplate(chat_template.decode(), tokens, ready.model) if chat_template else None
        if known is not None and (known.card, known.limits, known.tokens) == (
            ready.model,
            ready.limits,
            tokens,
        ):
            known.template = template
            return known
        model = self._models[ready.model.model_id] = ServedModel(ready.model, ready.limits, tokens, template)
        return model

    def find(self, model_id: str | None) -> ServedModel:
        """By id or alias; None is the default. Raises `RequestError` LOADING or MODEL_NOT_FOUND."""
        if model_id is None:
            model_id = self._default or next(iter(self._models), None)
        else:
            model_id = self._aliases.get(model_id, model_id)
        model = self._models.get(model_id) if model_id is not None else None
        if model is not None:
            return model
        if not self._models:
            raise RequestError(ErrorCode.LOADING, "the model is still loading")
        served = ", ".join(self._models)
        message = f"the model {str(model_id)[:100]!r} does not exist; served here: {served}"
        raise RequestError(ErrorCode.MODEL_NOT_FOUND, message, param="model")

    def template(self, model_id: str | None) -> ChatTemplate:
        """The model's chat template. Raises `RequestError` UNSUPPORTED where it has none."""
        model = self.find(model_id)
        if model.template is None:
            message = f"model {model.card.model_id} has no chat template"
            raise RequestError(ErrorCode.UNSUPPORTED, message, param="messages")
        return model.template
