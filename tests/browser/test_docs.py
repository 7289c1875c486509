"""The description's page in a real browser: every route is listed, opens, and can be tried."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from gateway.api.described.operations import OPERATIONS
from tests.browser.conftest import Site, Visit
from tests.browser.demo_worker import demo_worker
from tests.gateway_thread import GatewayThread

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_every_route_is_listed_and_one_is_tried(site: Site, visit: Callable[..., Visit]) -> None:
    opened = visit(f"{site.url}/docs#post_v1_messages")
    page = opened.page
    expect(page.locator(".operation")).to_have_count(len(OPERATIONS))
    card = page.locator("#post_v1_messages")
    expect(card).to_have_attribute("open", "")
    body = card.get_by_label("Body, as JSON")
    expect(body).not_to_have_value("MODEL")
    card.get_by_label("stream").check()
    expect(card.locator(".curl")).to_contain_text('"stream":true')
    card.get_by_role("button", name="Send").click()
    expect(card.locator(".took", has_text="200,")).to_be_visible()
    expect(card.locator("pre").last).to_contain_text("message_stop")
    card.get_by_text("ThinkingAsked").first.click()
    expect(card.locator(".nested").first).to_contain_text("budget_tokens")
    assert opened.complaints == []


def test_it_asks_for_a_key_and_fits_a_phone(visit: Callable[..., Visit]) -> None:
    with (
        demo_worker() as worker,
        GatewayThread(workers=[worker.endpoint], api_keys="a-long-key", public="page") as gateway,
    ):
        gateway.wait_ready()
        opened = visit(f"{gateway.url}/docs", viewport={"width": 360, "height": 740})
        page = opened.page
        expect(page.locator("#notice")).to_contain_text("key")
        page.get_by_label("Key").fill("a-long-key")
        page.get_by_label("Key").press("Enter")
        expect(page.locator(".operation")).to_have_count(len(OPERATIONS))
        page.locator("#post_v1_chat_completions summary").first.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
