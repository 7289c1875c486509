"""Owns log-probabilities of prompts' own tokens: computed behind a chunk's forward, some positions at a time. Decode thread.

Only requests that ask for them pay: each position of their chunks goes through the head, whose logits are dropped as soon
as a slice of them is read. Nothing here reads the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from worker.models.contract import Model
from worker.schedule.plan import Chunk, PromptScores, StepPlan
from worker.step.slot import SCORE_FIELDS, Slot

SLICE_BYTES = 32 << 20
"""Logits that are alive at once: 55 positions of a vocabulary of 152,000."""


def score_chunks(
    model: Model, slot: Slot, plan: StepPlan, hidden: Tensor, progress: Callable[[], None]
) -> None:
    """Write the scores of a step's chunks to the slot, those of all chunks in a row.

    hidden (N, D): the chunks' hidden states, in order. Each position scores the token behind it.
    """
    targets = _targets(slot, plan)
    step = max(1, SLICE_BYTES // (4 * model.card.vocab_size))
    at, done = 0, 0
    for chunk in plan.chunks:
        for start in range(0, chunk.num_scored, step):
            num = min(step, chunk.num_scored - start)
            logits = model.logits(hidden[at + start : at + start + num])
            out = slot.scores[done : done + num]
            _score(logits, targets[done : done + num], chunk.seq.sampling.num_prompt_logprobs, out)
            done += num
            progress()
        at += chunk.num_tokens


def _targets(slot: Slot, plan: StepPlan) -> Tensor:
    """The token behind each scored position, (num_scored,) int64 on the device."""
    done = 0
    for chunk in plan.chunks:
        first = chunk.start + 1
        slot.host_targets_np[done : done + chunk.num_scored] = chunk.seq.tokens[
            first : first + chunk.num_scored
        ]
        done += chunk.num_scored
    if slot.on_host:
        return slot.host_targets[:done]
    slot.targets[:done].copy_(slot.host_targets[:done], non_blocking=True)
    return slot.targets[:done]


def _score(logits: Tensor, targets: Tensor, num_top: int, out: Tensor) -> None:
    """logits (R, V) fp32 and targets (R,) to a row each of `out`, (R, SCORE_FIELDS) int32."""
    own = logits.gather(1, targets.unsqueeze(1))
    total = logits.logsumexp(dim=-1, keepdim=True)
    out[:, 0] = (own - total).squeeze(1).view(torch.int32)
    out[:, 1] = (logits > own).sum(dim=-1) + 1
    if num_top:
        values, ids = logits.topk(min(num_top, logits.shape[-1]), dim=-1)
        half, num = (SCORE_FIELDS - 2) // 2, ids.shape[1]
        out[:, 2 : 2 + num] = ids
        out[:, 2 + half : 2 + half + num] = (values - total).view(torch.int32)


def read_scores(slot: Slot, plan: StepPlan) -> Iterator[PromptScores]:
    """What a step scored, chunk by chunk; its copy must have been waited for."""
    done, half = 0, (SCORE_FIELDS - 2) // 2
    for chunk in plan.chunks:
        if chunk.num_scored:
            rows = slot.host_scores_np[done : done + chunk.num_scored]
            done += chunk.num_scored
            num = _num_top(chunk, slot)
            yield PromptScores(
                rows[:, 0].tobytes(),
                rows[:, 1].tobytes(),
                rows[:, 2 : 2 + num].tobytes(),
                rows[:, 2 + half : 2 + half + num].tobytes(),
            )


def _num_top(chunk: Chunk, slot: Slot) -> int:
    return min(chunk.seq.sampling.num_prompt_logprobs, slot.shape.vocab_size)
