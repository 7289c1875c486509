"""Owns the held-out examination in conversations: two pictures, follow-ups and system messages; evaluation process.

Every conversation ends with the question that is scored; what stands before it was answered rightly. The answer has to be
right to the letter, as in `pocket.evaluate`.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image

from pocket.answers import Conversation, Turn
from pocket.follow_ups import FollowUps, after_system
from pocket.network import VisionConfig
from pocket.pairs import PAIR_KINDS, PairQuestioner
from pocket.phrases import Ask
from pocket.questions import QUERY_KINDS, Questioner
from pocket.scenes import Scene, draw_scene, scene_rng

UNSEEN_SEED = 990_003  # that of `pocket.evaluate` and the next are taken


class Converses(Protocol):
    """What can be examined: the answers to the last question of each conversation."""

    def converse_all(self, conversations: Sequence[Conversation]) -> list[str]: ...


class _Exam:
    """Conversations with the one right end of each, by kind."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.answers: list[str] = []
        self.conversations: list[Conversation] = []

    def put(self, kind: str, told: Conversation, ask: Ask, images: tuple[Image.Image, ...] = ()) -> None:
        """A question behind what was told, unless its answer is a matter of taste."""
        if ask.settled:
            self.kinds.append(kind)
            self.answers.append(ask.answer)
            self.conversations.append((*told, Turn(ask.text, images)))


def draw_talk(config: VisionConfig, num_scenes: int, seed: int) -> _Exam:
    """Of each of `num_scenes` pairs of scenes: every kind about two pictures, in one turn and in two; and follow-ups."""
    exam = _Exam()
    for index in range(num_scenes):
        rng = scene_rng(seed, index)
        first, second = draw_scene(rng, config), draw_scene(rng, config)
        _put_follow_ups(exam, Questioner(first, rng), first)
        both = (first.picture, second.picture)
        opening = _opening(Questioner(first, rng), first)
        for kind in PAIR_KINDS:
            pair = PairQuestioner((first, second), rng, together=True).draw(kind)
            if pair is not None:
                exam.put(pair.ask.kind, (), pair.ask, both)
                again = pair.again() if pair.again is not None else None
                if again is not None:
                    exam.put(again.ask.kind, (Turn(pair.ask.text, both, pair.ask.answer),), again.ask)
            later = PairQuestioner((first, second), rng, together=False).draw(kind)
            if later is not None:
                exam.put("pair in turns", opening, later.ask, (second.picture,))
        newest = Questioner(second, rng)
        for kind in QUERY_KINDS:
            ask = newest.draw(kind)
            if ask is not None:
                exam.put("newest picture", opening, ask, (second.picture,))
    return exam


def _opening(questioner: Questioner, scene: Scene) -> Conversation:
    ask = questioner.draw("count")
    assert ask is not None
    return (Turn(ask.text, (scene.picture,), ask.answer),)


def _put_follow_ups(exam: _Exam, questioner: Questioner, scene: Scene) -> None:
    following = FollowUps(questioner)
    for kind in QUERY_KINDS:
        ask = questioner.draw(kind)
        if ask is None:
            continue
        exam.put("behind a system message", (), after_system(ask, questioner.rng), (scene.picture,))
        told: Conversation = (Turn(ask.text, (scene.picture,), ask.answer),)
        whole = questioner.draw(QUERY_KINDS[int(questioner.rng.integers(len(QUERY_KINDS)))])
        if whole is not None:
            exam.put("later question", told, whole)
        for _ in range(2):
            then = following.draw(ask)
            if then is None:
                break
            exam.put(then.kind, told, then)
            told = (*told, Turn(then.text, (), then.answer))
            ask = then


def examine_talk(
    answer: Converses, num_scenes: int, config: VisionConfig, seed: int = UNSEEN_SEED
) -> dict[str, Any]:
    """Shares of right answers: `pairs` about two pictures of one turn, `then` to follow-ups, and of each kind; `n` asked."""
    exam = draw_talk(config, num_scenes, seed)
    replies = answer.converse_all(exam.conversations)
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for kind, right, reply in zip(exam.kinds, exam.answers, replies, strict=True):
        by_kind[kind].append(reply.strip() == right)

    def share(kinds: Sequence[str]) -> float:
        held = [one for kind in kinds for one in by_kind[kind]]
        return round(sum(held) / len(held), 4) if held else 0.0

    kinds = sorted(by_kind)
    # A follow-up about two pictures is scored with them.
    pairs = [kind for kind in kinds if kind.startswith("pair ") and kind != "pair in turns"]
    return {
        "pairs": share(pairs),
        "then": share([kind for kind in kinds if kind.startswith("then ")]),
        "n": len(replies),
        "by_kind": {kind: (share([kind]), len(by_kind[kind])) for kind in kinds},
    }
