"""The page in a real browser: draw, ask, watch, stop, by pointer and by keyboard, light and dark."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from shared.errors import ErrorCode
from tests.browser.conftest import Site, Visit
from tests.browser.demo_worker import demo_worker
from tests.fake_worker import Reject
from tests.gateway_thread import GatewayThread

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SHOTS = os.environ.get("DEGAS_SCREENSHOTS")


def shoot(page: Page, name: str) -> None:
    """Keep a screenshot where DEGAS_SCREENSHOTS names a folder."""
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}.png")


def pick_task(page: Page, task: str) -> None:
    """Choose what to do."""
    page.locator(f'input[name="task"][value="{task}"]').check(force=True)


def pixels(page: Page) -> str:
    """The picture as a data URL."""
    return str(page.locator("#picture").evaluate("canvas => canvas.toDataURL()"))


def test_page_loads_and_names_its_model(page: Page) -> None:
    expect(page.locator("#model-name")).not_to_be_empty()
    expect(page.locator("#status-text")).to_have_text("Ready")
    expect(page.locator("#honest")).to_contain_text("photographs")
    expect(page).to_have_title(re.compile("Degas"))
    shoot(page, "light")


def test_surprise_draws_another_scene_and_clear_wipes_it(page: Page) -> None:
    first = pixels(page)
    page.click("#surprise")
    second = pixels(page)
    assert second != first
    page.click("#clear")
    assert pixels(page) not in (first, second)
    expect(page.locator("#undo")).to_be_disabled()


def test_drawing_with_the_pointer_can_be_undone(page: Page) -> None:
    page.click("#clear")
    blank = pixels(page)
    page.locator('input[name="shape"][value="star"]').check(force=True)
    page.locator('input[name="colour"][value="blue"]').check(force=True)
    page.click("#picture", position={"x": 120, "y": 140})
    drawn = pixels(page)
    assert drawn != blank
    page.click("#undo")
    assert pixels(page) == blank


def test_a_question_is_answered_token_by_token(page: Page, site: Site) -> None:
    page.evaluate(
        """() => {
          window.lengths = [];
          const watch = new MutationObserver(() => {
            const answer = document.querySelector(".card .answer");
            if (answer) window.lengths.push(answer.textContent.length);
          });
          watch.observe(document.querySelector("#answers"), {childList: true, subtree: true, characterData: true});
        }"""
    )
    page.fill("#question", "What is in the picture?")
    page.click("#send")
    card = page.locator(".card").first
    expect(card).to_have_attribute("data-state", "done")
    expect(card.locator(".answer")).not_to_be_empty()
    expect(card.locator(".answer")).to_have_attribute("aria-busy", "false")
    lengths = set(page.evaluate("window.lengths"))
    assert len(lengths) > 3, "the answer appeared in one piece"
    expect(card.locator(".f-first")).to_have_text(re.compile(r"\d+(\.\d+)? m?s"))
    expect(card.locator(".f-rate")).to_have_text(re.compile(r"\d"))
    label = card.locator(".beads").get_attribute("aria-label")
    assert label is not None and label.startswith("First token after")
    if site.worker is not None:
        expect(card.locator(".answer")).to_have_text("a red circle, a blue star and a green triangle")
        assert len(site.worker.submits[0].images) == 1, "the picture went along"


@pytest.mark.parametrize("length", ["short", "normal", "long"])
def test_a_caption_in_each_length(page: Page, length: str) -> None:
    pick_task(page, "caption")
    page.locator(f'input[name="length"][value="{length}"]').check(force=True)
    page.click("#send")
    expect(page.locator(".card").first).to_have_attribute("data-state", "done")
    expect(page.locator(".card .answer").first).not_to_be_empty()


def test_boxes_are_drawn_on_the_picture(page: Page, site: Site) -> None:
    pick_task(page, "detect")
    page.fill("#question", "shapes")
    page.click("#send")
    card = page.locator(".card").first
    expect(card).to_have_attribute("data-state", "done")
    count = card.locator(".finds li").count()
    assert count >= 1
    expect(page.locator("#marks .mark-box")).to_have_count(count)
    if site.worker is not None:
        assert count == 3
        width, height = page.locator("#picture").evaluate("canvas => [canvas.width, canvas.height]")
        box = page.locator("#marks .mark-box rect.line").first
        assert float(box.get_attribute("x") or 0) == pytest.approx(0.17 * width, abs=0.5)
        assert float(box.get_attribute("height") or 0) == pytest.approx(0.2 * height, abs=0.5)
    shoot(page, "detect")
    page.click("#surprise")
    expect(page.locator("#marks .mark-box")).to_have_count(0)


def test_points_are_drawn_on_the_picture(page: Page) -> None:
    pick_task(page, "point")
    page.fill("#question", "shapes")
    page.keyboard.press("Enter")
    card = page.locator(".card").first
    expect(card).to_have_attribute("data-state", "done")
    expect(page.locator("#marks .mark-point")).to_have_count(card.locator(".finds li").count())


def test_stop_cancels_in_the_worker(page: Page, site: Site) -> None:
    worker = site.fake()
    page.fill("#question", "endless")
    page.click("#send")
    card = page.locator(".card").first
    expect(card).to_have_attribute("data-state", "streaming")
    card.locator(".stop").click()
    expect(card).to_have_attribute("data-state", "stopped")
    assert len(worker.wait_cancelled(1)) == 1
    shown = card.locator(".answer").text_content()
    page.wait_for_timeout(100)
    assert card.locator(".answer").text_content() == shown


def test_several_questions_at_once(page: Page, site: Site) -> None:
    page.locator(".chip.all").click()
    cards = page.locator(".card")
    expect(cards).to_have_count(6)
    if site.worker is not None:
        site.worker.wait_submits(6)
        shoot(page, "streaming")
    expect(page.locator('.card[data-state="done"]')).to_have_count(6)
    questions = {text.strip() for text in page.locator(".card-question").all_text_contents()}
    assert len(questions) == 6


def test_leaving_the_page_cancels_everything(site: Site, visit: Callable[..., Visit]) -> None:
    worker = site.fake()
    page = visit(site.url).page
    page.wait_for_selector('#status[data-state="ready"]')
    for _ in range(3):
        page.fill("#question", "endless")
        page.click("#send")
    worker.wait_submits(3)
    page.close()
    assert len(worker.wait_cancelled(3)) == 3


def test_everything_by_keyboard(page: Page) -> None:
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.locator("#picture").focus()
    before = pixels(page)
    for key in ("ArrowLeft", "ArrowLeft", "ArrowUp", "+", "Enter"):
        page.keyboard.press(key)
    assert pixels(page) != before
    page.keyboard.press("Control+z")
    assert pixels(page) == before
    page.locator('input[name="task"][value="query"]').focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#send")).to_have_text("Detect")
    page.keyboard.press("Tab")
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("shapes")
    page.keyboard.press("Enter")
    expect(page.locator(".card").first).to_have_attribute("data-state", "done")


def test_a_picture_can_be_opened(page: Page, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    file = tmp_path / "wide.png"
    image.new("RGB", (1200, 400), (40, 90, 220)).save(file)
    page.set_input_files("#file", file)
    page.wait_for_function("() => document.querySelector('#picture').width === 640")
    assert page.locator("#picture").evaluate("canvas => canvas.height") == 213
    page.fill("#question", "What is in the picture?")
    page.click("#send")
    expect(page.locator(".card").first).to_have_attribute("data-state", "done")


def test_a_file_that_is_no_picture_is_said_so(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "not.png"
    file.write_bytes(b"this is no picture")
    page.set_input_files("#file", file)
    expect(page.locator("#notice")).to_contain_text("not a picture")


def contrast(page: Page, selector: str) -> float:
    """The contrast of an element's text against the nearest opaque background."""
    return float(
        page.locator(selector).first.evaluate(
            """element => {
              const parse = (text) => text.match(/[\\d.]+/g).map(Number);
              const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
                .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
                .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
              let behind = element;
              let ground = parse(getComputedStyle(behind).backgroundColor);
              while (ground[3] === 0 && behind.parentElement) {
                behind = behind.parentElement;
                ground = parse(getComputedStyle(behind).backgroundColor);
              }
              const [a, b] = [light(parse(getComputedStyle(element).color)), light(ground)].sort((x, y) => y - x);
              return (a + 0.05) / (b + 0.05);
            }"""
        )
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(site: Site, visit: Callable[..., Visit], scheme: str) -> None:
    opened = visit(site.url, color_scheme=scheme)
    page = opened.page
    page.wait_for_selector('#status[data-state="ready"]')
    page.locator(".suggestions .chip").first.click()
    expect(page.locator(".card").first).to_have_attribute("data-state", "done")
    selectors = (".tagline", "#send", ".chip", ".limits", ".card-question", ".card-task", ".answer", ".figures dt",
                 ".figures dd", ".hint", ".honest li", ".again", "#surprise", "#clear", ".rose-text")  # fmt: skip
    for selector in selectors:
        assert contrast(page, selector) >= 4.5, f"{selector} is hard to read in {scheme}"
    shoot(page, f"answered-{scheme}")
    assert opened.complaints == []


def test_a_phone_shows_everything_without_sideways_scrolling(site: Site, visit: Callable[..., Visit]) -> None:
    opened = visit(site.url, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = opened.page
    page.wait_for_selector('#status[data-state="ready"]')
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0
    for selector in ("#clear", "#send", "#sizes", "#colours", "#tasks"):
        box = page.locator(selector).bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 360 - 8, selector
    page.tap("#surprise")
    page.tap("#send")
    expect(page.locator(".card").first).to_have_attribute("data-state", "done")
    shoot(page, "phone")
    assert opened.complaints == []


def test_reduced_motion_is_respected(site: Site, visit: Callable[..., Visit]) -> None:
    page = visit(site.url, reduced_motion="reduce").page
    page.wait_for_selector('#status[data-state="ready"]')
    page.click("#send")
    duration = page.locator(".card").first.evaluate("card => getComputedStyle(card).animationDuration")
    assert float(duration.removesuffix("s")) < 0.001


def test_a_full_queue_is_told_with_its_wait(page: Page, site: Site) -> None:
    worker = site.fake()
    worker.script = lambda _: [Reject(ErrorCode.QUEUE_FULL, "full", retry_after_s=2.0)]
    page.click("#send")
    card = page.locator(".card").first
    expect(card).to_have_attribute("data-state", "failed")
    expect(card.locator(".problem")).to_contain_text("Try again in")
    expect(card.locator(".again")).to_be_disabled()
    shoot(page, "queue-full")
    expect(card.locator(".again")).to_be_enabled()


def test_a_lost_worker_is_told_and_the_page_recovers(site: Site, visit: Callable[..., Visit]) -> None:
    worker = site.fake()
    page = visit(site.url).page
    page.wait_for_selector('#status[data-state="ready"]')
    page.fill("#question", "endless")
    page.click("#send")
    card = page.locator(".card").first
    expect(card).to_have_attribute("data-state", "streaming")
    worker.die()
    expect(card).to_have_attribute("data-state", "failed")
    expect(card.locator(".problem")).to_contain_text("worker")
    expect(page.locator("#status")).to_have_attribute("data-state", "waiting")
    shoot(page, "worker-lost")
    worker.restart()
    expect(page.locator("#status")).to_have_attribute("data-state", "ready")
    page.fill("#question", "How many shapes are there?")
    page.click("#send")
    expect(page.locator(".card").first).to_have_attribute("data-state", "done")


def test_a_server_with_keys_asks_for_one(visit: Callable[..., Visit]) -> None:
    with (
        demo_worker() as worker,
        GatewayThread(
            workers=[worker.endpoint], api_keys="correct-key-1", public="page,readiness"
        ) as gateway,
    ):
        gateway.wait_ready()
        page = visit(gateway.url).page
        expect(page.locator("#key-dialog")).to_be_visible()
        expect(page.locator("#studio-view")).to_be_hidden()
        shoot(page, "key")
        page.fill("#key", "wrong-key-1")
        page.keyboard.press("Enter")
        expect(page.locator("#key-error")).to_be_visible()
        page.fill("#key", "correct-key-1")
        page.keyboard.press("Enter")
        expect(page.locator("#key-dialog")).to_be_hidden()
        page.click("#send")
        expect(page.locator(".card").first).to_have_attribute("data-state", "done")
        assert page.evaluate("() => [localStorage.length, sessionStorage.length, document.cookie]") == [
            0,
            0,
            "",
        ]
        assert "correct-key-1" not in page.content()
