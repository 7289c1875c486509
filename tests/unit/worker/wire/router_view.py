"""What a prefix-aware router knows of one worker, kept from published events alone: which blocks are cached, behind which."""

from __future__ import annotations

from typing import Any

from tests.unit.worker.wire.plain_msgpack import read


class RouterView:
    """Reads payloads as their format's description says, and nothing of Degas'."""

    def __init__(self) -> None:
        self.tokens: dict[int, tuple[int, ...]] = {}  # of each cached block
        self.parents: dict[int, int | None] = {}
        self.extra: dict[int, list[str] | None] = {}
        self.times: list[float] = []

    def on_payload(self, payload: bytes) -> None:
        """One message. Raises AssertionError for what a router could not use."""
        batch: Any = read(payload)
        time_s, events, rank = batch
        assert isinstance(time_s, float) and rank == 0
        self.times.append(time_s)
        for event in events:
            fields = event if isinstance(event, list) else _positional(event)
            self._on_event(fields[0], fields[1:])

    def prefix_of(self, token_ids: list[int], block_tokens: int) -> int:
        """How many leading tokens of a prompt are cached, found as a router does: block by block from the beginning."""
        parent: int | None = None
        for start in range(0, len(token_ids) - block_tokens + 1, block_tokens):
            wanted = tuple(token_ids[start : start + block_tokens])
            found = [h for h, t in self.tokens.items() if t == wanted and self.parents[h] == parent]
            if not found:
                return start
            parent = found[0]
        return len(token_ids) // block_tokens * block_tokens

    def _on_event(self, kind: str, fields: list[Any]) -> None:
        if kind == "AllBlocksCleared":
            assert not fields
            self.tokens.clear()
            self.parents.clear()
            return
        assert fields[0], "an event has blocks"
        assert all(isinstance(one, int) and 0 <= one < 1 << 64 for one in fields[0])
        if kind == "BlockRemoved":
            hashes, medium = fields
            assert medium == "GPU"
            for one in hashes:
                del self.tokens[one], self.parents[one]
            return
        assert kind == "BlockStored"
        hashes, parent, token_ids, size, lora_id, medium, lora_name = fields[:7]
        extra = fields[7] if len(fields) > 7 else [None] * len(hashes)
        assert (lora_id, medium, lora_name) == (None, "GPU", None)
        assert len(token_ids) == len(hashes) * size and len(extra) == len(hashes)
        assert all(isinstance(token, int) and token >= 0 for token in token_ids)
        assert parent is None or parent in self.tokens, (
            "a block's beginning is cached, or was told to be gone"
        )
        for place, one in enumerate(hashes):
            assert one not in self.tokens, "stored twice"
            self.tokens[one] = tuple(token_ids[place * size : (place + 1) * size])
            self.parents[one] = parent
            self.extra[one] = extra[place]
            parent = one


def _positional(event: dict[str, Any]) -> list[Any]:
    names = ["block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name"]
    if event["type"] == "BlockStored":
        rest = [event["extra_keys"]] if "extra_keys" in event else []
        return ["BlockStored", *(event[name] for name in names), *rest]
    if event["type"] == "BlockRemoved":
        return ["BlockRemoved", event["block_hashes"], event["medium"]]
    return [event["type"]]
