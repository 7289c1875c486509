"""Owns what is asked in a row of training: many questions and conversations about one picture, or about two. Drawing process.

Conversations have the shape they are served in (`gateway.api.query_turns`): BOS once, then for every turn its pictures, the
query's prefix, the text, the answer marks and the answer.
"""

import numpy as np
from numpy.random import Generator
from tokenizers import Tokenizer

from pocket.follow_ups import FollowUps, after_system
from pocket.network import NetworkConfig
from pocket.pairs import PAIR_KINDS, PairAsk, PairQuestioner
from pocket.phrases import Ask
from pocket.questions import KINDS, NO_PICTURE_ANSWER, QUERY_KINDS, Questioner
from pocket.scenes import Scene
from pocket.segments import MAX_SEGMENTS, Segment, make_segment, opened, picture_segment

_KIND_WEIGHTS = {
    "what": 0.7, "color": 1.0, "shape": 1.0, "count": 2.0, "where": 1.3, "exists": 0.6, "side": 0.9, "beside": 1.3,
    "extreme": 0.7, "at": 0.7, "detect": 1.7, "point": 1.1, "caption short": 0.35, "caption normal": 0.45,
    "caption long": 0.12,
}  # fmt: skip
_PAIR_WEIGHTS = {
    "more": 2.2, "same": 1.3, "which": 1.4, "exists": 0.8, "count": 1.4, "total": 0.9, "what": 0.8, "color": 0.7,
    "where": 0.7, "both": 0.25,
}  # fmt: skip
_FOLLOWED = 0.3  # of the questions, by a first question that leans on them
_FOLLOWED_ON = 0.45  # of those, by one more, and so on
_LEANING = 0.8  # of the follow-ups; the others are questions that could stand alone
_SYSTEM = 0.07  # of the first questions stand behind a system message
_LEAST_ROOM = 12  # positions that the shortest question takes


class RowDrawing:
    """Draws the segments of one row."""

    def __init__(
        self, rng: Generator, tokenizer: Tokenizer, config: NetworkConfig, num_positions: int
    ) -> None:
        self.rng = rng
        self.tokenizer = tokenizer
        self.templates = config.tokenizer["templates"]
        self.picture_tokens = config.num_prefix - 1
        self.segments: list[Segment] = []
        self.room = num_positions

    @property
    def _is_full(self) -> bool:
        return self.room < _LEAST_ROOM or len(self.segments) == MAX_SEGMENTS

    def one(self, scene: Scene) -> list[Segment]:
        """Questions about one picture, some with follow-ups."""
        root = self._add(picture_segment(self.picture_tokens))
        assert root is not None
        self._ask(scene, root, 40)
        return self.segments

    def two(self, first: Scene, second: Scene) -> list[Segment]:
        """Questions about two pictures: of one turn, or the second in a later one."""
        root = self._add(picture_segment(self.picture_tokens))
        together = bool(self.rng.random() < 0.6)
        at: int | None = root
        if not together:
            about = Questioner(first, self.rng)
            for _ in range(1 if self.rng.random() < 0.75 else 2):
                ask = about.draw(QUERY_KINDS[int(self.rng.integers(len(QUERY_KINDS)))])
                asked = self._question(ask, at, begins=at == root) if ask is not None else None
                at = asked if asked is not None else at
        at = self._add(picture_segment(self.picture_tokens, at))
        if at is None or root is None:
            return self.segments
        pairs = PairQuestioner((first, second), self.rng, together=together)
        for kind in self._kinds(_PAIR_WEIGHTS, PAIR_KINDS, 24):
            if self._is_full:
                break
            if not together and self.rng.random() < 0.35:
                self._ask(second, at, 1, QUERY_KINDS)  # the newest picture is what a plain question means
            elif self.rng.random() < 0.06:
                self._ask(first, root, 1)
            else:
                self._pair(pairs.draw(kind), at, begins=together)
        return self.segments

    def _kinds(self, weights: dict[str, float], kinds: tuple[str, ...], num: int) -> list[str]:
        shares = np.array([weights[kind] for kind in kinds])
        return [kinds[int(i)] for i in self.rng.choice(len(kinds), size=num, p=shares / shares.sum())]

    def _ask(self, scene: Scene, parent: int, num: int, kinds: tuple[str, ...] = KINDS) -> None:
        """Up to `num` questions about a scene, whose picture `parent` is, and what is asked behind them."""
        questioner = Questioner(scene, self.rng)
        for kind in self._kinds(_KIND_WEIGHTS, kinds, num):
            ask = questioner.draw(kind)
            if ask is None:
                continue
            if ask.task == "query" and self.rng.random() < 0.012:
                lone = Ask("query", "no picture", ask.text, NO_PICTURE_ANSWER)
                self._add(opened(make_segment(lone, self.tokenizer, self.templates, self.rng)))
            else:
                asked = self._question(ask, parent, begins=self.segments[parent].parent is None)
                self._follow(questioner, ask, asked)
            if self._is_full:
                return

    def _follow(self, questioner: Questioner, ask: Ask, asked: int | None) -> None:
        following = FollowUps(questioner)
        share = _FOLLOWED
        while asked is not None and ask.task == "query" and self.rng.random() < share:
            share = _FOLLOWED_ON
            if self.rng.random() < _LEANING:
                then = following.draw(ask)
            else:
                then = questioner.draw(QUERY_KINDS[int(self.rng.integers(len(QUERY_KINDS)))])
            if then is None:
                return
            ask = then
            asked = self._question(then, asked, begins=False)

    def _pair(self, pair: PairAsk | None, parent: int, *, begins: bool) -> None:
        asked: int | None = parent
        while pair is not None and asked is not None:
            asked = self._question(pair.ask, asked, begins=begins)
            begins = False
            if pair.again is None or self.rng.random() > _FOLLOWED_ON:
                return
            pair = pair.again()

    def _question(self, ask: Ask, parent: int | None, *, begins: bool) -> int | None:
        """Add a question; `begins`: it is the conversation's first, where a system message can stand."""
        if begins and ask.task == "query" and self.rng.random() < _SYSTEM:
            ask = after_system(ask, self.rng)
        return self._add(make_segment(ask, self.tokenizer, self.templates, self.rng, parent))

    def _add(self, segment: Segment) -> int | None:
        """The segment's number in the row, or None where there is no room for it."""
        if len(segment.ids) > self.room or len(self.segments) == MAX_SEGMENTS:
            return None
        self.segments.append(segment)
        self.room -= len(segment.ids)
        return len(self.segments) - 1
