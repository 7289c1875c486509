"""Owns what a step costs on this device, learned from steps, and how much work fits into a time. Pure; decode thread.

A step's time is taken as a sum: one pass over the weights, and so much for each decode row, token of prefill, key that
either attends to, and crop of a picture. What a step really took is shared out among these in proportion.
"""

from __future__ import annotations

import math
from typing import NamedTuple

LEAST_TOKENS = 32
"""Tokens of a prompt that a step takes although none fit into its time, so that prefill goes on on any device."""

ROW_TOKENS = 16
"""Chunks of so many tokens or fewer cost what rows cost: compiled attention takes them one token at a time."""

GAIN = 0.5
SHORT_S = 0.05  # steps shorter than this are not learned from where steps have no bound
MOST_CHANGE = 4.0  # the factor by which one step may change an estimate, because a machine may stall once


class StepLoad(NamedTuple):
    """The work of a step. Numbers of keys are sums over the rows, or tokens, that attend to them."""

    num_rows: int = 0  # decode rows, and the tokens of short chunks
    num_row_keys: int = 0
    num_tokens: int = 0  # of other chunks
    num_keys: int = 0
    num_crops: int = 0


NO_LOAD = StepLoad()


class StepCosts(NamedTuple):
    """Seconds for each part of a step."""

    step_s: float
    row_s: float
    row_key_s: float
    token_s: float
    key_s: float
    crop_s: float

    def of(self, load: StepLoad) -> float:
        """Seconds that a step with this load takes."""
        return (
            self.step_s
            + load.num_rows * self.row_s
            + load.num_row_keys * self.row_key_s
            + load.num_tokens * self.token_s
            + load.num_keys * self.key_s
            + load.num_crops * self.crop_s
        )


def guessed_costs(num_weights: int, operations_per_s: float) -> StepCosts:
    """A first guess for a model of so many weights; cautious where `operations_per_s` is low. The first step that is
    measured scales all of it."""
    token_s = 2 * max(1, num_weights) / operations_per_s
    return StepCosts(8 * token_s, token_s, token_s / 1000, token_s, token_s / 4000, 400 * token_s)


class Pace:
    """Learns costs, and bounds steps by time.

    `step_s` bounds a step while nobody decodes, `gap_s` one that decode rows share, their own time included: the gap
    between their tokens. 0 is no bound.
    """

    __slots__ = ("costs", "gap_s", "is_guess", "step_s")

    def __init__(self, guess: StepCosts, *, step_s: float = 0.0, gap_s: float = 0.0) -> None:
        self.step_s = step_s
        self.gap_s = gap_s
        self.costs = guess  # as they are known now
        self.is_guess = True  # no step has been measured yet: the costs may be off by any factor

    def bound_s(self, *, decodes: bool) -> float:
        """Seconds that a step may take; infinite where there is no bound."""
        return (self.gap_s if decodes else self.step_s) or math.inf

    def row_fits(self, contexts: list[int], context: int) -> bool:
        """Whether one more row, behind `context` tokens, may join rows behind `contexts` tokens: their steps, with the
        least piece of a prompt that steps take, must stay within `gap_s`.

        The bound has a floor, twice what such a step takes with one row: below it fewer rows would cost more tokens a
        second than they save time.
        """
        if not self.gap_s:
            return True
        least = [load_of_chunk(0, LEAST_TOKENS, 0)]
        alone_s = self.costs.of(load_of_step([context], least))
        return self.costs.of(load_of_step([*contexts, context], least)) <= max(self.gap_s, 2 * alone_s)

    def chunk_s(self, start: int, num_tokens: int, num_crops: int) -> float:
        """Seconds that a chunk adds to its step: `num_tokens` of a prompt behind `start`, and crops."""
        return self.costs.of(load_of_chunk(start, num_tokens, num_crops)) - self.costs.step_s

    def tokens_within(self, seconds: float, start: int) -> int:
        """How many tokens of a prompt behind `start` fit into so much time; never negative."""
        if seconds <= 0:
            return 0
        if math.isinf(seconds):
            return 1 << 30
        token_s, key_s = self.costs.token_s, self.costs.key_s
        # n · token_s + (n · start + n² / 2) · key_s = seconds, for n.
        linear = token_s + start * key_s
        return int(2 * seconds / (linear + math.sqrt(linear * linear + 2 * key_s * seconds)))

    def on_step(self, load: StepLoad, busy_s: float) -> None:
        """A step with this load kept the device busy for so long."""
        if busy_s <= (0.0 if self.step_s or self.gap_s else SHORT_S):
            return
        expected_s = self.costs.of(load)
        costs = self.costs
        if (
            self.is_guess
        ):  # the first measured step scales the whole guess, because its error is the device's speed
            self.is_guess = False
            factor = busy_s / expected_s
            self.costs = StepCosts(*[cost * factor for cost in costs])
            return
        change = math.log(min(MOST_CHANGE, max(1 / MOST_CHANGE, busy_s / expected_s)))
        amounts = (1, *load)
        self.costs = StepCosts(
            *[
                cost * math.exp(GAIN * change * cost * amount / expected_s)
                for cost, amount in zip(costs, amounts, strict=True)
            ]
        )


def chunk_keys(start: int, num_tokens: int) -> int:
    """Keys that the tokens of a chunk behind `start` attend to, summed over them."""
    return num_tokens * start + num_tokens * (num_tokens + 1) // 2


def load_of_chunk(start: int, num_tokens: int, num_crops: int) -> StepLoad:
    """A chunk of `num_tokens` behind `start`, by itself."""
    num_keys = chunk_keys(start, num_tokens)
    if num_tokens <= ROW_TOKENS:
        return StepLoad(num_tokens, num_keys, 0, 0, num_crops)
    return StepLoad(0, 0, num_tokens, num_keys, num_crops)


def load_of_step(contexts: list[int], chunks: list[StepLoad]) -> StepLoad:
    """Decode rows behind so many tokens each, and chunks."""
    num_rows, num_row_keys = len(contexts), sum(contexts) + len(contexts)
    if not chunks:
        return StepLoad(num_rows, num_row_keys)
    num_tokens = num_keys = num_crops = 0
    for chunk in chunks:
        num_rows += chunk.num_rows
        num_row_keys += chunk.num_row_keys
        num_tokens += chunk.num_tokens
        num_keys += chunk.num_keys
        num_crops += chunk.num_crops
    return StepLoad(num_rows, num_row_keys, num_tokens, num_keys, num_crops)
