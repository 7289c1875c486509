"""Owns what clients can name by id later: a bounded in-memory record of finished turns. Runs on the gateway's loop.

Nothing here is written to disk or shared between gateways: an id that is gone is answered with
`previous_response_not_found` (an item's with `not_found`) and the client resends its input, as the API's
contract allows.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from gateway.generation import End, PreparedImage
from shared.errors import FinishReason


@dataclass(frozen=True, slots=True)
class Turn:
    """A finished response and all that led to it: texts by role in order, and the last picture.

    `answer` is the response's own text, which is the last message too unless it is empty.
    """

    messages: tuple[tuple[str, str], ...]
    image: PreparedImage | None
    answer: str = ""

    @property
    def size_bytes(self) -> int:
        """Bytes held; a picture shared by several turns is counted for each, which errs on the safe side."""
        text = sum(len(role) + len(content) for role, content in self.messages)
        return text + (0 if self.image is None else len(self.image.global_crop) + len(self.image.canvas))


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

    def remember_answer(self, tenant: str, response_id: str, turn: Turn, end: End, text: str) -> None:
        """Keep a turn with its answer, unless it failed or was cancelled: such a turn cannot be continued."""
        if end.reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.DEADLINE):
            messages = (*turn.messages, ("assistant", text)) if text else turn.messages
            self.remember(tenant, response_id, Turn(messages, turn.image, text))

    def recall(self, tenant: str, response_id: str) -> Turn | None:
        """The tenant's turn of this id, if it is still held."""
        turn = self._turns.get((tenant, response_id))
        if turn is not None:
            self._turns.move_to_end((tenant, response_id))
        return turn
