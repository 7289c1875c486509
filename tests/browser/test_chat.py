"""The conversation of a text model in a real browser: turns, settings, stop, edit, errors, and what the tab keeps."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from playwright.sync_api import Locator, Page, expect

from shared.errors import ErrorCode
from tests.browser.chat_worker import CHAT_CARD, SEEING_CARD, base_worker, chat_worker, prompt_of
from tests.browser.conftest import Site, Visit
from tests.browser.demo_worker import demo_worker
from tests.browser.test_page import contrast
from tests.fake_worker import FakeWorker, Reject
from tests.gateway_thread import GatewayThread

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SHOTS = os.environ.get("DEGAS_SCREENSHOTS")


def shoot(page: Page, name: str) -> None:
    """Keep a screenshot where DEGAS_SCREENSHOTS names a folder."""
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"chat-{name}.png")


@pytest.fixture
def chat_site() -> Iterator[Site]:
    """A server with a text model."""
    with chat_worker() as worker, GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_ready()
        yield Site(gateway.url, worker)


@pytest.fixture
def chat(chat_site: Site, visit: Callable[..., Visit]) -> Iterator[Page]:
    """Its page, ready; complaints of the browser (policy violations among them) fail the test."""
    opened = visit(chat_site.url)
    opened.page.wait_for_selector("#chat-view:not([hidden])")
    yield opened.page
    assert opened.complaints == []


def say(page: Page, text: str, *, ends: str | None = "done") -> Locator:
    """Send a message; returns its exchange, once that `ends` so."""
    page.fill("#message", text)
    page.click("#chat-send")
    exchange = page.locator(".exchange").last
    if ends is not None:
        expect(exchange).to_have_attribute("data-state", ends)
    return exchange


def test_a_text_model_gets_a_conversation_and_no_canvas(chat: Page) -> None:
    expect(chat.locator("#model-name")).to_have_text("chatty")
    expect(chat.locator("#studio-view")).to_be_hidden()
    expect(chat.locator("#views")).to_be_hidden()
    expect(chat.locator("#attach")).to_be_hidden()
    expect(chat.locator("#message")).to_be_focused()
    assert "shapes" not in chat.locator("body").inner_text()
    shoot(chat, "empty")


def test_an_answer_streams_in_with_its_figures(chat: Page) -> None:
    chat.evaluate(
        """() => {
          window.lengths = new Set();
          new MutationObserver(() => window.lengths.add(document.querySelector(".prose")?.textContent.length))
            .observe(document.querySelector("#exchanges"), {childList: true, subtree: true, characterData: true});
        }"""
    )
    exchange = say(chat, "Endless, please", ends="streaming")
    expect(exchange.locator(".answer")).to_have_attribute("aria-busy", "true")
    expect(chat.locator("#said")).to_be_empty()
    expect(exchange).to_have_attribute("data-state", "done")
    assert chat.evaluate("window.lengths.size") > 3, "the answer appeared in one piece"
    expect(exchange.locator(".answer")).to_have_attribute("aria-busy", "false")
    expect(chat.locator("#said")).to_contain_text("bead bead")
    expect(exchange.locator(".f-first")).to_have_text(re.compile(r"\d+(\.\d+)? m?s"))
    expect(exchange.locator(".f-rate")).to_have_text(re.compile(r"\d"))
    expect(exchange.locator(".f-tokens")).to_have_text("1300")
    label = exchange.locator(".beads").get_attribute("aria-label")
    assert label is not None and label.startswith("First token after")
    expect(chat.locator("#context-tokens")).to_contain_text("of 2,048 tokens")


def test_later_turns_carry_the_earlier_ones(chat: Page, chat_site: Site) -> None:
    say(chat, "What is the capital of France?")
    expect(chat.locator(".prose strong")).to_have_text("Paris")
    exchange = say(chat, "And of Spain?")
    expect(exchange.locator(".prose")).to_have_text("You said: And of Spain?. That is message 2.")
    first, second = map(prompt_of, chat_site.fake().submits)
    assert first == "<user>What is the capital of France?</user>\n<assistant>"
    assert "<assistant>The capital of France is **Paris**.</assistant>\n<user>And of Spain?</user>" in second


def test_settings_reach_the_worker(chat: Page, chat_site: Site) -> None:
    expect(chat.locator("#settings")).to_be_hidden()
    chat.click("#settings-toggle")
    expect(chat.locator("#system-prompt")).to_be_focused()
    expect(chat.locator("#max-tokens")).to_have_attribute("placeholder", "1500")  # what the model's card says
    expect(chat.locator("#temperature")).to_have_attribute("placeholder", "0, greedy")
    chat.fill("#system-prompt", "Answer in rhymes.")
    for field, value in {"#temperature": "0.7", "#top-p": "0.9", "#max-tokens": "12", "#seed": "7"}.items():
        chat.fill(field, value)
    expect(chat.locator("#settings-count")).to_have_text("5")
    shoot(chat, "settings")
    exchange = say(chat, "Hello there, model")
    expect(exchange.locator(".note")).to_contain_text("limit of 12 tokens")
    submit = chat_site.fake().submits[0]
    assert prompt_of(submit).startswith("<system>Answer in rhymes.</system>")
    assert submit.max_tokens == 12
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.7, 0.9, 7)
    chat.click("#settings-reset")
    say(chat, "Hello again")
    assert "<system>" not in prompt_of(chat_site.fake().submits[1])


def test_a_setting_out_of_range_is_shown_and_nothing_is_sent(chat: Page, chat_site: Site) -> None:
    chat.click("#settings-toggle")
    chat.fill("#temperature", "9")
    chat.click("#settings-toggle")
    chat.fill("#message", "Hello")
    chat.click("#chat-send")
    expect(chat.locator("#temperature")).to_be_focused()
    expect(chat.locator(".exchange")).to_have_count(0)
    expect(chat.locator("#message")).to_have_value("Hello")
    assert chat_site.fake().submits == []


def test_stop_cancels_in_the_worker_and_keeps_what_was_said(chat: Page, chat_site: Site) -> None:
    exchange = say(chat, "endless", ends="streaming")
    expect(chat.locator("#chat-send")).to_be_hidden()
    chat.click("#chat-stop")
    expect(exchange).to_have_attribute("data-state", "stopped")
    assert len(chat_site.fake().wait_cancelled(1)) == 1
    expect(chat.locator("#message")).to_be_focused()
    kept = exchange.locator(".prose").text_content()
    assert kept
    say(chat, "Go on")
    assert f"<assistant>{kept}" in prompt_of(chat_site.fake().submits[1])


def test_escape_stops_and_arrow_up_edits(chat: Page, chat_site: Site) -> None:
    exchange = say(chat, "endless", ends="streaming")
    chat.keyboard.press("Escape")
    expect(exchange).to_have_attribute("data-state", "stopped")
    chat.keyboard.press("ArrowUp")
    expect(chat.locator("#message")).to_have_value("endless")
    expect(chat.locator("#editing")).to_be_visible()
    chat.keyboard.press("Escape")
    expect(chat.locator("#message")).to_have_value("")
    chat.keyboard.press("ArrowUp")
    chat.keyboard.type(" no more")
    chat.locator("#message").fill("Short, please")
    chat.keyboard.press("Enter")
    expect(chat.locator(".exchange")).to_have_count(1)
    expect(chat.locator(".prose")).to_have_text("You said: Short, please. That is message 1.")
    assert "endless" not in prompt_of(chat_site.fake().submits[1])


def test_again_asks_the_same_once_more(chat: Page, chat_site: Site) -> None:
    say(chat, "What is the capital of France?")
    exchange = say(chat, "Hello")
    expect(chat.locator(".again:visible")).to_have_count(1)
    exchange.locator(".again").click()
    chat_site.fake().wait_submits(3)
    expect(exchange).to_have_attribute("data-state", "done")
    expect(chat.locator(".exchange")).to_have_count(2)
    _, second, third = map(prompt_of, chat_site.fake().submits)
    assert second == third
    expect(exchange.locator(".note")).to_contain_text("Word for word the same")


def test_enter_sends_and_shift_enter_breaks_the_line(chat: Page, chat_site: Site) -> None:
    chat.keyboard.press("Enter")
    expect(chat.locator(".exchange")).to_have_count(0)
    before = chat.locator("#message").bounding_box()
    chat.keyboard.type("one")
    chat.keyboard.press("Shift+Enter")
    chat.keyboard.type("two")
    after = chat.locator("#message").bounding_box()
    assert before is not None and after is not None and after["height"] > before["height"]
    chat.keyboard.press("Enter")
    expect(chat.locator(".exchange")).to_have_attribute("data-state", "done")
    expect(chat.locator("#message")).to_have_value("")
    expect(chat.locator("#message")).to_be_focused()
    assert "<user>one\ntwo</user>" in prompt_of(chat_site.fake().submits[0])


def left_below(page: Page) -> float:
    """Pixels below what is seen."""
    return float(
        page.evaluate(
            "document.documentElement.scrollHeight - document.documentElement.clientHeight - scrollY"
        )
    )


def test_the_page_follows_until_the_reader_scrolls_up(chat: Page) -> None:
    say(chat, "lines")
    assert left_below(chat) < 2
    exchange = say(chat, "endless", ends="streaming")
    chat.mouse.move(640, 300)
    chat.mouse.wheel(0, -30)  # a little is enough
    expect(chat.locator("#to-end")).to_be_visible()
    expect(exchange).to_have_attribute("data-state", "done")
    assert left_below(chat) > 40
    chat.click("#to-end")
    assert left_below(chat) < 2
    expect(chat.locator("#to-end")).to_be_hidden()


def test_a_conversation_can_be_cleared_and_brought_back(chat: Page, chat_site: Site) -> None:
    expect(chat.locator("#new-chat")).to_be_disabled()
    say(chat, "What is the capital of France?")
    chat.click("#new-chat")
    expect(chat.locator(".exchange")).to_have_count(0)
    expect(chat.locator("#welcome")).to_be_visible()
    assert chat.evaluate("sessionStorage.length") == 0
    chat.click("#chat-notice-undo")
    expect(chat.locator(".prose strong")).to_have_text("Paris")
    chat.click("#new-chat")
    say(chat, "Hello")
    assert "France" not in prompt_of(chat_site.fake().submits[1])
    expect(chat.locator("#chat-notice")).to_be_hidden()


def test_the_tab_keeps_the_conversation_and_nothing_else_does(chat: Page, chat_site: Site) -> None:
    chat.click("#settings-toggle")
    chat.fill("#seed", "3")
    say(chat, "What is the capital of France?")
    say(chat, "endless", ends="streaming")
    chat.reload()
    chat.wait_for_selector("#chat-view:not([hidden])")
    expect(chat.locator(".exchange")).to_have_count(2)
    expect(chat.locator(".prose strong")).to_have_text("Paris")
    expect(chat.locator(".exchange").last.locator(".note")).to_contain_text("the page was left")
    expect(chat.locator("#seed")).to_have_value("3")
    assert chat.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    chat_site.fake().wait_cancelled(1)
    say(chat, "And of Spain?")
    assert "**Paris**" in prompt_of(chat_site.fake().submits[2])


def test_a_conversation_that_has_grown_too_long_can_go_on(chat: Page, chat_site: Site) -> None:
    say(chat, "huge")
    exchange = say(chat, "y" * 700, ends="failed")
    expect(exchange.locator(".problem-words")).to_contain_text("longer than the model can take in")
    expect(exchange.locator(".problem-words")).to_contain_text("2,048 tokens")
    expect(chat.locator("#said")).to_contain_text("longer than the model")
    shoot(chat, "too-long")
    exchange.locator(".shorten").click()
    expect(exchange).to_have_attribute("data-state", "done")
    expect(chat.locator(".exchange").first).to_have_class(re.compile("forgotten"))
    prompt = prompt_of(chat_site.fake().submits[-1])
    assert "huge" not in prompt and "y" * 700 in prompt


def test_a_message_that_is_too_long_by_itself_can_be_edited(chat: Page) -> None:
    exchange = say(chat, "z" * 3000, ends="failed")
    expect(exchange.locator(".problem-words")).to_contain_text("Your message is longer")
    expect(exchange.locator(".retry")).to_be_hidden()
    exchange.locator(".edit-problem").click()
    chat.fill("#message", "short")
    chat.keyboard.press("Enter")
    expect(chat.locator(".exchange")).to_have_count(1)
    expect(chat.locator(".exchange")).to_have_attribute("data-state", "done")


def test_a_full_queue_is_told_with_its_wait(chat: Page, chat_site: Site) -> None:
    exchange = say(chat, "busy", ends="failed")
    expect(exchange.locator(".problem-words")).to_contain_text("The queue is full")
    expect(exchange.locator(".retry")).to_be_disabled()
    shoot(chat, "busy")
    expect(exchange.locator(".retry")).to_be_enabled()
    chat_site.fake().reply("Now there is room.")
    exchange.locator(".retry").click()
    expect(exchange.locator(".prose")).to_have_text("Now there is room.")
    expect(exchange.locator(".problem")).to_be_hidden()


@pytest.mark.parametrize(
    ("code", "words", "can_retry"),
    [
        (ErrorCode.LOADING, "still loading", True),
        (ErrorCode.OUT_OF_MEMORY, "out of memory", True),
        (ErrorCode.QUARANTINED, "will not run it again", False),
        (ErrorCode.INTERNAL, "the exact reason", True),
    ],
)
def test_a_refusal_is_said_in_plain_words(
    chat: Page, chat_site: Site, code: ErrorCode, words: str, can_retry: bool
) -> None:
    chat_site.fake().script = lambda _: [Reject(code, "the exact reason")]
    exchange = say(chat, "Hello", ends="failed")
    expect(exchange.locator(".problem-words")).to_contain_text(words)
    assert exchange.locator(".retry").is_visible() == can_retry


def test_a_lost_worker_is_told_and_the_conversation_goes_on(
    chat_site: Site, visit: Callable[..., Visit]
) -> None:
    worker = chat_site.fake()
    page = visit(chat_site.url).page
    page.wait_for_selector("#chat-view:not([hidden])")
    exchange = say(page, "endless", ends="streaming")
    expect(exchange.locator(".prose")).to_contain_text("bead")
    worker.die()
    expect(exchange).to_have_attribute("data-state", "failed")
    expect(exchange.locator(".problem-words")).to_contain_text("worker")
    expect(exchange.locator(".prose")).to_contain_text("bead")
    expect(page.locator("#chat-server")).to_contain_text("Restarting")
    worker.restart()
    worker.reply("Here again.")
    expect(page.locator("#chat-server")).to_be_hidden()
    expect(exchange.locator(".retry")).to_be_enabled()
    exchange.locator(".retry").click()
    expect(exchange.locator(".prose")).to_have_text("Here again.")


def test_a_server_that_is_gone_is_told(visit: Callable[..., Visit]) -> None:
    with chat_worker() as worker:
        with GatewayThread(workers=[worker.endpoint]) as gateway:
            gateway.wait_ready()
            page = visit(gateway.url).page
            page.wait_for_selector("#chat-view:not([hidden])")
        exchange = say(page, "Hello", ends="failed")
    expect(exchange.locator(".problem-words")).to_contain_text("connection to the server")
    expect(exchange.locator(".retry")).to_be_visible()
    expect(page.locator("#chat-server")).to_contain_text("Not reachable")


def test_code_is_copied_as_it_was_written(chat_site: Site, visit: Callable[..., Visit]) -> None:
    page = visit(chat_site.url, permissions=["clipboard-read", "clipboard-write"]).page
    page.wait_for_selector("#chat-view:not([hidden])")
    exchange = say(page, "markdown")
    exchange.locator(".code .link-button").click()
    expect(exchange.locator(".code .link-button")).to_have_text("Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("def reverse(text: str) -> str:\n    ") and "```" not in copied
    exchange.locator(".tools .link-button").first.click()
    expect(exchange.locator(".tools .link-button").first).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()").startswith("## Reversing a string")


def test_everything_by_keyboard(chat: Page) -> None:
    chat.locator(".skip").focus()
    chat.keyboard.press("Enter")
    expect(chat.locator("#message")).to_be_focused()
    chat.keyboard.type("What is the capital of France?")
    chat.keyboard.press("Enter")
    expect(chat.locator(".exchange")).to_have_attribute("data-state", "done")
    reached = set()
    for _ in range(6):
        chat.keyboard.press("Shift+Tab")
        reached.add(chat.evaluate("document.activeElement.className"))
    assert {"link-button again", "link-button edit"} <= reached
    chat.locator("#message").focus()
    chat.keyboard.press("Tab")
    chat.keyboard.press("Enter")
    expect(chat.locator("#system-prompt")).to_be_focused()
    chat.keyboard.press("Escape")
    expect(chat.locator("#settings")).to_be_hidden()
    expect(chat.locator("#settings-toggle")).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(chat_site: Site, visit: Callable[..., Visit], scheme: str) -> None:
    page = visit(chat_site.url, color_scheme=scheme).page
    page.wait_for_selector("#chat-view:not([hidden])")
    for selector in (".welcome-title", ".welcome-words", ".welcome-beads", ".welcome .chip", ".dock-note"):
        assert contrast(page, selector) >= 4.5, f"{selector} is hard to read in {scheme}"
    say(page, "markdown")
    shoot(page, f"markdown-{scheme}")
    say(page, "busy", ends="failed")
    page.click("#settings-toggle")
    selectors = (".asked-text", ".edit", ".prose p", ".prose code", ".code-language", ".code pre", ".table th", ".prose blockquote",
                 ".prose a", ".figures dt", ".context", ".problem-words", ".setting", ".settings-foot", "#chat-send", "#new-chat")  # fmt: skip
    for selector in selectors:
        assert contrast(page, selector) >= 4.5, f"{selector} is hard to read in {scheme}"


def test_a_phone_fits_without_scrolling_sideways(chat_site: Site, visit: Callable[..., Visit]) -> None:
    opened = visit(chat_site.url, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = opened.page
    page.wait_for_selector("#chat-view:not([hidden])")
    say(page, "markdown")
    say(page, "huge")
    page.tap("#settings-toggle")
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    for selector in (
        "#settings-toggle",
        "#new-chat",
        "#chat-send",
        "#seed",
        "#message",
        ".asked-text",
        ".code",
        ".table",
    ):
        box = page.locator(selector).first.bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 360 - 8, selector
    page.tap("#settings-toggle")
    page.locator("#message").fill("first")
    page.keyboard.press("Enter")  # a finger has no Shift key
    expect(page.locator("#message")).to_have_value("first\n")
    shoot(page, "phone")
    assert opened.complaints == []


def test_reduced_motion_is_respected(chat_site: Site, visit: Callable[..., Visit]) -> None:
    page = visit(chat_site.url, reduced_motion="reduce").page
    page.wait_for_selector("#chat-view:not([hidden])")
    exchange = say(page, "Hello")
    duration = exchange.evaluate("element => getComputedStyle(element).animationDuration")
    assert float(duration.removesuffix("s")) < 0.001


# ---------------------------------------------------------------- other models


@pytest.fixture
def open_model(visit: Callable[..., Visit]) -> Iterator[Callable[[FakeWorker], Page]]:
    """Serve a worker and open its page."""
    running: list[FakeWorker | GatewayThread] = []

    def open_page(worker: FakeWorker) -> Page:
        running.append(worker)
        worker.start()
        gateway = GatewayThread(workers=[worker.endpoint])
        running.append(gateway)
        gateway.__enter__()
        gateway.wait_ready()
        page = visit(gateway.url).page
        page.wait_for_selector('#status[data-state="ready"]')
        return page

    yield open_page
    for one in reversed(running):
        one.__exit__(None, None, None)


def test_a_picture_goes_along_where_the_model_sees(
    open_model: Callable[[FakeWorker], Page], tmp_path: Path
) -> None:
    image = pytest.importorskip("PIL.Image")
    file = tmp_path / "blue.png"
    image.new("RGB", (1600, 400), (40, 90, 220)).save(file)
    worker = chat_worker(SEEING_CARD)
    page = open_model(worker)
    expect(page.locator("#chat-view")).to_be_visible()
    page.set_input_files("#attach-file", file)
    expect(page.locator("#attached")).to_be_visible()
    exchange = say(page, "What colour is this?")
    assert len(worker.submits[0].images) == 1
    expect(exchange.locator(".asked-image")).to_be_visible()
    expect(page.locator("#attached")).to_be_hidden()
    assert "data:image" not in page.evaluate("sessionStorage.getItem('degas.conversation')")
    page.reload()
    expect(page.locator(".asked-lost")).to_be_visible()


def test_a_model_that_chats_and_points_has_both_views(open_model: Callable[[FakeWorker], Page]) -> None:
    card = msgspec.structs.replace(SEEING_CARD, model_id="both", capabilities=["chat", "detect", "point"])
    page = open_model(chat_worker(card))
    expect(page.locator("#chat-view")).to_be_visible()
    page.locator('input[name="view"][value="studio"]').check(force=True)
    expect(page.locator("#studio-view")).to_be_visible()
    expect(page.locator("#chat-view")).to_be_hidden()
    expect(page.locator('#tasks label:visible input[name="task"]')).to_have_count(2)
    expect(page.locator("#send")).to_have_text("Detect")
    assert "drawn shapes" not in page.locator("body").inner_text()


def test_a_model_with_nothing_for_a_page_is_said_so(open_model: Callable[[FakeWorker], Page]) -> None:
    page = open_model(chat_worker(msgspec.structs.replace(CHAT_CARD, model_id="base", capabilities=[])))
    expect(page.locator("#foyer-words")).to_contain_text("base neither writes")
    expect(page.locator("#foyer")).to_be_visible()


def test_a_model_without_a_template_goes_on_with_a_text(open_model: Callable[[FakeWorker], Page]) -> None:
    worker = base_worker()
    page = open_model(worker)
    expect(page.locator("#welcome")).to_contain_text("Begin a text for base")
    expect(page.locator("#welcome")).to_contain_text("no chat template")
    shoot(page, "base-empty")
    exchange = say(page, "def is_prime(n):")
    expect(exchange.locator(".prose")).to_have_text(
        "def is_prime(n):\n    return **n** > 1", use_inner_text=True
    )
    expect(exchange.locator(".f-tokens")).to_have_text(re.compile(r"\d"))
    expect(page.locator("#context-tokens")).to_contain_text("of 2,048 tokens")
    assert prompt_of(worker.submits[0]) == "def is_prime(n):" and worker.submits[0].max_tokens == 1500
    page.click("#settings-toggle")
    expect(page.locator("#system-prompt")).to_be_hidden()
    page.fill("#max-tokens", "5")
    exchange = say(page, "Once upon a time")
    expect(exchange.locator(".note")).to_contain_text("limit of 5 tokens")
    assert prompt_of(worker.submits[1]) == "Once upon a time", "what stands above is not sent"
    shoot(page, "base")
    page.fill("#max-tokens", "")
    exchange = say(page, "Endless", ends="streaming")
    page.click("#chat-stop")
    expect(exchange).to_have_attribute("data-state", "stopped")
    exchange = say(page, "busy", ends="failed")
    expect(exchange.locator(".problem-words")).to_contain_text("The queue is full. ")
    page.reload()
    expect(page.locator(".prose").first).to_have_text(
        "def is_prime(n):\n    return **n** > 1", use_inner_text=True
    )
    expect(page.locator(".exchange")).to_have_count(4)


def test_two_models_can_be_chosen_between(visit: Callable[..., Visit]) -> None:
    with (
        chat_worker() as talks,
        demo_worker() as sees,
        GatewayThread(workers=[talks.endpoint, sees.endpoint]) as gateway,
    ):
        gateway.wait_for(lambda: len(gateway.gateway.service.models()) == 2)
        page = visit(gateway.url).page
        choice = page.locator("#model-choice")
        expect(choice).to_be_visible()
        choice.select_option("pocket")
        expect(page.locator("#studio-view")).to_be_visible()
        page.click("#send")
        expect(page.locator(".card").first).to_have_attribute("data-state", "done")
        choice.select_option("chatty")
        expect(page.locator("#studio-view")).to_be_hidden()
        exchange = say(page, "What is the capital of France?")
        expect(exchange.locator(".prose")).to_contain_text("Paris")
        assert (len(talks.submits), len(sees.submits)) == (1, 1)


def test_a_conversation_behind_a_key(visit: Callable[..., Visit]) -> None:
    with (
        chat_worker() as worker,
        GatewayThread(workers=[worker.endpoint], api_keys="correct-key-1", public="page") as gateway,
    ):
        gateway.wait_ready()
        page = visit(gateway.url).page
        expect(page.locator("#key-dialog")).to_be_visible()
        page.click("#key-cancel")
        expect(page.locator("#foyer")).to_contain_text("wants a key")
        page.click("#foyer-key")
        page.fill("#key", "correct-key-1")
        page.keyboard.press("Enter")
        expect(page.locator("#chat-view")).to_be_visible()
        exchange = say(page, "What is the capital of France?")
        expect(exchange.locator(".prose")).to_contain_text("Paris")
        assert "correct-key-1" not in page.content() + page.evaluate("JSON.stringify({...sessionStorage})")
