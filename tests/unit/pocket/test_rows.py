"""What training lays into a row is what a conversation is served as; questions about two pictures are true. Test process."""

import json
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from gateway.api.query_turns import QueryTurn, compose_turns
from pocket.answerer import TorchAnswerer
from pocket.answers import Request, Turn
from pocket.examine_talk import draw_talk
from pocket.follow_ups import FollowUps, after_system
from pocket.network import NetworkConfig
from pocket.objective import attention_mask
from pocket.pairs import PAIR_KINDS, PairQuestioner
from pocket.phrases import Ask, matching
from pocket.questions import Questioner
from pocket.rows import RowDrawing
from pocket.scenes import Scene, Thing, scene_rng
from pocket.segments import MAX_SEGMENTS, Segment, empty_rows, fill_row, make_segment, picture_segment
from pocket.tokenizer import load_tokenizer
from pocket.train import WEIGHTS_FOLDER
from tests.unit.gateway.api.fake_core import FakeCore, FakeModel
from worker.formats.source import Source
from worker.models.moondream_card import make_card
from worker.models.moondream_config import parse_config
from worker.schedule.intake import blocks_of
from worker.schedule.sequence import Picture, Run

FILE = WEIGHTS_FOLDER / "config.json"
CONFIG = NetworkConfig.read(FILE)
TOKENIZER = load_tokenizer(WEIGHTS_FOLDER / "tokenizer.json")
PICTURE_TOKENS = CONFIG.num_prefix - 1


def thing(name: str, x: float, y: float) -> Thing:
    color, shape = name.split()
    return Thing(color, shape, x - 0.1, y - 0.1, x + 0.1, y + 0.1)


BLANK = Image.new("RGB", (98, 98), "white")
FIRST = Scene(
    BLANK, (thing("red circle", 0.2, 0.2), thing("blue square", 0.5, 0.8), thing("red star", 0.8, 0.2))
)
SECOND = Scene(BLANK, (thing("green circle", 0.2, 0.5), thing("black circle", 0.8, 0.5)))


class PocketModel(FakeModel):
    """The embedded model's card and tokenizer."""

    async def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        return list(TOKENIZER.encode(text).ids)


def served_model() -> PocketModel:
    content = json.loads(FILE.read_text())
    source = SimpleNamespace(
        path=WEIGHTS_FOLDER, settings_file=FILE, config=content, model_id="pocket", created=0
    )
    return PocketModel(make_card(parse_config(content, FILE), cast(Source, source)))


async def test_a_row_is_the_conversation_as_it_is_served() -> None:
    """Ids, positions and what sees what, of three pictures in two turns, a follow-up and a system message."""
    model = served_model()
    turns = [
        ("Which picture has more circles?", 2, "the second"),
        ("and how many are red?", 0, "2"),
        ("what is this", 1, ""),
    ]
    messages = [QueryTurn("system", "Be brief.", 0)]
    for text, num, answer in turns:
        messages += [QueryTurn("user", text, num), QueryTurn("assistant", answer, 0)]
    urls = [(f"data:{number}", "messages") for number in range(3)]
    ids, images = await compose_turns(FakeCore(), model, messages[:-1], urls)

    segments: list[Segment] = []
    for number, (text, num, answer) in enumerate(turns):
        for _ in range(num):
            segments.append(picture_segment(PICTURE_TOKENS, len(segments) - 1 if segments else None))
        ask = Ask("query", "", f"Be brief.\n\n{text}" if number == 0 else text, answer)
        rng = cast(Any, SimpleNamespace(random=lambda: 0.5))  # two answer marks, as they are served
        segments.append(make_segment(ask, TOKENIZER, CONFIG.tokenizer["templates"], rng, len(segments) - 1))
    rows = empty_rows(1, 512)
    fill_row(rows, 0, segments)
    filled = rows["segments"][0] > 0
    length = int(filled.sum())
    assert [
        i for i, kind in zip(rows["ids"][0, filled], rows["kinds"][0, filled], strict=True) if kind != 3
    ] == ids
    assert (rows["positions"][0, filled] == np.arange(length)).all()

    runs, before = [], 0
    for image in images:
        runs.append(Run(image.spec.runs[0][0] + before, PICTURE_TOKENS, 0))
        before += PICTURE_TOKENS
    assert (rows["kinds"][0, filled] == 3).nonzero()[0].tolist() == [
        run.position + i for run in runs for i in range(PICTURE_TOKENS)
    ]
    expected = np.tri(length, dtype=bool)
    for first, end in blocks_of(model.card.image, [Picture((run,), [], [], b"") for run in runs]):
        expected[first:end, first:end] = True
    assert (seen(rows)[:length, :length] == expected).all()


def seen(rows: dict[str, NDArray[Any]], row: int = 0) -> NDArray[np.bool_]:
    """(positions, positions): who sees whom in a row."""
    mask = attention_mask(torch.from_numpy(rows["segments"]), torch.from_numpy(rows["sees"]), torch.float32)
    return cast(NDArray[np.bool_], (mask[row, 0] == 0).numpy())


@pytest.mark.parametrize("pictures", [1, 2])
def test_a_row_has_room_for_what_it_asks(pictures: int) -> None:
    for index in range(12):
        drawing = RowDrawing(scene_rng(8, index), TOKENIZER, CONFIG, 224)
        segments = drawing.one(FIRST) if pictures == 1 else drawing.two(FIRST, SECOND)
        assert sum(segment.kinds[-1] == 3 for segment in segments) == pictures
        assert sum(len(segment.ids) for segment in segments) <= 224 and len(segments) <= MAX_SEGMENTS
        rows = empty_rows(1, 224)
        fill_row(rows, 0, segments)
        for number, segment in enumerate(segments):
            count = len(segment.ids)
            assert {
                len(v) for v in (segment.kinds, segment.values, segment.tokens, segment.coords, segment.sizes)
            } == {count}
            assert segment.parent is None or segment.parent < number
            # A position sees as many others as its sequence had before it, or up to the end of its picture.
            own = (rows["segments"][0] == number + 1).nonzero()[0]
            last = rows["positions"][0, own[-1]]
            wanted = [last if segment.both_ways else p for p in rows["positions"][0, own]]
            assert seen(rows)[own].sum(1).tolist() == [p + 1 for p in wanted]


def test_comparisons_of_two_pictures_are_true() -> None:
    circles = (None, "circle")
    asked = set()
    for index in range(40):
        pairs = PairQuestioner((FIRST, SECOND), scene_rng(9, index), together=True)
        for kind in PAIR_KINDS:
            drawn = pairs.draw(kind)
            asked.add(kind) if drawn is not None else None
        more = pairs.more(*circles, again=True)
        fewer = pairs.more(*circles, again=False)
        assert more is not None and more.ask.answer == "the second"
        assert fewer is not None and fewer.ask.answer == "the first"
        count = pairs.count()
        other = count.again() if count.again is not None else None
        assert other is not None and int(count.ask.answer) + int(other.ask.answer) <= 5
        assert pairs.both().ask.answer == (
            "first: a red circle, a blue square and a red star; second: a green circle and a black circle"
        )
    assert asked == set(PAIR_KINDS)


def test_follow_ups_keep_what_was_asked_and_change_what_they_name() -> None:
    circles = Ask("query", "count", "how many circles", "1", shape="circle", found=FIRST.things[:1])
    kinds = set()
    for index in range(60):
        follow = FollowUps(Questioner(FIRST, scene_rng(10, index)))
        then = follow.draw(circles)
        if then is None:
            continue
        kinds.add(then.kind)
        if then.kind == "then count":
            assert then.answer == str(len(matching(FIRST.things, then.color, then.shape)))
            assert then.shape == "circle" or then.color is None
        elif then.kind == "then color it":
            assert then.answer == "red"
        else:
            assert (then.kind, then.answer) == ("then place it", "top left")
    assert kinds == {"then count", "then color it", "then place it"}
    told = after_system(circles, scene_rng(11, 0))
    assert told.text.endswith("\n\nhow many circles") and told.answer == "1"


def test_an_examination_of_talk_follows_from_its_seed() -> None:
    once, again = (draw_talk(CONFIG.vision, 2, 5) for _ in range(2))
    assert once.kinds == again.kinds and once.answers == again.answers
    assert all(turns[-1].answer == "" and turns[0].images for turns in once.conversations)
    assert {"pair in turns", "newest picture", "later question", "behind a system message"} <= set(once.kinds)


def test_a_conversation_of_one_question_is_that_question() -> None:
    answerer = TorchAnswerer(WEIGHTS_FOLDER)
    picture = Image.new("RGB", (98, 98), "white")
    picture.paste((215, 40, 40), (20, 20, 60, 60))
    ask = "What color is the square?"
    assert answerer.converse_all([(Turn(ask, (picture,)),)]) == answerer.answer_all(
        [Request("query", picture, ask)]
    )
