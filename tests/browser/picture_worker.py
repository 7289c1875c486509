"""Fake workers that think, point, box and outline, paced so that a browser sees them at it."""

from __future__ import annotations

import msgspec

from shared import protocol as wire
from tests.browser.chat_worker import CHAT_CARD, SEEING_CARD, prompt_of
from tests.browser.demo_worker import BOXES, DEMO_CARD
from tests.fake_worker import CARD, Action, End, FakeWorker, Token, Wait, text_ids

THINKING_TEMPLATE = b"""\
{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>
{% endfor %}<assistant>{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"""
THOUGHT = (
    "The user asks for a capital. France has had several seats of government, Versailles among them, but "
    "its capital is Paris. One short sentence is enough, and the name may be set in bold."
)
GROUND, END_GROUND, ANSWER = 7, 9, 3
OUTLINE_CARD = msgspec.structs.replace(
    DEMO_CARD, model_id="tracer", capabilities=[*DEMO_CARD.capabilities, "segment"]
)
assert CARD.image is not None
PAIR_CARD = msgspec.structs.replace(
    SEEING_CARD, model_id="pair", image=msgspec.structs.replace(CARD.image, max_images=3)
)


def spoken(text: str, gap_s: float = 0.004) -> list[Action]:
    """Text, a token at a time."""
    return [action for token_id in text_ids(text) for action in (Token(token_id), Wait(gap_s))]


def grounded_answer(submit: wire.Submit, *, gap_s: float = 0.006) -> list[Action]:
    """A thought with two pieces that point, then the answer; boxes and points where those are asked for."""
    if submit.task in ("detect", "point"):
        found: list[Action] = [Wait(0.03)]
        for x, y, width, height in BOXES:
            found += [Token(CARD.coord_id, [x]), Token(CARD.coord_id, [y])]
            if submit.task == "detect":
                found += [Token(CARD.size_id, [width, height])]
            found.append(Wait(gap_s))
        return [*found, Token(CARD.eos_ids[0]), End()]
    if submit.task != "reason":
        return [Wait(0.03), *spoken("Three shapes, well apart.", gap_s), End()]
    actions: list[Action] = [Wait(0.03), *spoken("There is ", gap_s)]
    for piece, places in (("a red circle", BOXES[:1]), ("two other shapes", BOXES[1:])):
        actions += [Token(GROUND), *spoken(piece, gap_s)]
        for x, y, *_ in places:
            actions += [Token(CARD.coord_id, [x]), Token(CARD.coord_id, [y]), Wait(gap_s)]
        actions += [Token(END_GROUND), *spoken(" and " if len(places) == 1 else ": three in all.", gap_s)]
    return [*actions, Token(ANSWER), Token(ANSWER), *spoken("Three", gap_s), End()]


def grounded_worker(card: wire.ModelCard = DEMO_CARD) -> FakeWorker:
    """A Moondream-family model that thinks before it answers."""
    worker = FakeWorker(card=card)
    worker.script = grounded_answer
    return worker


def thinking_worker() -> FakeWorker:
    """A text model with marks around its thoughts."""
    worker = FakeWorker(
        card=msgspec.structs.replace(CHAT_CARD, model_id="thinker"), chat_template=THINKING_TEMPLATE
    )

    def think(submit: wire.Submit) -> list[Action]:
        is_brief = prompt_of(submit).endswith("<think></think>")
        thought = "" if is_brief else f"<think>\n{THOUGHT}\n</think>\n\n"
        return [Wait(0.03), *spoken(thought, 0.002), *spoken("The capital of France is **Paris**."), End()]

    worker.script = think
    return worker
