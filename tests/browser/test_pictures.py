"""Pictures in a conversation, thoughts as they come, and what a model finds drawn over a picture, in a real browser."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from playwright.sync_api import Page, Route, expect

from tests.browser.chat_worker import chat_worker
from tests.browser.conftest import Visit
from tests.browser.demo_worker import BOXES
from tests.browser.picture_worker import (
    OUTLINE_CARD,
    PAIR_CARD,
    THOUGHT,
    grounded_worker,
    thinking_worker,
)
from tests.browser.test_chat import say
from tests.browser.test_page import contrast, pick_task
from tests.fake_worker import FakeWorker
from tests.gateway_thread import GatewayThread

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SHOTS = os.environ.get("DEGAS_SCREENSHOTS")
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


def shoot(page: Page, name: str) -> None:
    """Keep a screenshot where DEGAS_SCREENSHOTS names a folder."""
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"pictures-{name}.png")


@pytest.fixture
def serve(visit: Callable[..., Visit]) -> Iterator[Callable[..., Page]]:
    """Serve a worker and open its page; complaints of the browser fail the test."""
    running: list[FakeWorker | GatewayThread] = []
    visits: list[Visit] = []

    def opened(worker: FakeWorker, **context: object) -> Page:
        running.append(worker)
        worker.start()
        gateway = GatewayThread(workers=[worker.endpoint])
        running.append(gateway)
        gateway.__enter__()
        gateway.wait_ready()
        visits.append(visit(gateway.url, **context))
        visits[-1].page.wait_for_selector('#status[data-state="ready"]')
        return visits[-1].page

    yield opened
    for one in reversed(running):
        one.__exit__(None, None, None)
    assert [complaint for one in visits for complaint in one.complaints] == []


def write_pictures(folder: Path, count: int) -> list[Path]:
    """Small pictures of different proportions."""
    image = pytest.importorskip("PIL.Image")
    draw = pytest.importorskip("PIL.ImageDraw")
    files = []
    for i in range(count):
        picture = image.new("RGB", (640, 420 + 90 * i), (236, 230, 215))
        pen = draw.Draw(picture)
        for j in range(i + 2):
            pen.ellipse((60 + 150 * j, 90 + 40 * j, 180 + 150 * j, 210 + 40 * j), fill=(200, 70 + 60 * i, 60))
        files.append(folder / f"picture-{i}.png")
        picture.save(files[-1])
    return files


def to_chat(page: Page) -> None:
    """From the easel to the conversation."""
    page.locator('input[name="view"][value="chat"]').check(force=True)
    expect(page.locator("#chat-view")).to_be_visible()


# ---------------------------------------------------------------- several pictures


def test_several_pictures_go_along_in_their_order(serve: Callable[..., Page], tmp_path: Path) -> None:
    worker = chat_worker(PAIR_CARD)
    page = serve(worker)
    page.set_input_files("#attach-file", write_pictures(tmp_path, 3))
    thumbs = page.locator("#attached li")
    expect(thumbs).to_have_count(3)
    expect(page.locator("#attach")).to_be_disabled()  # the model takes three
    page.get_by_role("button", name="Remove picture 3").click()
    expect(thumbs).to_have_count(2)
    expect(page.locator("#message")).to_be_focused()
    shoot(page, "attached")
    exchange = say(page, "Which has more circles?")
    assert len(worker.submits[0].images) == 2
    assert worker.submits[0].images[0].digest != worker.submits[0].images[1].digest
    expect(exchange.locator("figure figcaption")).to_have_text(["1", "2"])
    expect(page.get_by_role("img", name="Your picture 2 of 2")).to_be_visible()
    expect(page.locator("#attached")).to_be_hidden()
    shoot(page, "several")
    page.set_input_files("#attach-file", write_pictures(tmp_path, 2))
    say(page, "And of these?")
    assert len(worker.submits[1].images) == 3, "no more than the model takes: the newest"
    expect(page.locator(".exchange").first.locator("figure.unsent")).to_have_count(1)
    page.reload()
    expect(page.locator(".asked-lost").first).to_have_text("2 pictures went along; they were not kept.")


def test_too_many_pictures_are_told_and_the_first_are_kept(
    serve: Callable[..., Page], tmp_path: Path
) -> None:
    page = serve(chat_worker(PAIR_CARD))
    page.set_input_files("#attach-file", write_pictures(tmp_path, 5))
    expect(page.locator("#attached li")).to_have_count(3)
    expect(page.locator("#chat-notice-words")).to_have_text("This model takes at most 3 pictures.")


# ---------------------------------------------------------------- thinking


def test_a_thought_is_folded_and_fills(serve: Callable[..., Page]) -> None:
    worker = thinking_worker()
    page = serve(worker)
    exchange = say(page, "What is the capital of France?", ends="streaming")
    thinking = exchange.locator(".thinking")
    expect(thinking).to_have_attribute("data-state", "thinking")
    expect(thinking.locator("summary")).to_contain_text("Thinking")
    expect(thinking.locator(".thinking-text")).to_be_hidden()
    thinking.locator("summary").click()
    expect(thinking.locator(".thinking-text")).to_contain_text("The user asks")
    shoot(page, "thinking")
    expect(exchange).to_have_attribute("data-state", "done")
    expect(thinking).to_have_attribute("data-state", "thought")
    expect(thinking.locator(".thinking-count")).to_have_text(re.compile(r"^\d+ tokens, [\d.]+ m?s$"))
    expect(thinking.locator(".thinking-text")).to_contain_text(THOUGHT)
    expect(exchange.locator(".prose")).to_have_text("The capital of France is Paris.")
    expect(page.locator("#said")).to_have_text("The capital of France is Paris.")
    say(page, "And of Spain?")
    page.reload()
    expect(page.locator(".thinking").first).to_have_attribute("data-state", "thought")
    expect(page.locator(".thinking-text").first).to_contain_text(THOUGHT)


def test_thinking_can_be_turned_off(serve: Callable[..., Page]) -> None:
    page = serve(thinking_worker())
    page.click("#settings-toggle")
    page.select_option("#thinking-choice", "none")
    expect(page.locator("#settings-count")).to_have_text("1")
    exchange = say(page, "What is the capital of France?")
    expect(exchange.locator(".thinking")).to_be_hidden()
    expect(exchange.locator(".prose")).to_have_text("The capital of France is Paris.")


def test_a_model_that_does_not_think_offers_nothing_of_it(serve: Callable[..., Page]) -> None:
    page = serve(chat_worker())
    page.click("#settings-toggle")
    expect(page.locator("#thinking-choice")).to_be_hidden()
    expect(say(page, "Hello").locator(".thinking")).to_be_hidden()


def test_the_answer_does_not_jump_while_it_streams(serve: Callable[..., Page]) -> None:
    """What was written stays where it stands: nothing above it grows or goes, from the first word to the last."""
    page = serve(thinking_worker())
    page.evaluate(
        """() => {
          window.tops = new Set();
          const look = () => {
            const prose = document.querySelector(".prose"), head = document.querySelector(".asked");
            if (prose?.textContent) window.tops.add(prose.getBoundingClientRect().top - head.getBoundingClientRect().top);
            requestAnimationFrame(look);
          };
          look();
        }"""
    )
    say(page, "What is the capital of France?")
    assert page.evaluate("window.tops.size") == 1


# ---------------------------------------------------------------- over the picture


# Keeps how many marks were lit at a time, in the order in which that came.
NOTE_LIT = """() => {
  window.lit = [];
  new MutationObserver(() => {
    const count = document.querySelectorAll("#marks.some-lit .mark.lit").length;
    if (count && !window.lit.includes(count)) window.lit.push(count);
  }).observe(document.body, {subtree: true, childList: true, attributes: true});
}"""


def test_a_thought_lights_what_it_points_at(serve: Callable[..., Page]) -> None:
    page = serve(grounded_worker())
    page.locator("#think").check()
    page.evaluate(NOTE_LIT)
    page.fill("#question", "How many shapes are there?")
    page.click("#send")
    card = page.locator(".card").first
    expect(card).to_have_attribute("data-state", "done")
    assert page.evaluate("window.lit") == [1, 2]  # what the words point at, while they come
    card.locator("summary").click()
    expect(card.locator(".answer")).to_have_text("Three")
    expect(card.locator(".pointing")).to_have_text(["a red circle", "two other shapes"])
    expect(page.locator("#marks .mark-point")).to_have_count(3)
    expect(page.locator("#marks .lit")).to_have_count(0)
    card.locator(".pointing").nth(1).focus()
    expect(page.locator("#marks.some-lit .mark.lit")).to_have_count(2)
    shoot(page, "lit")
    page.locator("#question").focus()
    expect(page.locator("#marks .lit")).to_have_count(0)
    page.click("#send")  # another card's marks take the place of these, and come back with the card
    expect(page.locator(".card").first).to_have_attribute("data-state", "done")
    page.locator(".card").nth(1).focus()
    page.locator(".card").nth(1).locator(".pointing").first.focus()
    expect(page.locator("#marks.some-lit .mark.lit")).to_have_count(1)


def test_boxes_over_a_picture_of_the_conversation(serve: Callable[..., Page], tmp_path: Path) -> None:
    worker = grounded_worker()
    page = serve(worker)
    to_chat(page)
    expect(page.locator("#answer-kind-line")).to_be_hidden()
    page.get_by_role("button", name="Take the drawing").click()
    page.set_input_files("#attach-file", write_pictures(tmp_path, 1))
    page.select_option("#answer-kind", "detect")
    shoot(page, "kinds")
    exchange = say(page, "circle")
    assert worker.submits[0].task == "detect" and len(worker.submits[0].images) == 1
    expect(exchange.locator(".prose")).to_have_text("3 boxes")
    overlay = page.locator(".exchange").first.locator("figure").nth(1).locator(".marks")
    expect(overlay.locator(".mark-box")).to_have_count(3)
    expect(page.locator("figure").first.locator(".mark")).to_have_count(0)
    box, picture = overlay.locator(".mark-box .line").first.bounding_box(), overlay.bounding_box()
    assert box is not None and picture is not None
    x, y, width, height = BOXES[0]
    assert (box["x"] + box["width"] / 2 - picture["x"]) / picture["width"] == pytest.approx(x, abs=0.02)
    assert (box["y"] + box["height"] / 2 - picture["y"]) / picture["height"] == pytest.approx(y, abs=0.02)
    assert box["width"] / picture["width"] == pytest.approx(width, abs=0.05)
    assert box["height"] / picture["height"] == pytest.approx(height, abs=0.05)
    shoot(page, "boxes")
    page.select_option("#answer-kind", "query")
    say(page, "What is in the second one?")
    assert len(worker.submits[1].images) == 2, "pictures of a turn that was answered in boxes go along later"
    page.select_option("#answer-kind", "point")
    say(page, "circle")
    expect(overlay.locator(".mark-point")).to_have_count(3)
    expect(overlay.locator(".mark-box")).to_have_count(0)
    page.locator(".exchange").first.hover()
    expect(overlay.locator(".mark-box")).to_have_count(3)
    page.select_option("#answer-kind", "think")
    exchange = say(page, "How many?")
    expect(exchange.locator(".prose")).to_have_text("Three")
    expect(exchange.locator(".pointing")).to_have_count(2)


PATH = "M 0 0.5 L 0.5 0 L 1 0.5 L 0.5 1 Z"


def answer_outline(route: Route) -> None:
    """As Moondream's own server streams an outline."""
    bbox = {"x_min": 0.2, "y_min": 0.1, "x_max": 0.7, "y_max": 0.6}
    events: list[dict[str, object]] = [{"type": "bbox", "bbox": bbox}]
    events += [{"type": "path_delta", "chunk": f"{piece} ", "completed": False} for piece in PATH.split()]
    metrics = {"input_tokens": 740, "output_tokens": 12}
    events.append(
        {
            "type": "final",
            "path": PATH,
            "bbox": bbox,
            "completed": True,
            "finish_reason": "stop",
            "metrics": metrics,
        }
    )
    body = b"".join(b"data: " + msgspec.json.encode(event) + b"\n\n" for event in events)
    route.fulfill(status=200, content_type="text/event-stream", body=body)


def test_an_outline_is_drawn_in_its_box(serve: Callable[..., Page]) -> None:
    page = serve(grounded_worker(OUTLINE_CARD))
    page.route("**/v1/segment", answer_outline)
    pick_task(page, "segment")
    page.fill("#question", "red circle")
    page.click("#send")
    card = page.locator(".card").first
    expect(card).to_have_attribute("data-state", "done")
    expect(card.locator(".answer")).to_have_text("Outlined")
    shape = page.locator("#marks .mark-outline .line")
    expect(shape).to_have_attribute("d", PATH)
    box, picture = shape.bounding_box(), page.locator("#marks").bounding_box()
    assert box is not None and picture is not None
    assert (box["x"] - picture["x"]) / picture["width"] == pytest.approx(0.2, abs=0.02)
    assert box["width"] / picture["width"] == pytest.approx(0.5, abs=0.02)
    shoot(page, "outline")


def test_without_the_capability_there_is_no_outline(serve: Callable[..., Page]) -> None:
    page = serve(grounded_worker())
    expect(page.locator('label:has(input[value="segment"])')).to_be_hidden()
    to_chat(page)
    page.get_by_role("button", name="Take the drawing").click()
    expect(page.locator('#answer-kind option[value="detect"]')).to_have_count(1)
    expect(page.locator('#answer-kind option[value="segment"]')).to_have_count(0)


WRITTEN = {
    "M 0 0 L 1 ": "M 0 0 ",
    "M 0 0 L 1 1 L 0.": "M 0 0 L 1 1 ",
    "M 0 0 L 1 1 Z": "M 0 0 L 1 1 Z",
    "M": "",
    "M 0 0": "",
    "": "",
    "0.5 0.5": "",
    'M 0 0" onload="hack()': "",
}
"""An outline as it is being written, and what of it may be drawn."""


def test_an_outline_is_drawn_up_to_its_last_whole_command(serve: Callable[..., Page]) -> None:
    page = serve(chat_worker())
    drawn = page.evaluate(
        "async (paths) => { const { drawable } = await import(new URL('marks.js', document.baseURI)); return paths.map(drawable); }",
        list(WRITTEN),
    )
    assert dict(zip(WRITTEN, drawn, strict=True)) == WRITTEN


# ---------------------------------------------------------------- how it looks


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_thoughts_and_kinds_stand_out_in_both_schemes(
    serve: Callable[..., Page], scheme: str, tmp_path: Path
) -> None:
    page = serve(grounded_worker(), color_scheme=scheme)
    to_chat(page)
    page.set_input_files("#attach-file", write_pictures(tmp_path, 2))
    page.select_option("#answer-kind", "think")
    exchange = say(page, "How many shapes are there?")
    exchange.locator("summary").click()
    shoot(page, f"thought-{scheme}")
    for selector in (
        ".thinking-words",
        ".thinking-count",
        ".thinking-text",
        ".pointing",
        ".answer-kind",
        ".seen figcaption",
        "#answer-kind",
    ):
        assert contrast(page, selector) >= 4.5, f"{selector} is hard to read in {scheme}"


def test_a_phone_fits_pictures_and_thoughts(serve: Callable[..., Page], tmp_path: Path) -> None:
    page = serve(grounded_worker(), **PHONE)
    to_chat(page)
    page.set_input_files("#attach-file", write_pictures(tmp_path, 3))
    page.select_option("#answer-kind", "think")
    shoot(page, "phone-composer")
    exchange = say(page, "How many shapes are there?")
    exchange.locator("summary").tap()
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    for selector in ("#attach", "#attach-drawing", "#chat-send", "#new-chat", ".thinking-text"):
        box = page.locator(selector).first.bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 360 - 8, selector
    shoot(page, "phone-thought")


def test_pictures_and_thoughts_by_keyboard(serve: Callable[..., Page], tmp_path: Path) -> None:
    page = serve(grounded_worker())
    to_chat(page)
    page.set_input_files("#attach-file", write_pictures(tmp_path, 1))
    expect(
        page.locator("#answer-kind")
    ).to_be_visible()  # once the picture is read; the focus may have been there before
    expect(page.locator("#message")).to_be_focused()  # as soon as the picture is read
    for name in ("answer-kind", "attached-remove"):
        page.keyboard.press("Shift+Tab")
        assert name in page.evaluate("document.activeElement.id + document.activeElement.className")
    page.select_option("#answer-kind", "think")
    page.fill("#message", "How many?")
    page.keyboard.press("Enter")
    exchange = page.locator(".exchange").last
    expect(exchange).to_have_attribute("data-state", "done")
    exchange.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(exchange.locator(".thinking-text")).to_be_visible()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(exchange.locator(".pointing").first).to_be_focused()
    expect(exchange.locator(".marks .lit")).to_have_count(1)
