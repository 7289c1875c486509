"""Owns what is asked about a scene and the one right answer to it; runs in the drawing process.

Answers are canonical: one string per question and scene. Where a scene leaves two answers about as right (a
thing on the border between "left" and "center"), the question is not asked.
"""

from collections.abc import Callable, Sequence

from numpy.random import Generator

from pocket.phrases import (
    Ask,
    Task,
    caption,
    is_ordered,
    join,
    listing,
    matching,
    missing,
    place_of,
    plural,
    with_article,
)
from pocket.scenes import COLOR_NAMES, SHAPES, Scene, Thing

NO_PICTURE_ANSWER = "please add a picture"


class Questioner:
    """Draws questions about one scene."""

    def __init__(self, scene: Scene, rng: Generator) -> None:
        self.scene = scene
        self.things = scene.things
        self.rng = rng

    def draw(self, kind: str) -> Ask | None:
        """A question of this kind, or None where the scene does not allow it."""
        return _KINDS[kind](self)

    def pick(self, *options: str) -> str:
        """One of the options."""
        return options[int(self.rng.integers(len(options)))]

    def _thing(self) -> Thing | None:
        return self.things[int(self.rng.integers(len(self.things)))] if self.things else None

    def target(self, present: float) -> tuple[str | None, str | None]:
        """A colour and a shape to ask about, at least one of them; in the scene with probability `present`."""
        thing = self._thing()
        if thing is None or self.rng.random() >= present:
            color: str | None = self.pick(*COLOR_NAMES)
            shape: str | None = self.pick(*SHAPES)
            if thing is not None and self.rng.random() < 0.6:  # near miss: one half is right
                color, shape = (thing.color, shape) if self.rng.random() < 0.5 else (color, thing.shape)
        else:
            color, shape = thing.color, thing.shape
        form = self.rng.random()
        if form < 0.45:
            return color, shape
        return (color, None) if form < 0.7 else (None, shape)

    def _noun(self) -> str:
        return self.pick("object", "shape", "thing")

    def name(self, color: str | None, shape: str | None, many: bool = False) -> str:
        noun = shape or self._noun()
        noun = plural(noun) if many else noun
        return f"{color} {noun}" if color else noun

    def _voice(self, text: str) -> str:
        """The question in one of the ways people type."""
        text = text.replace("color", "colour") if self.rng.random() < 0.25 else text
        text = text.replace("picture", self.pick("picture", "image", "scene"))
        how = self.rng.random()
        if how < 0.5:
            text = text[0].upper() + text[1:]
        elif how < 0.55:
            text = text.upper()
        if self.rng.random() < 0.65:
            text += "?" if text.split()[0].lower() not in ("count", "name", "list", "describe") else "."
        return text

    def query(
        self,
        kind: str,
        text: str,
        answer: str,
        settled: bool = True,
        *,
        color: str | None = None,
        shape: str | None = None,
        found: Sequence[Thing] = (),
    ) -> Ask:
        """A question with its text in one of the voices; the other fields are `Ask`'s."""
        return Ask(
            "query",
            kind,
            self._voice(text),
            answer,
            (),
            settled,
            color=color,
            shape=shape,
            found=tuple(found),
        )

    def what(self) -> Ask:
        text = self.pick(
            "what is in the picture", "what do you see", "what is this", "what is there", "describe the picture",
            "what objects are in the picture", "what shapes are there", "list the objects", "what's in this picture",
        )  # fmt: skip
        return self.query("what", text, listing(self.things), is_ordered(self.things), found=self.things)

    def color(self) -> Ask | None:
        shape = self.pick(*SHAPES)
        thing = self._thing()
        if thing is not None and self.rng.random() < 0.9:
            shape = thing.shape
        found = matching(self.things, None, shape)
        text = self.pick(
            f"what color is the {shape}", f"which color is the {shape}", f"what is the color of the {shape}",
            f"what color is the {shape} in the picture", f"the {shape} is what color", f"color of the {shape}",
            f"which color does the {shape} have", f"what color does the {shape} have",
        )  # fmt: skip
        if not found:
            return self.query("color", text, f"there is no {shape}", shape=shape)
        colors = list(dict.fromkeys(t.color for t in found))
        if len(colors) > 2:
            return None
        if len(found) > 1 and self.rng.random() < 0.7:
            text = self.pick(
                f"what color are the {plural(shape)}", f"which colors do the {plural(shape)} have"
            )
        return self.query(
            "color", text, join(colors), len(colors) == 1 or is_ordered(found), shape=shape, found=found
        )

    def shape(self) -> Ask | None:
        color = self.pick(*COLOR_NAMES)
        thing = self._thing()
        if thing is not None and self.rng.random() < 0.9:
            color = thing.color
        found = matching(self.things, color, None)
        noun = self.pick("object", "thing", "one", "shape")
        text = self.pick(
            f"what shape is the {color} {noun}", f"which shape is the {color} {noun}",
            f"what shape is {color}", f"what is the shape of the {color} {noun}", f"what is the {color} {noun}",
            f"which shape does the {color} {noun} have", f"shape of the {color} {noun}", f"what is {color}",
        )  # fmt: skip
        if not found:
            return self.query("shape", text, f"there is no {color} object", color=color)
        shapes = list(dict.fromkeys(t.shape for t in found))
        if len(shapes) > 2:
            return None
        return self.query(
            "shape", text, join(shapes), len(shapes) == 1 or is_ordered(found), color=color, found=found
        )

    def count(self) -> Ask:
        if self.rng.random() < 0.3:
            color, shape = None, None
        else:
            color, shape = self.target(0.85)
        if color is None and shape is None:
            names = self.pick("objects", "shapes", "things")
        else:
            names = self.name(color, shape, many=True)
        text = self.pick(
            f"how many {names} are there", f"how many {names} are in the picture", f"how many {names}",
            f"how many {names} do you see", f"count the {names}", f"what is the number of {names}",
            f"how many {names} can you see", f"how many {names} does the picture show",
        )  # fmt: skip
        kind = "count all" if color is None and shape is None else "count"
        found = matching(self.things, color, shape)
        return self.query(kind, text, str(len(found)), color=color, shape=shape, found=found)

    def where(self) -> Ask | None:
        color, shape = self.target(0.95)
        found = matching(self.things, color, shape)
        name = self.name(color, shape)
        text = self.pick(
            f"where is the {name}", f"where is the {name} in the picture", f"where can you see the {name}",
            f"in which part of the picture is the {name}", f"where's the {name}", f"what is the position of the {name}",
        )  # fmt: skip
        if not found:
            return self.query("where", text, missing(color, shape), color=color, shape=shape)
        places = [place_of(t) for t in found]
        if len(found) > 2 or None in places:
            return None
        if len(found) == 2:
            text = self.pick(f"where are the {self.name(color, shape, many=True)}", text)
        names = list(dict.fromkeys(p for p in places if p))
        return self.query(
            "where", text, join(names), is_ordered(found), color=color, shape=shape, found=found
        )

    def exists(self) -> Ask:
        color, shape = self.target(0.5)
        name = self.name(color, shape)
        many = self.name(color, shape, many=True)
        found = matching(self.things, color, shape)
        text = self.pick(
            f"is there {with_article(name)}", f"is there {with_article(name)} in the picture", f"do you see {with_article(name)}",
            f"are there any {many}", f"is {with_article(name)} in the picture", f"can you see {with_article(name)}",
            f"does the picture show {with_article(name)}", f"are there {many} in the picture",
        )  # fmt: skip
        return self.query("exists", text, "yes" if found else "no", color=color, shape=shape, found=found)

    def _unique(self) -> list[tuple[str, Thing]]:
        """Things with a name that only they bear."""
        named = []
        for thing in self.things:
            options = [
                name
                for name, color, shape in (
                    (thing.name, thing.color, thing.shape),
                    (thing.shape, None, thing.shape),
                    (f"{thing.color} {self._noun()}", thing.color, None),
                )
                if len(matching(self.things, color, shape)) == 1
            ]
            if options:
                named.append((self.pick(*options), thing))
        return named

    def side(self) -> Ask | None:
        named = self._unique()
        if len(named) < 2:
            return None
        first, second = (named[int(i)] for i in self.rng.permutation(len(named))[:2])
        across = bool(self.rng.random() < 0.6)
        gap = second[1].x - first[1].x if across else second[1].y - first[1].y
        if abs(gap) < 0.06:
            return None
        before = bool(self.rng.random() < 0.5)
        words: tuple[str, ...]
        if across:
            words = ("left of", "to the left of") if before else ("right of", "to the right of")
        else:
            words = ("above", "higher than") if before else ("below", "under", "lower than")
        text = f"is the {first[0]} {self.pick(*words)} the {second[0]}"
        return self.query("side", text, "yes" if (gap > 0) == before else "no")

    def beside(self) -> Ask | None:
        named = self._unique()
        if len(self.things) < 2 or not named:
            return None
        name, thing = named[int(self.rng.integers(len(named)))]
        across, before = bool(self.rng.random() < 0.6), bool(self.rng.random() < 0.5)
        found = []
        for other in self.things:
            gap = (other.x - thing.x if across else other.y - thing.y) * (-1 if before else 1)
            if other is thing:
                continue
            if abs(gap) < 0.06:
                return None
            if gap > 0:
                found.append(other)
        if len(found) > 2:
            return None
        words = ("left of", "right of") if across else ("above", "below")
        word = words[0] if before else words[1]
        text = f"what is {'to the ' if across and self.rng.random() < 0.5 else ''}{word} the {name}"
        return self.query("beside", text, listing(found), is_ordered(found), found=found)

    def extreme(self) -> Ask | None:
        if len(self.things) < 2:
            return None
        noun = self._noun()
        kind = self.rng.random()
        if kind < 0.5:
            by_size = sorted(self.things, key=lambda t: t.width * t.height)
            if self.rng.random() < 0.5:
                thing, rival, word = by_size[-1], by_size[-2], self.pick("largest", "biggest")
                clear = thing.width * thing.height > 1.5 * rival.width * rival.height
            else:
                thing, rival, word = by_size[0], by_size[1], "smallest"
                clear = rival.width * rival.height > 1.5 * thing.width * thing.height
        else:
            side = self.pick("left", "right", "top", "bottom")
            order = sorted(self.things, key=lambda t: t.x if side in ("left", "right") else t.y)
            if side in ("right", "bottom"):
                order.reverse()
            thing, rival = order[0], order[1]
            gap = thing.x - rival.x if side in ("left", "right") else thing.y - rival.y
            clear = abs(gap) > 0.05
            word = (
                side + "most" if side in ("left", "right") else {"top": "highest", "bottom": "lowest"}[side]
            )
        if not clear:
            return None
        text = self.pick(
            f"what is the {word} {noun}",
            f"which {noun} is the {word}",
            f"what is the {word} {noun} in the picture",
        )
        return self.query("extreme", text, with_article(thing.name), found=(thing,))

    def at(self) -> Ask | None:
        places = [place_of(t) for t in self.things]
        if None in places:
            return None
        place = self.pick(
            "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right"
        )
        if self.things and self.rng.random() < 0.75:
            place = str(places[int(self.rng.integers(len(places)))])
        found = [t for t, p in zip(self.things, places, strict=True) if p == place]
        if len(found) > 2:
            return None
        text = self.pick(
            f"what is at the {place}", f"what is in the {place}", f"what is at the {place} of the picture",
            f"what do you see at the {place}",
        )  # fmt: skip
        return self.query("at", text, listing(found), is_ordered(found), found=found)

    def _find(self, task: Task) -> Ask:
        if self.rng.random() < 0.2:
            color, shape = None, None
        else:
            color, shape = self.target(0.88)
        text = self.name(color, shape, many=bool(self.rng.random() < 0.3))
        if self.rng.random() < 0.12:
            text = "the " + text
        elif self.rng.random() < 0.06:
            text = "all " + text
        how = self.rng.random()
        text = text[0].upper() + text[1:] if how < 0.12 else text.upper() if how < 0.14 else text
        found = matching(self.things, color, shape)
        return Ask(task, task, text, targets=found, settled=is_ordered(found))

    def detect(self) -> Ask:
        return self._find("detect")

    def point(self) -> Ask:
        return self._find("point")

    def caption_short(self) -> Ask:
        return caption(self.scene, "short")

    def caption_normal(self) -> Ask:
        return caption(self.scene, "normal")

    def caption_long(self) -> Ask:
        return caption(self.scene, "long")


_KINDS: dict[str, Callable[[Questioner], Ask | None]] = {
    "what": Questioner.what,
    "color": Questioner.color,
    "shape": Questioner.shape,
    "count": Questioner.count,
    "where": Questioner.where,
    "exists": Questioner.exists,
    "side": Questioner.side,
    "beside": Questioner.beside,
    "extreme": Questioner.extreme,
    "at": Questioner.at,
    "detect": Questioner.detect,
    "point": Questioner.point,
    "caption short": Questioner.caption_short,
    "caption normal": Questioner.caption_normal,
    "caption long": Questioner.caption_long,
}
QUERY_KINDS = tuple(_KINDS)[:10]
KINDS = tuple(_KINDS)
