"""Owns the models that workers announced: cards, tokenizers, templates, and what fits. Gateway's loop."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from gateway.config import GatewayConfig
from gateway.core.templates import DEFAULT, VIDEO_MARK, WITH_TOOLS, ChatTemplate, choose_template
from gateway.core.tokens import ModelTokens
from gateway.decisions.grounded import GroundedThought, ThoughtMarks
from gateway.decisions.outlines import Outline, OutlineMarks
from gateway.decisions.stream import StreamState
from gateway.generation import ChatFormat, ChatOptions, GenerateRequest, RequestError, ServedModel, Shown
from shared import protocol as wire
from shared.errors import ErrorCode

_INLINE_CHARS: Final = 4096  # longer texts are encoded on a thread


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class AnnouncedModel:
    """A model as one worker announced it; see `gateway.generation.ServedModel`. Another announcement is another object."""

    card: wire.ModelCard
    limits: wire.Limits
    tokens: ModelTokens
    templates: Mapping[str, ChatTemplate]  # by name, `default` among them; empty: there is none
    chat_format: ChatFormat | None = field(init=False)  # see `ServedModel.chat_format`

    def __post_init__(self) -> None:
        object.__setattr__(self, "chat_format", _format_of(self.templates))

    @property
    def template_names(self) -> list[str]:
        """See `ServedModel.template_names`."""
        return list(self.templates)

    @property
    def drops_first_space(self) -> bool:
        """See `ServedModel.drops_first_space`."""
        return self.tokens.drops_first_space

    @property
    def start_ids(self) -> list[int]:
        """See `ServedModel.start_ids`."""
        if self.card.templates and self.card.bos_id is not None:  # Moondream's prompts all begin with BOS
            return [self.card.bos_id]
        return self.tokens.start_ids

    @property
    def longest(self) -> int:
        """Most tokens of prompt and answer together."""
        return min(self.card.context_tokens, self.limits.max_sequence_tokens or self.card.context_tokens)

    def room(self, num_prompt: int) -> int:
        """See `ServedModel.room`."""
        return max(1, self.longest - num_prompt)

    async def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """See `ServedModel.encode`."""
        return await self._off_loop(self.tokens.encode_parsed if parse_special else self.tokens.encode, text)

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> list[int]:
        """See `ServedModel.encode_chat`."""
        template = choose_template(self.templates, self.card.model_id, options)
        text = await template.render_async(messages, options)
        if options.pictures:
            text = self._with_pictures(text, options.pictures)
        return await self._off_loop(self.tokens.encode_rendered, text)

    def _with_pictures(self, text: str, pictures: Sequence[Shown]) -> str:
        """A rendered text with what stands for each picture and video in place of its placeholder, as transformers' processors
        do before they tokenise. Users' words that look like a placeholder are not there yet. Raises `RequestError`."""
        spec = self.card.image
        assert spec is not None
        marks = [spec.layout.placeholder]
        if spec.clip is not None:
            marks.append(spec.clip.layout.placeholder or VIDEO_MARK)
        pieces = re.split(f"({'|'.join(map(re.escape, marks))})", text)
        wanted = [shown.placeholder or VIDEO_MARK for shown in pictures]
        if pieces[1::2] != wanted:
            what = "pictures" if spec.layout.placeholder in wanted else "videos"
            message = f"the model's chat template shows {len(pieces) // 2} of {len(pictures)} {what}"
            if len(pieces) // 2 == len(pictures):
                message = "the model's chat template does not show pictures and videos in their order"
            message += "; put them into messages of the user"
            raise RequestError(ErrorCode.INVALID_REQUEST, message, param="messages")
        return pieces[0] + "".join(
            shown.text + rest for shown, rest in zip(pictures, pieces[2::2], strict=True)
        )

    async def _off_loop(self, encode: Callable[[str], list[int]], text: str) -> list[int]:
        return encode(text) if len(text) <= _INLINE_CHARS else await asyncio.to_thread(encode, text)

    def decode(self, token_ids: list[int], *, keep_special: bool = False) -> str:
        """See `ServedModel.decode`."""
        return self.tokens.decode(token_ids, keep_special=keep_special)

    def special_id(self, text: str) -> int | None:
        """See `ServedModel.special_id`."""
        return self.tokens.special_id(text)

    def mark_id(self, text: str) -> int | None:
        """See `ServedModel.mark_id`."""
        return self.tokens.mark_id(text)

    def check(self, request: GenerateRequest) -> None:
        """Raises `RequestError` for a request this model can never hold, naming what would fit."""
        num_prompt = request.num_prompt
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
            self.tokens.detokenizer(shown=request.shown_ids),
            started_s=started_s,
            num_prompt=request.num_prompt,
            stops=request.stop,
            task="text" if request.task == "reason" else request.task,
            thought=self._thought() if request.task == "reason" else None,
            outline=self._outline() if request.task == "segment" else None,
            want_logprobs=request.sampling.num_logprobs >= 0,
            strip_start=request.strip_start,
            drop_space=request.drop_space,
        )

    def _thought(self) -> GroundedThought:
        card = self.card
        marks = ThoughtMarks(
            coordinate=card.coord_id,
            closing=card.templates["reasoning_close"][0],
            num_opening=len(card.templates.get("reasoning_end", ())),
            cuts=card.templates.get("reasoning_cuts", ()),
        )
        return GroundedThought(self.tokens.detokenizer(), marks)

    def _outline(self) -> Outline:
        tokens, card = self.tokens, self.card

        def text(token_id: int) -> str:
            return tokens.token_text(token_id) if tokens.is_shown(token_id) else ""

        return Outline(OutlineMarks(card.coord_id, card.size_id, text))

    def reads_alike(self, other: ServedModel) -> bool:
        """Whether a request prepared for `other` means the same to this model."""
        return self is other or (
            isinstance(other, AnnouncedModel)
            and (self.card, self.tokens.digest) == (other.card, other.tokens.digest)
        )


def _format_of(templates: Mapping[str, ChatTemplate]) -> ChatFormat | None:
    usual = templates.get(DEFAULT)
    if usual is None:
        return None
    for_tools = templates.get(WITH_TOOLS, usual).format
    return replace(usual.format, shows_tools=for_tools.shows_tools, dialect=for_tools.dialect)


class Catalog:
    """Every model announced so far, by id."""

    def __init__(self, config: GatewayConfig) -> None:
        self._default = config.default_model
        self._aliases = config.model_aliases
        self._models: dict[str, AnnouncedModel] = {}

    def models(self) -> list[AnnouncedModel]:
        """All announced models, oldest first."""
        return list(self._models.values())

    def announce(self, ready: wire.Ready, tokenizer_json: bytes, chat_template: bytes) -> AnnouncedModel:
        """Store what a worker announced of its model; the newest announcement of a name replaces the older.

        Raises `gateway.core.tokens.TokenizerError`, UnicodeDecodeError or `RequestError` for files of no use.
        """
        known = self._models.get(ready.model.model_id)
        if known is not None and known.tokens.matches(tokenizer_json):
            tokens = known.tokens
            source = known.templates[DEFAULT].source.encode() if known.templates else b""
            if (known.card, known.limits, source) == (ready.model, ready.limits, chat_template):
                return known
        else:
            tokens = ModelTokens(tokenizer_json)
        sources = {DEFAULT: chat_template.decode()} | ready.model.chat_templates if chat_template else {}
        templates = {name: ChatTemplate(source, tokens, ready.model) for name, source in sources.items()}
        model = AnnouncedModel(ready.model, ready.limits, tokens, templates)
        self._models[ready.model.model_id] = model
        return model

    def find(self, model_id: str | None) -> AnnouncedModel:
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

    def current(self, model: ServedModel) -> AnnouncedModel:
        """The newest announcement of a model that a request was prepared for.

        Raises `RequestError` LOADING if the newest one reads the request's token ids in another way.
        """
        newest = self._models.get(model.card.model_id)
        if newest is None or not newest.reads_alike(model):
            message = f"another model took the name {model.card.model_id} meanwhile; send the request again"
            raise RequestError(ErrorCode.LOADING, message)
        return newest
