"""Owns short questions that lean on the one before ("and how many are red?"), and system messages; drawing process.

What a follow-up means is one rule: it keeps what the question before asked about, except for the colour or the shape
that it names itself. "It" and "they" are what that question found.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from numpy.random import Generator

from pocket.phrases import Ask, join, listing, matching, missing, place_of, plural, with_article
from pocket.phrases import is_ordered as in_order
from pocket.questions import Questioner
from pocket.scenes import COLOR_NAMES, SHAPES

_WHO = (
    "assistant",
    "AI assistant",
    "assistant for pictures",
    "model",
    "chatbot",
    "expert",
    "vision assistant",
)
_LIKE = ("helpful", "friendly", "careful", "concise", "polite", "useful")
_MANNER = (
    "Answer briefly.", "Be concise.", "Answer in one word.", "Answer the question.", "Reply in English.",
    "Answer questions about the picture.", "Think before you answer.", "Do not guess.", "Only answer what is asked.",
    "Always be polite.", "Use simple words.", "Look at the picture.", "If you are not sure, say so.",
)  # fmt: skip


def system_message(rng: Generator) -> str:
    """One of the ways in which clients introduce a model to itself."""
    like, who, manner = (words[int(rng.integers(len(words)))] for words in (_LIKE, _WHO, _MANNER))
    how = rng.random()
    if how < 0.3:
        return "You are a helpful assistant."
    who = f"You are {with_article(f'{like} {who}' if rng.random() < 0.7 else who)}."
    return manner if how < 0.5 else who if how < 0.75 else f"{who} {manner}"


def after_system(ask: Ask, rng: Generator) -> Ask:
    """The question behind a system message, joined as a conversation's first turn is served."""
    return replace(ask, text=f"{system_message(rng)}\n\n{ask.text}")


class FollowUps:
    """Draws questions that lean on an earlier one about the same scene."""

    def __init__(self, questioner: Questioner) -> None:
        self.questioner = questioner
        self.things = questioner.things
        self.rng = questioner.rng

    def draw(self, ask: Ask) -> Ask | None:
        """A follow-up to this question, or None where it leaves nothing to lean on."""
        ways = list(self._ways(ask))
        return ways[int(self.rng.integers(len(ways)))](ask) if ways else None

    def _ways(self, ask: Ask) -> Iterator[Callable[[Ask], Ask | None]]:
        kind = ask.kind.removeprefix("then ")
        if len(ask.found) == 1 and kind not in ("color", "color it"):
            yield self.color_of_it
        if len(ask.found) == 1 and kind not in ("shape", "shape it", "what") and ask.shape is None:
            yield self.shape_of_it
        if len(ask.found) == 1 and kind not in ("where", "place it"):
            yield self.place_of_it
            yield self.place_of_it
        if len(ask.found) > 1 and kind in ("count", "exists", "where"):
            yield from (self.color_of_it, self.place_of_it)
        if kind in ("count", "count all", "what", "exists", "caption"):
            yield from (self.count_of_them,) * 2
        swap = {"color": self.other_color, "shape": self.other_shape, "where": self.other_place}
        if kind in swap:
            yield swap[kind]
            yield swap[kind]
        if kind == "exists":
            yield self.other_exists
        if kind in ("exists", "what"):
            yield self.how_many
        if kind == "at":
            yield self.other_at

    def _then(self, kind: str, ask: Ask, text: str, answer: str, settled: bool = True) -> Ask:
        query = self.questioner.query(f"then {kind}", text, answer, settled)
        return replace(query, color=ask.color, shape=ask.shape, found=ask.found)

    def color_of_it(self, ask: Ask) -> Ask | None:
        colors = list(dict.fromkeys(t.color for t in ask.found))
        it, pick = _pronoun(ask), self.questioner.pick
        if len(colors) > 2:
            return None
        be = "is" if it == "it" else "are"
        do = "does" if it == "it" else "do"
        text = pick(
            f"what color {be} {it}", f"which color {be} {it}", f"and what color {be} {it}", f"what color {do} {it} have",
            f"what color {be} {it}",
        )  # fmt: skip
        return self._then("color it", ask, text, join(colors), len(colors) == 1 or in_order(ask.found))

    def shape_of_it(self, ask: Ask) -> Ask | None:
        text = self.questioner.pick(
            "what shape is it",
            "which shape is it",
            "and what shape is it",
            "what shape does it have",
            "what is it",
        )
        return self._then("shape it", ask, text, ask.found[0].shape)

    def place_of_it(self, ask: Ask) -> Ask | None:
        places = [place_of(t) for t in ask.found]
        if len(places) > 2 or None in places:
            return None
        it = _pronoun(ask)
        be = "is" if it == "it" else "are"
        text = self.questioner.pick(
            f"where {be} {it}", f"where {be} {it} in the picture", f"and where {be} {it}", f"where {be} {it}",
            f"in which part of the picture {be} {it}",
        )  # fmt: skip
        names = list(dict.fromkeys(p for p in places if p))
        return self._then("place it", ask, text, join(names), in_order(ask.found))

    def count_of_them(self, ask: Ask) -> Ask | None:
        """A count of what was asked about, with a colour or a shape of its own."""
        pick, color, shape = self.questioner.pick, ask.color, ask.shape
        thing = self.things[int(self.rng.integers(len(self.things)))] if self.things else None
        is_there = thing is not None and self.rng.random() < 0.75
        if shape is not None or self.rng.random() < 0.6:
            other = thing.color if thing and is_there else pick(*COLOR_NAMES)
            options = [
                f"and how many are {other}", f"how many are {other}", f"and how many {other} ones",
                f"how many {other} ones are there", f"and {other} ones",
            ]  # fmt: skip
            options += [f"how many of them are {other}"] * 2 if color is None else []
            color = other
        else:
            other = thing.shape if thing and is_there else pick(*SHAPES)
            many = plural(other)
            options = [f"how many of them are {many}", f"and how many are {many}", f"how many are {many}"]
            if color is None:
                options += [f"and {many}", f"and how many {many}", f"what about {many}", f"how many {many}"]
            shape = other
        return self._count(pick(*options), color, shape)

    def how_many(self, ask: Ask) -> Ask:
        text = self.questioner.pick("how many are there", "how many", "and how many", "how many do you see")
        return self._count(text, ask.color, ask.shape)

    def _count(self, text: str, color: str | None, shape: str | None) -> Ask:
        found = matching(self.things, color, shape)
        query = self.questioner.query("then count", text, str(len(found)))
        return replace(query, color=color, shape=shape, found=found)

    def _other(self, text: str) -> str:
        return self.questioner.pick(f"and {text}", f"what about {text}", f"and {text}", f"how about {text}")

    def other_color(self, ask: Ask) -> Ask | None:
        shape = self._another(ask.shape, [t.shape for t in self.things], SHAPES)
        found = matching(self.things, None, shape)
        colors = list(dict.fromkeys(t.color for t in found))
        if len(colors) > 2:
            return None
        answer = join(colors) or missing(None, shape)
        settled = len(colors) < 2 or in_order(found)
        query = self.questioner.query("then color", self._other(f"the {shape}"), answer, settled)
        return replace(query, shape=shape, found=found)

    def other_shape(self, ask: Ask) -> Ask | None:
        color = self._another(ask.color, [t.color for t in self.things], COLOR_NAMES)
        found = matching(self.things, color, None)
        shapes = list(dict.fromkeys(t.shape for t in found))
        if len(shapes) > 2:
            return None
        answer = join(shapes) or missing(color, None)
        settled = len(shapes) < 2 or in_order(found)
        query = self.questioner.query("then shape", self._other(f"the {color} one"), answer, settled)
        return replace(query, color=color, found=found)

    def other_place(self, ask: Ask) -> Ask | None:
        color, shape = self.questioner.target(0.95)
        if (color, shape) == (ask.color, ask.shape):
            return None
        found = matching(self.things, color, shape)
        places = [place_of(t) for t in found]
        if len(found) > 2 or None in places:
            return None
        names = list(dict.fromkeys(p for p in places if p))
        answer = join(names) or missing(color, shape)
        text = self._other(f"the {color + ' ' if color else ''}{shape or 'one'}")
        query = self.questioner.query("then where", text, answer, in_order(found))
        return replace(query, color=color, shape=shape, found=found)

    def other_exists(self, ask: Ask) -> Ask:
        color, shape = self.questioner.target(0.5)
        if shape is None:  # "a blue one": of the shape asked about before
            shape = ask.shape
            text = self._other(with_article(f"{color} one"))
        else:
            text = self._other(with_article(f"{color} {shape}" if color else shape))
        found = matching(self.things, color, shape)
        query = self.questioner.query("then exists", text, "yes" if found else "no")
        return replace(query, color=color, shape=shape, found=found)

    def other_at(self, ask: Ask) -> Ask | None:
        places = [place_of(t) for t in self.things]
        if None in places or not places:
            return None
        pick = self.questioner.pick
        place = pick(
            "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right"
        )
        if self.rng.random() < 0.75:
            place = str(pick(*[str(p) for p in places]))
        found = [t for t, p in zip(self.things, places, strict=True) if p == place]
        if len(found) > 2:
            return None
        query = self.questioner.query(
            "then at", self._other(f"at the {place}"), listing(found), in_order(found)
        )
        return replace(query, found=tuple(found))

    def _another(self, name: str | None, present: list[str], every: tuple[str, ...]) -> str:
        others = [one for one in dict.fromkeys(present) if one != name]
        if others and self.rng.random() < 0.9:
            return self.questioner.pick(*others)
        return self.questioner.pick(*[one for one in every if one != name])


def _pronoun(ask: Ask) -> str:
    return "it" if len(ask.found) == 1 else "they"
