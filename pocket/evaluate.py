"""Owns the held-out examination: scenes of an unseen seed, put to anything that answers; evaluation process.

`python -m pocket.evaluate` examines the shipped weights with the plain torch answerer. A serving engine
is examined by handing `evaluate` an object with the same four methods.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, cast, runtime_checkable

import typer
from PIL import Image

from pocket.answers import Box, Point, Reply, Request
from pocket.network import NetworkConfig, VisionConfig
from pocket.phrases import Ask
from pocket.questions import QUERY_KINDS, Questioner
from pocket.scenes import Thing, draw_scene, scene_rng

UNSEEN_SEED = 990_001  # training seeds are small numbers
_EXAM_KINDS = (*QUERY_KINDS, "caption short", "caption normal", "detect", "detect", "point")
WEIGHTS_FOLDER = Path(__file__).parent.parent / "worker" / "pocket" / "weights"


class Answerer(Protocol):
    """What can be examined. Boxes and points are fractions of the picture."""

    def query(self, image: Image.Image, question: str) -> str: ...

    def caption(self, image: Image.Image, length: str) -> str: ...

    def detect(self, image: Image.Image, object: str) -> list[Box]: ...

    def point(self, image: Image.Image, object: str) -> list[Point]: ...


@runtime_checkable
class AnswersMany(Protocol):
    """An answerer that takes many requests at once."""

    def answer_all(self, requests: Sequence[Request]) -> list[Reply]: ...


def ask_all(answer: Answerer, requests: Sequence[Request]) -> list[Reply]:
    """Replies in order; all at once where the answerer can."""
    if isinstance(answer, AnswersMany):
        return answer.answer_all(requests)
    # The four methods differ only in the name of their second argument.
    return [getattr(answer, request.task)(request.image, request.text) for request in requests]


def overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    across = min(a[2], b[2]) - max(a[0], b[0])
    down = min(a[3], b[3]) - max(a[1], b[1])
    if across <= 0 or down <= 0:
        return 0.0
    shared = across * down
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def box_of(thing: Thing) -> Box:
    """A thing's box."""
    return (thing.x_min, thing.y_min, thing.x_max, thing.y_max)


def match_boxes(found: Sequence[Box], targets: Sequence[Box]) -> list[float]:
    """Overlap of each target with the found box that is its own, best pairs first; 0 where none is left."""
    pairs = sorted(
        ((overlap(f, t), i, j) for i, f in enumerate(found) for j, t in enumerate(targets)), reverse=True
    )
    taken: set[int] = set()
    best = [0.0] * len(targets)
    done: set[int] = set()
    for value, i, j in pairs:
        if i not in taken and j not in done and value > 0:
            taken.add(i)
            done.add(j)
            best[j] = value
    return best


def count_points_inside(found: Sequence[Point], targets: Sequence[Box]) -> int:
    """Points that lie in a target of their own."""
    free = list(targets)
    hits = 0
    for x, y in found:
        for box in free:
            if box[0] <= x <= box[2] and box[1] <= y <= box[3]:
                free.remove(box)
                hits += 1
                break
    return hits


def _score(ask: Ask, reply: Reply) -> float:
    """Between 0 and 1: exact match, mean overlap, or share of points inside; extra finds count as misses."""
    if ask.task in ("query", "caption"):
        return float(str(reply).strip() == ask.answer)
    targets = [box_of(t) for t in ask.targets]
    most = max(len(targets), len(reply))
    if most == 0:
        return 1.0
    if ask.task == "detect":
        return sum(match_boxes(cast(list[Box], reply), targets)) / most
    return count_points_inside(cast(list[Point], reply), targets) / most


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4) if values else 0.0


def draw_exam(config: VisionConfig, num_scenes: int, seed: int) -> list[tuple[Ask, Image.Image]]:
    """The questions of an examination: one of each kind a scene allows, none that is a matter of taste."""
    exam: list[tuple[Ask, Image.Image]] = []
    for index in range(num_scenes):
        rng = scene_rng(seed, index)
        scene = draw_scene(rng, config)
        questioner = Questioner(scene, rng)
        for kind in _EXAM_KINDS:
            ask = questioner.draw(kind)
            if ask is not None and (ask.settled or ask.task in ("detect", "point")):
                exam.append((ask, scene.picture))
    return exam


def evaluate(
    answer: Answerer, num_scenes: int = 200, seed: int = UNSEEN_SEED, config: VisionConfig | None = None
) -> dict[str, Any]:
    """Examine an answerer on scenes it has not seen.

    `exact`: share of queries and captions answered to the letter; `count`: of "how many" with up to five;
    `iou`: mean overlap of boxes, a missed or an invented box counting 0; `point`: share of points inside their
    object, likewise; `absent`: share of absent objects for which nothing is found; `n`: questions asked.
    """
    config = config or NetworkConfig.read(WEIGHTS_FOLDER / "config.json").vision
    exam = draw_exam(config, num_scenes, seed)
    replies = ask_all(answer, [Request(ask.task, picture, ask.text) for ask, picture in exam])
    by_kind: dict[str, list[float]] = defaultdict(list)
    groups: dict[str, list[float]] = defaultdict(list)
    for (ask, _), reply in zip(exam, replies, strict=True):
        score = _score(ask, reply)
        by_kind[ask.kind].append(score)
        if ask.task in ("query", "caption"):
            groups["exact"].append(score)
            if ask.kind.startswith("count") and int(ask.answer) <= 5:
                groups["count"].append(score)
        elif not ask.targets:
            groups["absent"].append(score)
        else:
            groups["iou" if ask.task == "detect" else "point"].append(score)
    return {
        **{name: _mean(groups[name]) for name in ("exact", "count", "iou", "point", "absent")},
        "n": len(exam),
        "by_kind": {kind: _mean(values) for kind, values in sorted(by_kind.items())},
    }


def evaluate_small(
    answer: Answerer, num_scenes: int = 100, seed: int = UNSEEN_SEED + 1, config: VisionConfig | None = None
) -> dict[str, float]:
    """Recall of small things by full name (overlap of at least a half), in pictures that take several crops."""
    config = config or NetworkConfig.read(WEIGHTS_FOLDER / "config.json").vision
    exam: list[tuple[Request, list[Box]]] = []
    for index in range(num_scenes):
        scene = draw_scene(scene_rng(seed, index), config, single=0.0, small=True)
        for name in dict.fromkeys(t.name for t in scene.things):
            targets = [box_of(t) for t in scene.things if t.name == name]
            exam.append((Request("detect", scene.picture, name), targets))
    replies = ask_all(answer, [request for request, _ in exam])
    best = [
        value
        for (_, targets), reply in zip(exam, replies, strict=True)
        for value in match_boxes(cast(list[Box], reply), targets)
    ]
    return {"recall": _mean([float(v >= 0.5) for v in best]), "iou": _mean(best), "n": len(best)}


def main(
    num_scenes: Annotated[int, typer.Option(help="held-out scenes")] = 200,
    seed: Annotated[int, typer.Option(help="seed of the scenes")] = UNSEEN_SEED,
    folder: Annotated[
        Path, typer.Option(help="config.json, model.safetensors, tokenizer.json")
    ] = WEIGHTS_FOLDER,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    small: Annotated[bool, typer.Option(help="small things instead, with many crops and with one")] = False,
    talk: Annotated[
        bool, typer.Option(help="conversations instead: two pictures, follow-ups, system messages")
    ] = False,
) -> None:
    """Examine a checkpoint with the plain torch answerer and print the figures as JSON."""
    import torch

    from pocket.answerer import TorchAnswerer

    torch.set_num_threads(1)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    config = NetworkConfig.read(folder / "config.json").vision
    if talk:
        from pocket.examine_talk import examine_talk

        print(json.dumps(examine_talk(TorchAnswerer(folder, dtype), num_scenes, config), indent=1))
        return
    if not small:
        print(json.dumps(evaluate(TorchAnswerer(folder, dtype), num_scenes, seed, config), indent=1))
        return
    for max_crops in (config.max_crops, 1):
        figures = evaluate_small(TorchAnswerer(folder, dtype, max_crops), num_scenes, seed + 1, config)
        print(json.dumps({"max_crops": max_crops, **figures}))


if __name__ == "__main__":
    typer.run(main)
