"""Owns what clients can name by id later: a bounded in-memory record of finished turns. Runs on the gateway's loop.

Nothing here is written to disk or shared between gateways: an id that is gone is answered with
`previous_response_not_found` (an item's with `not_found`) and the client resends its input, as the API's
contract allows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from gateway.api.parameters import Json
from gateway.api.prompts import Message
from gateway.api.response_bodies import Item, Part
from gateway.api.response_input import num_chars, read_items
from gateway.generation import End
from shared.errors import FinishReason


@dataclass(frozen=True, slots=True)
class Turn:
    """A finished response and all that led to it: the conversation's messages, with their pictures.

    `answer` has the response's own items as a client would send them back. Their texts are those of the last messages.
    """

    messages: tuple[Message, ...]
    answer: tuple[Item, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes held; a picture that several turns share is counted for each, which errs on the safe side."""
        text = sum(len(m.role) + num_chars(m) + m.picture_chars() for m in self.messages)
        ids = sum(len(item.id or "") for item in self.answer)
        return text + ids


@dataclass(slots=True)
class _Held:
    """One tenant's turns by response id, the longest unused first."""

    turns: OrderedDict[str, Turn] = field(default_factory=OrderedDict)
    size_bytes: int = 0


class Conversations:
    """Finished turns by (tenant, response id). Once `max_turns` or `max_bytes` is passed, the tenant who holds most of it
    forgets its oldest first."""

    def __init__(self, max_turns: int = 512, max_bytes: int = 64 << 20) -> None:
        self._max_turns = max_turns
        self._max_bytes = max_bytes
        self._tenants: dict[str, _Held] = {}
        self._num_turns = 0
        self.size_bytes = 0

    def __len__(self) -> int:
        return self._num_turns

    def remember(self, tenant: str, response_id: str, turn: Turn) -> None:
        """Keep a finished turn, forgetting others as needed. A turn larger than the whole bound is not kept."""
        if turn.size_bytes > self._max_bytes:
            return
        held = self._tenants.setdefault(tenant, _Held())
        replaced = held.turns.pop(response_id, None)
        held.turns[response_id] = turn
        self._count(held, turn.size_bytes, 1)
        if replaced is not None:
            self._count(held, -replaced.size_bytes, -1)
        while self._num_turns > self._max_turns:
            self._forget_oldest(max(self._tenants, key=lambda name: len(self._tenants[name].turns)))
        while self.size_bytes > self._max_bytes:
            self._forget_oldest(max(self._tenants, key=lambda name: self._tenants[name].size_bytes))

    def _forget_oldest(self, tenant: str) -> None:
        held = self._tenants[tenant]
        _, forgotten = held.turns.popitem(last=False)
        self._count(held, -forgotten.size_bytes, -1)
        if not held.turns:
            del self._tenants[tenant]

    def _count(self, held: _Held, by_bytes: int, by_turns: int) -> None:
        held.size_bytes += by_bytes
        self.size_bytes += by_bytes
        self._num_turns += by_turns

    def remember_answer(
        self, tenant: str, response_id: str, turn: Turn, end: End, output: Sequence[Json]
    ) -> None:
        """Keep a turn with its answer, unless it failed or was cancelled: such a turn cannot be continued.

        `output` is the response's. A call that was cut off cannot be answered, so the conversation goes on without it.
        """
        if end.reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.DEADLINE):
            answer = msgspec.convert(output, tuple[Item, ...])
            for item in answer:
                for part in item.content or ():
                    if isinstance(part, Part):
                        part.logprobs = None  # large, and nobody reads them again
            said = [item for item in answer if item.type != "function_call" or item.status == "completed"]
            messages = [m for m in read_items(said).messages if num_chars(m)]
            self.remember(tenant, response_id, Turn((*turn.messages, *messages), answer))

    def recall(self, tenant: str, response_id: str) -> Turn | None:
        """The tenant's turn of this id, if it is still held."""
        held = self._tenants.get(tenant)
        if held is None or response_id not in held.turns:
            return None
        held.turns.move_to_end(response_id)
        return held.turns[response_id]
