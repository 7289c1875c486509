"""Owns what is asked about two pictures, and the one right answer to it; runs in the drawing process.

The pictures are "first" and "second" in the order in which they stand in the conversation, whether one turn shows both or
each comes with its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

from numpy.random import Generator

from pocket.phrases import Ask, is_ordered, join, listing, matching, missing, place_of, with_article
from pocket.questions import Questioner
from pocket.scenes import SHAPES, Scene

_SIDES = ("first", "second")


@dataclass(frozen=True)
class PairAsk:
    """A question about two pictures, and what draws a short one behind it."""

    ask: Ask
    again: Callable[[], "PairAsk | None"] | None = None


class PairQuestioner:
    """Draws questions about two scenes. `together`: one turn shows both, so a plain question means both."""

    def __init__(self, scenes: tuple[Scene, Scene], rng: Generator, *, together: bool) -> None:
        self.scenes = scenes
        self.rng = rng
        self.together = together
        self.each = tuple(Questioner(scene, rng) for scene in scenes)

    def draw(self, kind: str) -> PairAsk | None:
        """A question of this kind, or None where the scenes do not allow it."""
        return _KINDS[kind](self)

    def _pick(self, *options: str) -> str:
        return self.each[0].pick(*options)

    def _side(self) -> int:
        return int(self.rng.integers(2))

    def _query(self, kind: str, text: str, answer: str, settled: bool = True) -> Ask:
        return self.each[0].query(f"pair {kind}", text, answer, settled)

    def _counts(self, color: str | None, shape: str | None) -> tuple[int, int]:
        first, second = (len(matching(scene.things, color, shape)) for scene in self.scenes)
        return first, second

    def _target(self, present: float) -> tuple[str | None, str | None]:
        return self.each[self._side()].target(present)

    def _differing(self, present: float = 0.9) -> tuple[str | None, str | None]:
        """A colour and a shape, or neither, whose counts mostly differ between the pictures."""
        color, shape = None, None
        for _ in range(3):
            color, shape = (None, None) if self.rng.random() < 0.15 else self._target(present)
            first, second = self._counts(color, shape)
            if first != second:
                break
        return color, shape

    def _many(self, color: str | None, shape: str | None) -> str:
        return self.each[0].name(color, shape, many=True)

    def _the(self, side: int) -> str:
        """Words for one of the pictures."""
        how = self.rng.random()
        if how < 0.85:
            return f"the {_SIDES[side]} picture"
        return f"picture {side + 1}" if how < 0.95 else f"the {_SIDES[side]} one"

    def more(
        self, color: str | None = None, shape: str | None = None, again: bool | None = None
    ) -> PairAsk | None:
        """Which picture has more, or fewer; `again`: the short form behind such a question (True: more)."""
        if again is None:
            color, shape = self._differing()
        many = self._many(color, shape)
        is_more = bool(self.rng.random() < 0.7) if again is None else again
        word = "more" if is_more else self._pick("fewer", "fewer", "less")
        text = self._pick(
            f"which picture has {word} {many}", f"which picture shows {word} {many}", f"which has {word} {many}",
            f"which one has {word} {many}", f"in which picture are there {word} {many}", f"which picture has {word} {many}",
            f"which of the pictures has {word} {many}",
        ) if again is None else self._pick(
            f"and {word} {many}", f"and which has {word} {many}", f"and {many}", f"what about {many}"
        )  # fmt: skip
        first, second = self._counts(color, shape)
        answer = "neither" if first == second else f"the {_SIDES[int((second > first) == is_more)]}"

        def repeat() -> PairAsk | None:
            other = self._differing()
            return None if other in ((color, shape), (None, None)) else self.more(*other, again=is_more)

        return PairAsk(self._query("more" if again is None else "then more", text, answer), repeat)

    def same(self) -> PairAsk:
        """Yes or no to a comparison of counts."""
        color, shape = self._target(0.9) if self.rng.random() < 0.5 else self._differing()
        many = self._many(color, shape)
        first, second = self._counts(color, shape)
        if self.rng.random() < 0.5:
            text = self._pick(
                f"do both pictures have the same number of {many}", f"do the pictures have the same number of {many}",
                f"is the number of {many} the same in both pictures", f"do both pictures have equally many {many}",
            )  # fmt: skip
            return PairAsk(self._query("same", text, "yes" if first == second else "no"))
        side, is_more = self._side(), bool(self.rng.random() < 0.6)
        word = "more" if is_more else "fewer"
        one, other = f"the {_SIDES[side]} picture", f"the {_SIDES[1 - side]}"
        text = self._pick(
            f"does {one} have {word} {many}", f"does {one} have {word} {many} than {other}",
            f"are there {word} {many} in {one} than in {other}", f"are there {word} {many} in {one}",
        )  # fmt: skip
        own, others = (first, second) if side == 0 else (second, first)
        return PairAsk(
            self._query("same", text, "yes" if (own > others if is_more else own < others) else "no")
        )

    def which(self) -> PairAsk:
        """Which picture has something."""
        color, shape = self._target(0.95)
        name = with_article(self.each[0].name(color, shape))
        text = self._pick(
            f"which picture has {name}", f"in which picture is {name}", f"which picture shows {name}",
            f"which one has {name}", f"which of the pictures has {name}", f"in which picture do you see {name}",
        )  # fmt: skip
        first, second = (count > 0 for count in self._counts(color, shape))
        answer = (
            "both" if first and second else "the first" if first else "the second" if second else "neither"
        )
        if first == second:
            return PairAsk(self._query("which", text, answer))
        found = matching(self.scenes[int(second)].things, color, shape)

        def where() -> PairAsk | None:
            place = place_of(found[0])
            if len(found) > 1 or place is None:
                return None
            text = self._pick("where is it", "and where is it", "where is it in that picture")
            return PairAsk(self._query("then where", text, place))

        return PairAsk(self._query("which", text, answer), where)

    def exists(self) -> PairAsk:
        """Whether something is in one picture, or in both."""
        color, shape = self._target(0.7)
        name = with_article(self.each[0].name(color, shape))
        side = self._side()
        counts = self._counts(color, shape)
        if self.rng.random() < 0.6:
            one = self._the(side)
            text = self._pick(
                f"is there {name} in {one}", f"does {one} have {name}", f"do you see {name} in {one}"
            )
            return self._sided(
                "exists", side, text, lambda side: ("yes" if self._counts(color, shape)[side] else "no", True)
            )
        text = self._pick(f"is there {name} in both pictures", f"do both pictures have {name}")
        return PairAsk(self._query("exists", text, "yes" if min(counts) else "no"))

    def count(self) -> PairAsk:
        """How many one picture has."""
        color, shape = (None, None) if self.rng.random() < 0.25 else self._target(0.9)
        many, side = self._many(color, shape), self._side()
        one = self._the(side)
        text = self._pick(
            f"how many {many} are in {one}", f"how many {many} are there in {one}", f"how many {many} does {one} have",
            f"how many {many} does {one} show", f"in {one}, how many {many} are there", f"count the {many} in {one}",
        )  # fmt: skip
        return self._sided("count", side, text, lambda side: (str(self._counts(color, shape)[side]), True))

    def total(self) -> PairAsk:
        """How many both have."""
        color, shape = (None, None) if self.rng.random() < 0.2 else self._target(0.9)
        many = self._many(color, shape)
        options = [
            f"how many {many} are in both pictures", f"how many {many} are there in total",
            f"how many {many} are there altogether", f"how many {many} are in the two pictures together",
        ]  # fmt: skip
        if self.together:
            options += [f"how many {many} are there", f"how many {many} do you see"]
        return PairAsk(self._query("total", self._pick(*options), str(sum(self._counts(color, shape)))))

    def what(self) -> PairAsk:
        """What one picture shows."""
        side = self._side()
        one = self._the(side)
        text = self._pick(
            f"what is in {one}", f"what do you see in {one}", f"describe {one}", f"what shapes are in {one}",
            f"what's in {one}", f"what is in {one}", f"what does {one} show",
        )  # fmt: skip

        def answer(side: int) -> tuple[str, bool]:
            things = self.scenes[side].things
            return listing(things), is_ordered(things)

        return self._sided("what", side, text, answer)

    def color(self) -> PairAsk | None:
        """The colour of a shape in one picture."""
        side = self._side()
        things = self.scenes[side].things
        shape = things[int(self.rng.integers(len(things)))].shape if things else self._pick(*SHAPES)
        if len({t.color for t in matching(things, None, shape)}) > 2:
            return None
        one = self._the(side)
        text = self._pick(
            f"what color is the {shape} in {one}", f"in {one}, what color is the {shape}",
            f"which color does the {shape} in {one} have",
        )  # fmt: skip

        def answer(side: int) -> tuple[str, bool]:
            found = matching(self.scenes[side].things, None, shape)
            colors = list(dict.fromkeys(t.color for t in found))
            return join(colors) or missing(None, shape), len(colors) < 2 or (
                len(colors) == 2 and is_ordered(found)
            )

        return self._sided("color", side, text, answer)

    def where(self) -> PairAsk | None:
        """Where something is in one picture."""
        side = self._side()
        color, shape = self.each[side].target(0.95)
        found = matching(self.scenes[side].things, color, shape)
        places = [place_of(t) for t in found]
        if len(found) > 2 or None in places:
            return None
        name, one = self.each[0].name(color, shape), self._the(side)
        text = self._pick(f"where is the {name} in {one}", f"in {one}, where is the {name}")
        names = list(dict.fromkeys(p for p in places if p))
        return PairAsk(self._query("where", text, join(names) or missing(color, shape), is_ordered(found)))

    def both(self) -> PairAsk:
        """What the two pictures show."""
        options = [
            "describe both pictures", "what is in the pictures", "what do you see in both pictures",
            "what is in both pictures", "describe the pictures", "describe the two pictures",
        ]  # fmt: skip
        if self.together:
            options += ["what do you see", "what is there"]
        shown = [f"{side}: {listing(scene.things)}" for side, scene in zip(_SIDES, self.scenes, strict=True)]
        settled = all(is_ordered(scene.things) for scene in self.scenes)
        return PairAsk(self._query("both", self._pick(*options), "; ".join(shown), settled))

    def _sided(self, kind: str, side: int, text: str, answer: Callable[[int], tuple[str, bool]]) -> PairAsk:
        """A question about one picture, whose follow-up asks the same of the other."""

        def other() -> PairAsk | None:
            word = self._pick(_SIDES[1 - side], _SIDES[1 - side], "other")
            text = self._pick(
                f"and in the {word} picture", f"and in the {word}", f"what about the {word} picture",
                f"and the {word} picture", f"and in the {word} one",
            )  # fmt: skip
            return PairAsk(self._query("then other", text, *answer(1 - side)))

        return PairAsk(self._query(kind, text, *answer(side)), other)


_KINDS: dict[str, Callable[[PairQuestioner], PairAsk | None]] = {
    "more": PairQuestioner.more,
    "same": PairQuestioner.same,
    "which": PairQuestioner.which,
    "exists": PairQuestioner.exists,
    "count": PairQuestioner.count,
    "total": PairQuestioner.total,
    "what": PairQuestioner.what,
    "color": PairQuestioner.color,
    "where": PairQuestioner.where,
    "both": PairQuestioner.both,
}
PAIR_KINDS = tuple(_KINDS)
