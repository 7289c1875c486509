"""Owns what clients can name by id later: a bounded in-memory record of finished turns. Runs on the gateway's loop.

Nothing here is written to disk or shared between gateways: an id that is gone is answered with
`previous_response_not_found` (an item's with `not_found`) and the client resends its input, as the API's
contract allows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

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


class Conversations:
    """Finished turns by (tenant, response id), oldest forgotten first once `max_turns` or `max_bytes` is passed."""

    def __init__(self, max_turns: int = 512, max_bytes: int = 64 << 20) -> None:
        self._max_turns = max_turns
        self._max_bytes = max_bytes
        self._turns: OrderedDict[tuple[str, str], Turn] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._turns)

    def remember(self, tenant: str, response_id: str, turn: Turn) -> None:
        """Keep a finished turn, forgetting the oldest as needed. A turn larger than the whole bound is not kept."""
        if turn.size_bytes > self._max_bytes:
            return
        replaced = self._turns.pop((tenant, response_id), None)
        self._turns[tenant, response_id] = turn
        self.size_bytes += turn.size_bytes - (replaced.size_bytes if replaced else 0)
        while len(self._turns) > self._max_turns or self.size_bytes > self._max_bytes:
            _, forgotten = self._turns.popitem(last=False)
            self.size_bytes -= forgotten.size_bytes

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
        turn = self._turns.get((tenant, response_id))
        if turn is not None:
            self._turns.move_to_end((tenant, response_id))
        return turn
