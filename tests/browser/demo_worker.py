"""What the fake worker says to the page: canned answers by question, paced like a small model on a CPU."""

from __future__ import annotations

import msgspec

from shared import protocol as wire
from shared.errors import FinishReason
from tests.fake_worker import CARD, Action, End, FakeWorker, Token, Wait, ids_text, text_ids

ANSWERS = {
    "what is in": "a red circle, a blue star and a green triangle",
    "how many": "3",
    "where": "top left",
    "is there": "yes",
    "what color": "blue",
    "largest": "a red circle",
    "endless": "bead " * 400,
}
BOXES = [(0.27, 0.31, 0.2, 0.2), (0.7, 0.36, 0.16, 0.16), (0.45, 0.74, 0.22, 0.2)]

DEMO_CARD = msgspec.structs.replace(
    CARD,
    model_id="pocket",
    description="A vision-language model of three million parameters, trained on drawn scenes of coloured shapes.",
    default_max_tokens=512,
    capabilities=[one for one in CARD.capabilities if one != "segment"],
)


def answer_to(submit: wire.Submit) -> str:
    """The canned answer to a question or caption."""
    asked = ids_text(wire.unpack_i32(submit.prompt).tolist()).lower()
    for start, answer in ANSWERS.items():
        if start in asked:
            return answer
    return "a red circle at the top left, a blue star at the right and a green triangle at the bottom"


def script(submit: wire.Submit, *, gap_s: float = 0.012, first_s: float = 0.05) -> list[Action]:
    """Paced tokens; one stall in the middle of a long answer, so that a bubble can be seen."""
    actions: list[Action] = [Wait(first_s)]
    if submit.task == "text":
        ids = text_ids(answer_to(submit))[: submit.max_tokens]
        for index, token_id in enumerate(ids):
            actions += [Token(token_id), Wait(gap_s * (9 if index == 17 else 1))]
        return [*actions, End(FinishReason.STOP if len(ids) < submit.max_tokens else FinishReason.LENGTH)]
    for x, y, width, height in BOXES:
        actions += [Token(CARD.coord_id, [x]), Wait(gap_s), Token(CARD.coord_id, [y]), Wait(gap_s)]
        if submit.task == "detect":
            actions += [Token(CARD.size_id, [width, height]), Wait(gap_s)]
    return [*actions, Token(CARD.eos_ids[0]), End()]


def demo_worker() -> FakeWorker:
    """A fake worker that answers as above."""
    worker = FakeWorker(card=DEMO_CARD)
    worker.script = script
    return worker
