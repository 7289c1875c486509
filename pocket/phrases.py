"""Owns the words for things in a scene, one question's record and the captions; runs in the drawing process."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from pocket.scenes import Scene, Thing

Task = Literal["query", "caption", "detect", "point"]

NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six")
_BORDER = 0.03  # a centre this close to a third of the picture is in neither of two places
_ORDER_GAP = 0.025  # centres closer than this have no left-to-right order


@dataclass(frozen=True)
class Ask:
    """One question: `text` is the question, the caption's length, or the object to find."""

    task: Task
    kind: str
    text: str
    answer: str = ""
    targets: tuple[Thing, ...] = ()
    settled: bool = True  # False: listed in an order that is a matter of taste; trained on, not scored
    color: str | None = None  # the colour and the shape that it asks about; None any
    shape: str | None = None
    found: tuple[Thing, ...] = ()  # what "it" and "they" mean in a question behind it


def plural(shape: str) -> str:
    """The plural of a shape's name or of a word for any shape."""
    return shape + ("es" if shape.endswith("s") else "s")


def matching(things: Sequence[Thing], color: str | None, shape: str | None) -> tuple[Thing, ...]:
    """The things of this colour and shape, left to right; None matches any."""
    return tuple(t for t in things if color in (None, t.color) and shape in (None, t.shape))


def place_of(thing: Thing) -> str | None:
    """Which ninth of the picture a thing's centre lies in, or None near a border."""
    if any(abs(v - third) < _BORDER for v in (thing.x, thing.y) for third in (1 / 3, 2 / 3)):
        return None
    across = "left" if thing.x < 1 / 3 else "right" if thing.x > 2 / 3 else ""
    down = "top" if thing.y < 1 / 3 else "bottom" if thing.y > 2 / 3 else ""
    return f"{down} {across}".strip() or "center"


def is_ordered(things: Sequence[Thing]) -> bool:
    """Whether neighbours stand so far apart that left to right is no matter of taste."""
    return all(b.x - a.x >= _ORDER_GAP for a, b in pairwise(things))


def missing(color: str | None, shape: str | None) -> str:
    """What is said where nothing of this colour and shape is."""
    return f"there is no {color + ' ' if color else ''}{shape or 'object'}"


def join(parts: Sequence[str]) -> str:
    """The parts as English lists them: "a, b and c"."""
    if len(parts) < 2:
        return "".join(parts)
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def with_article(name: str) -> str:
    """The name behind "a" or "an"."""
    return ("an " if name[0] in "aeiou" else "a ") + name


def listing(things: Sequence[Thing]) -> str:
    """The things as one English list; "nothing" for none."""
    return join([with_article(t.name) for t in things]) if things else "nothing"


def caption(scene: Scene, length: str) -> Ask:
    """The caption of a scene: "short", "normal" or "long"."""
    things = scene.things
    settled = is_ordered(things)
    if length == "short":
        text = listing(things) if things else "an empty picture"
        return Ask("caption", "caption short", length, text[0].upper() + text[1:] + ".", settled=settled)
    if not things:
        text = (
            "The picture is empty."
            if length == "normal"
            else "The picture is empty. There are no shapes in it."
        )
        return Ask("caption", f"caption {length}", length, text)
    places = [place_of(t) for t in things]
    settled = settled and None not in places
    located = join([f"{with_article(t.name)} at the {_nearest(t)}" for t in things])
    if length == "normal":
        return Ask(
            "caption", "caption normal", length, located[0].upper() + located[1:] + ".", settled=settled
        )
    noun = "shape" if len(things) == 1 else "shapes"
    text = f"The picture shows {NUMBER_WORDS[len(things)]} {noun}: {located}."
    return Ask("caption", "caption long", length, text, settled=settled)


def _nearest(thing: Thing) -> str:
    across = "left" if thing.x < 1 / 3 else "right" if thing.x > 2 / 3 else ""
    down = "top" if thing.y < 1 / 3 else "bottom" if thing.y > 2 / 3 else ""
    return f"{down} {across}".strip() or "center"
