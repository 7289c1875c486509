"""Owns the bounds of one worker, and which sequence can never fit within them. Pure; decode thread."""

from __future__ import annotations

from dataclasses import dataclass

from shared.errors import ErrorCode
from worker.schedule.refusal import Refusal
from worker.schedule.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one worker."""

    max_rows: int = 32
    max_waiting: int = 256
    step_tokens: int = 1024  # prefill and decode tokens of one step together
    mixed_tokens: int = 1024  # the same, while rows are decoding: bounds their inter-token gap
    step_crops: int = 26  # image crops encoded in one step; one picture is always allowed
    mixed_crops: int = 13  # the same, while rows are decoding
    max_sequence_tokens: int = 2048

    def check(self, seq: Sequence, kv_tokens: int) -> None:
        """Raise `Refusal` when the sequence can never fit into so much KV memory, or into a step."""
        most = min(self.max_sequence_tokens, kv_tokens)
        if seq.num_prompt + 1 > most:
            raise Refusal(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"the prompt has {seq.num_prompt} tokens; at most {most - 1} fit (context "
                f"{self.max_sequence_tokens}, KV memory {kv_tokens} tokens)",
                "prompt",
            )
        if seq.num_prompt + seq.max_tokens > most:
            raise Refusal(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"the prompt's {seq.num_prompt} tokens and max_tokens {seq.max_tokens} exceed {most}; "
                f"max_tokens up to {most - seq.num_prompt} fits",
                "max_tokens",
            )
        longest = max([end - first for first, end in seq.blocks], default=0)
        if longest > self.step_tokens:
            raise Refusal(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"a picture's {longest} positions that attend both ways exceed the step budget of {self.step_tokens}",
                "image",
            )
