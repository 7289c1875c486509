"""Owns the seam between interfaces (api, transport) and the streaming core: what is asked, of which model, of whom.

Data and protocols; everything here runs on the gateway's loop. What comes back is in `gateway.stream_events`, and is had from
here as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from gateway.config import GatewayConfig
from gateway.stream_events import Carrier as Carrier
from gateway.stream_events import Delta as Delta
from gateway.stream_events import End as End
from gateway.stream_events import Framing as Framing
from gateway.stream_events import LendingListener as LendingListener
from gateway.stream_events import Listener as Listener
from gateway.stream_events import PromptScore as PromptScore
from gateway.stream_events import RequestError as RequestError
from gateway.stream_events import RunningStream as RunningStream
from gateway.stream_events import SpatialObject as SpatialObject
from gateway.stream_events import TextForm as TextForm
from gateway.stream_events import TextListener as TextListener
from gateway.stream_events import ThoughtPart as ThoughtPart
from gateway.stream_events import TokenInfo as TokenInfo
from gateway.stream_events import Usage as Usage
from shared.errors import ErrorCode
from shared.protocol import Grammar, ImageInput, ModelCard, PromptValue, Sampling, ThinkingBudget


def no_pictures(card: ModelCard, param: str) -> RequestError:
    """The refusal of a picture, in the field `param`, by a model that has no eyes."""
    message = (
        f"model {card.model_id} takes no pictures, it reads text only; leave the picture out, or name a model whose "
        "takes_images is true in /v1/models"
    )
    return RequestError(ErrorCode.UNSUPPORTED, message, param=param)


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """A decoded, resized picture: the wire's description of it and the uint8 payload of each sheet.

    Where its chat template has a place for it, `spec.runs` are unset until it is put there.
    """

    spec: ImageInput
    frames: Sequence[bytes]

    @property
    def num_tokens(self) -> int:
        """Positions that it takes in a prompt, besides the text around them."""
        return sum(num for _, num in self.spec.runs)

    @property
    def num_bytes(self) -> int:
        """Bytes of its payloads."""
        return sum(map(len, self.frames))


class Shown(NamedTuple):
    """What a prompt's text has of a picture or a video, in place of what the chat template writes for it."""

    placeholder: str  # empty: the template writes none, see `gateway.core.templates`
    text: str


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a conversation is rendered. `variables` reach the template under their names, after its own."""

    add_generation_prompt: bool = True  # end with the mark that opens the assistant's turn
    continue_final_message: bool = False  # end within the last message, for the model to go on with it
    variables: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None  # by its name; none: the model's usual one, with tools the one for tools
    tools: Sequence[Mapping[str, Any]] = ()  # as the interfaces describe them, for the template's `tools`
    pictures: Sequence[Shown] = ()  # and videos, in order


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """What a chat template tells of its model's habits."""

    shows_tools: bool  # it writes the tools into the prompt itself, in the way the model was trained on
    dialect: str  # how calls are written: a key of `gateway.decisions.answer_parts.DIALECTS`
    thinking: tuple[str, str] | None = None  # the marks around thinking
    can_skip_thinking: bool = False  # it reads `enable_thinking`


class TokenTexts(Protocol):
    """The texts of single tokens, as log-probabilities show them."""

    def token_text(self, token_id: int) -> str:
        """One token's own text, special or not; "" for an id outside the vocabulary."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, which need not be whole characters."""

    def is_shown(self, token_id: int) -> bool:
        """Whether a token's text is part of an answer; special tokens' text is not."""


class ServedModel(Protocol):
    """One announcement of a model: it never changes. A request is prepared and submitted with the same one."""

    @property
    def card(self) -> ModelCard:
        """The model card that its worker announced."""

    @property
    def tokens(self) -> TokenTexts:
        """Its tokenizer, token by token."""

    @property
    def template_names(self) -> list[str]:
        """The names of its chat templates, `default` among them; empty where it has none."""

    @property
    def chat_format(self) -> ChatFormat | None:
        """The habits its template tells of; None without a template."""

    @property
    def drops_first_space(self) -> bool:
        """Whether its tokenizer's own decoder leaves out a text's first space, as SentencePiece does."""

    @property
    def start_ids(self) -> list[int]:
        """The token ids that a plain text begins with: those of the tokenizer's post-processor, if any; Moondream's BOS."""

    def room(self, num_prompt: int) -> int:
        """How many tokens may be generated after so many; at least 1, so that `Core.submit` refuses the prompt."""

    async def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids, off the loop when the text is long. Special tokens' names in it are text unless parsed."""

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> list[int]:
        """Token ids of a rendered conversation: the template's special tokens count, the users' are text.

        Rendered off the loop and within a deadline. Raises `RequestError`: UNSUPPORTED without a template.
        """

    def decode(self, token_ids: list[int], *, keep_special: bool = False) -> str:
        """The text of all ids at once, special tokens left out unless kept."""

    def special_id(self, text: str) -> int | None:
        """The id of the special token with this name, if there is one."""

    def mark_id(self, text: str) -> int | None:
        """The id of the token that stands for this text wherever it occurs, special or not; None where there is none."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to generate, fully validated and tokenised. `n` > 1 is several of these."""

    request_id: str
    model: ServedModel
    prompt_ids: list[int]
    max_tokens: int
    sampling: Sampling
    images: list[PreparedImage] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)
    stop_ids: list[int] = field(default_factory=list)
    task: str = "text"  # text | detect | point | reason | segment
    max_objects: int = 0
    tenant: str = ""
    priority: int = 0
    deadline_s: float = 0.0
    grammar: Grammar | None = None
    shown_ids: Sequence[int] = ()  # special tokens whose text is part of the answer
    ignore_eos: bool = False  # run to max_tokens whatever the model says, as benchmarks do
    strip_start: bool = False  # drop white space before the first visible character
    drop_space: bool = False  # drop one space, if the answer begins with it
    thinking: ThinkingBudget | None = None
    values: Sequence[PromptValue] = ()  # what some of the prompt's ids stand for

    @property
    def model_id(self) -> str:
        """The model's name."""
        return self.model.card.model_id

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt, its pictures' included."""
        return len(self.prompt_ids) + sum(image.num_tokens for image in self.images)


class Core(Protocol):
    """The streaming core as `gateway.api` sees it (implemented by `gateway.core.service.Service`)."""

    @property
    def config(self) -> GatewayConfig:
        """The gateway's settings, for their bounds."""

    def model(self, model_id: str | None) -> ServedModel:
        """By id or alias; None is the default. Raises `RequestError` MODEL_NOT_FOUND or LOADING."""

    def models(self) -> Sequence[ServedModel]:
        """Every model served now."""

    def check_capacity(self, model: ServedModel, tenant: str = "", num_new: int = 1) -> None:
        """Raises the error that `submit` would for lack of a place: call it before expensive preparation."""

    async def check_grammar(self, grammar: Grammar, *, param: str, tenant: str = "") -> Grammar:
        """The grammar as a worker takes it. Raises `RequestError` INVALID_GRAMMAR or QUEUE_FULL."""

    async def prepare_image(
        self, model: ServedModel, data_url: str, *, param: str, num_frames: int = 0
    ) -> PreparedImage:
        """Decode and resize off the loop, in a limited process; `num_frames`: as a frame of a video of so many. Raises `RequestError`."""

    def submit(self, request: GenerateRequest, listener: Listener) -> RunningStream:
        """Admit and send to a worker. Raises `RequestError` (QUEUE_FULL, LOADING, CONTEXT_LENGTH_EXCEEDED, …)."""


class HttpCounts(Protocol):
    """The figures that transports count."""

    num_slow_clients: int

    def on_response(self, route: str, status: int) -> None:
        """An HTTP answer is out; `route` is the matched route's pattern, never the path."""


class ServingCore(Core, Protocol):
    """The core as `gateway.transport` sees it: also whether it serves at all."""

    @property
    def metrics(self) -> HttpCounts:
        """The counters that transports add to."""

    def check_any_capacity(self, tenant: str) -> None:
        """Raises an error if `submit` would refuse a request for any model just now: call it before reading a body."""

    def begin_request(self) -> None:
        """Count a request to generate by the caller's key (`gateway.caller`). Raises `RequestError` RATE_LIMITED."""

    def readiness(self) -> tuple[bool, str]:
        """Whether new work would be served, and why not."""
