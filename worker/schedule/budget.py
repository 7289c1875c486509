"""Owns how much of a step is left for prefill: tokens, crops and time. Pure; decode thread."""

from __future__ import annotations

from math import inf

from worker.schedule.limits import SchedulerLimits
from worker.schedule.pace import LEAST_TOKENS, ROW_TOKENS, Pace, load_of_step
from worker.schedule.plan import Chunk, crops_of
from worker.schedule.sequence import Sequence


class StepBudget:
    """What one step may still take beside its decode rows. `cut` takes from it."""

    __slots__ = ("_crops", "_is_first", "_left_s", "_pace", "_page_tokens", "_tokens")

    def __init__(self, limits: SchedulerLimits, pace: Pace, page_tokens: int, decode: list[Sequence]) -> None:
        self._pace = pace
        self._page_tokens = page_tokens
        self._tokens = (limits.mixed_tokens if decode else limits.step_tokens) - len(decode)
        self._crops = limits.mixed_crops if decode else limits.step_crops
        self._is_first = True
        self._left_s = pace.bound_s(decodes=bool(decode))
        if self._left_s < inf:
            self._left_s -= pace.costs.of(load_of_step([seq.num_computed for seq in decode], []))

    @property
    def has_room(self) -> bool:
        """Whether there is room for a useful chunk of a prompt that was not begun."""
        return self._tokens > 0 and (self._is_first or self._tokens_in_time(0) > 0)

    def cut(self, seq: Sequence) -> Chunk | None:
        """The next piece of a prefill, or None when nothing of it fits.

        Cut at page boundaries where it can be, since matrix products then round alike wherever the cut falls
        (I8). A block that attends both ways is never cut, nor a picture's crops: as the step's first chunk they may overdraw
        the budget, or a busy batch would starve them.
        """
        start = seq.num_computed
        left = seq.num_known - start
        num = self._tokens_in_time(start)
        if seq.is_scored and num > 1:
            num //= 2  # each of its positions goes through the head too
        if 0 < num < left <= num + ROW_TOKENS:  # a short rest would be slow for its length
            shorter = left - ROW_TOKENS - 1
            num = shorter if shorter > 2 * ROW_TOKENS else left
        num = min(left, self._tokens, num)
        if num < left:
            page_tokens = self._page_tokens
            aligned = (start + num) // page_tokens * page_tokens - start
            num = aligned if aligned > 0 or not self._is_first else num
        num = self._with_few_crops(seq, start, num)
        for first, end in seq.blocks:
            # The cut goes before the block or, where that is all there is, behind it.
            if first < start + num < end:
                num = first - start if first > start else end - start if self._is_first else 0
                break
        if num <= 0:
            return None
        num_scored = max(0, min(num, seq.num_prompt - 1 - start)) if seq.is_scored else 0
        chunk = Chunk(seq, start, num, start + num == seq.num_known, num_scored)
        num_crops = crops_of(chunk)
        took_s = self._pace.chunk_s(start, num, num_crops)
        if not self._is_first and (num_crops > self._crops or (num_crops and took_s > self._left_s)):
            return None
        self._crops -= num_crops
        self._left_s -= took_s
        self._tokens -= num
        self._is_first = False
        return chunk

    def _with_few_crops(self, seq: Sequence, start: int, num: int) -> int:
        """At most `num` tokens, ending before the unit of a picture whose crops would overdraw crops or time; the step's
        first unit always fits."""
        crops, end = 0, start + num
        for picture in seq.pictures:
            if picture.end <= start or picture.position >= end or picture.features is not None:
                continue
            for unit in picture.units(start, end, seq.cached_tokens):
                place = picture.place_of(unit)
                crops += picture.unit_crops
                if place > start and crops > picture.unit_crops and crops > self._crops_in_time():
                    return place - start
        return num

    def _crops_in_time(self) -> int:
        if self._left_s == inf:
            return self._crops
        return 0 if self._pace.is_guess else min(self._crops, int(self._left_s / self._pace.costs.crop_s))

    def _tokens_in_time(self, start: int) -> int:
        """Tokens of a prompt behind `start` that fit into the time: at least a few for the step's first prompt; for other
        prompts none, if only a few would fit. Until a step was measured nothing is known to fit into a bound: by a guess
        a device far slower than guessed would get a step that is announced as short, and be killed as hung."""
        num_tokens = self._pace.tokens_within(self._left_s, start)
        if self._pace.is_guess and self._left_s < inf:
            num_tokens = 0
        if num_tokens < LEAST_TOKENS:
            return LEAST_TOKENS if self._is_first else 0
        return num_tokens
