"""A core of a hundred lines for `gateway.api`: one model, everything in memory, no sockets and no processes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.config import GatewayConfig, load
from gateway.generation import (
    ChatFormat,
    ChatOptions,
    GenerateRequest,
    Listener,
    PreparedImage,
    RequestError,
    RunningStream,
    ServedModel,
)
from shared import protocol as wire
from shared.errors import ErrorCode
from tests.fake_worker import CARD, FIRST_BYTE_ID, ids_text, text_ids
from tests.two_sheets import image_input


class FakeTokens:
    """One token a byte, as the fake worker's."""

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id - FIRST_BYTE_ID]) if token_id >= FIRST_BYTE_ID else b""

    def is_shown(self, token_id: int) -> bool:
        return token_id >= FIRST_BYTE_ID


@dataclass(eq=False)
class FakeModel:
    """See `ServedModel`. `pauses` is awaited inside every encoding, so that a test can do things meanwhile."""

    card: wire.ModelCard = CARD
    chat_format: ChatFormat | None = None
    template_names: list[str] = field(default_factory=list)
    drops_first_space: bool = False
    start_ids: list[int] = field(default_factory=lambda: [0])
    tokens: FakeTokens = field(default_factory=FakeTokens)
    pause: asyncio.Event | None = None
    rendered: list[tuple[Sequence[Mapping[str, Any]], ChatOptions]] = field(default_factory=list)

    def room(self, num_prompt: int) -> int:
        return max(1, self.card.context_tokens - num_prompt)

    async def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        if self.pause is not None:
            await self.pause.wait()
        return text_ids(text)

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> list[int]:
        self.rendered.append((messages, options))
        return text_ids("|".join(f"{message['role']}:{message['content']}" for message in messages))

    def special_id(self, text: str) -> int | None:
        return None

    def mark_id(self, text: str) -> int | None:
        return None

    def decode(self, token_ids: list[int], *, keep_special: bool = False) -> str:
        return ids_text(token_ids)


class FakeCore:
    """See `Core`. Nothing is ever generated: what `api` prepares is what a test looks at."""

    def __init__(self, model: FakeModel | None = None, **settings: Any) -> None:
        self.config: GatewayConfig = load(settings)
        self.served = model or FakeModel()
        self.num_places = 8

    def model(self, model_id: str | None) -> FakeModel:
        if model_id not in (None, self.served.card.model_id):
            raise RequestError(ErrorCode.MODEL_NOT_FOUND, "no such model", param="model")
        return self.served

    def models(self) -> list[FakeModel]:
        return [self.served]

    def check_capacity(self, model: ServedModel, tenant: str = "", num_new: int = 1) -> None:
        if num_new > self.num_places:
            raise RequestError(ErrorCode.QUEUE_FULL, "full")

    async def check_grammar(self, grammar: wire.Grammar, *, param: str, tenant: str = "") -> wire.Grammar:
        return grammar

    async def prepare_image(
        self, model: ServedModel, data_url: str, *, param: str, num_frames: int = 0
    ) -> PreparedImage:
        return PreparedImage(image_input(1, 64, 56, data_url.encode()), [])

    def submit(self, request: GenerateRequest, listener: Listener) -> RunningStream:
        raise NotImplementedError
