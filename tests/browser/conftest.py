"""A real browser on the page, and a server behind it.

By default the server is a gateway in this process with a fake worker behind it. `DEGAS_BROWSER_URL` points the
same tests at a server that is already running (`make serve`, say); those that need the fake's script then skip.
`DEGAS_CHROMIUM` names the browser's executable where it is not found on the path.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.browser.demo_worker import demo_worker
from tests.fake_worker import FakeWorker
from tests.gateway_thread import GatewayThread

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass
class Site:
    """A server to test; `worker` is its fake worker, if it has one."""

    url: str
    worker: FakeWorker | None = None

    def fake(self) -> FakeWorker:
        """The fake worker; skips the test where a real one answers."""
        if self.worker is None:
            pytest.skip("needs the fake worker's script; DEGAS_BROWSER_URL names a real server")
        return self.worker


@dataclass
class Visit:
    """One open page, and everything the browser complained about."""

    page: Page
    context: BrowserContext
    complaints: list[str] = field(default_factory=list)


def chromium_path() -> str:
    """The browser's executable; fails, and does not skip, where there is none."""
    path = os.environ.get("DEGAS_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.fail("no chromium on the path: `make setup` installs it, or set DEGAS_CHROMIUM", pytrace=False)
    return path


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Headless Chromium. It ends with this folder's tests: its interface keeps a loop running in the main thread."""
    expect.set_options(timeout=20_000)  # a busy machine paints late
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def site() -> Iterator[Site]:
    """The server under test."""
    url = os.environ.get("DEGAS_BROWSER_URL")
    if url:
        yield Site(url.rstrip("/"))
        return
    with demo_worker() as worker, GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_ready()
        yield Site(gateway.url, worker)


def open_page(browser: Browser, url: str, **context_options: object) -> Visit:
    """A page in a context of its own, which the caller closes."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context_options})  # type: ignore[arg-type]
    page = context.new_page()
    page.set_default_timeout(15_000)
    one = Visit(page, context)
    page.on("console", lambda said: one.complaints.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: one.complaints.append(str(error)))
    page.goto(url)
    return one


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Open a page; `visit(url, color_scheme="dark", …)` takes what a browser context takes."""
    visits: list[Visit] = []

    def opened(url: str, **context_options: object) -> Visit:
        visits.append(open_page(browser, url, **context_options))
        return visits[-1]

    yield opened
    for one in visits:
        one.context.close()


@pytest.fixture
def page(site: Site, visit: Callable[..., Visit]) -> Iterator[Page]:
    """The page, loaded and ready; complaints of the browser (policy violations among them) fail the test."""
    opened = visit(site.url)
    opened.page.wait_for_selector('#status[data-state="ready"]')
    yield opened.page
    assert opened.complaints == []
