"""The page's markdown: what it makes of usual text, and that hostile text stays text and costs no more than its length."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.chat_worker import HOSTILE, chat_worker
from tests.browser.conftest import Site, Visit, open_page
from tests.gateway_thread import GatewayThread

pytestmark = [pytest.mark.browser, pytest.mark.slow]

RENDER = """async ([texts]) => {
  const { Prose } = await import("/markdown.js");
  const root = document.createElement("div");
  const prose = new Prose(root);
  for (const text of texts) prose.set(text);
  return root.innerHTML.replace(/ dir="auto"/g, "");
}"""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """A server with a text model, for all of this file."""
    with chat_worker() as worker, GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_ready()
        yield Site(gateway.url, worker)


@pytest.fixture(scope="module")
def opened(browser: Browser, site: Site) -> Iterator[Visit]:
    """Its page, ready. Tests share it: what they render they render into nodes of their own."""
    opened = open_page(browser, site.url)
    opened.page.wait_for_selector("#chat-view:not([hidden])")
    yield opened
    opened.context.close()


@pytest.fixture
def chat(opened: Visit) -> Iterator[Page]:
    """The page; complaints of the browser (policy violations among them) fail the test."""
    yield opened.page
    complaints, opened.complaints = opened.complaints, []
    assert complaints == []
    assert opened.page.locator("#exchanges > *").count() == 0


def anchor(href: str, label: str) -> str:
    """A link as the page makes it."""
    return f'<a href="{href}" rel="noopener noreferrer nofollow" target="_blank" title="{href}">{label}</a>'


USUAL = {
    "plain": "<p>plain</p>",
    "two\nlines\n\nnext": "<p>two<br>lines</p><p>next</p>",
    "one\\\ntwo C:\\": "<p>one<br>two C:\\</p>",
    "def f():\n    return 1": "<p>def f():<br>    return 1</p>",
    "*a* **b** ***c*** _d_ __e__ ~~f~~": "<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em> <em>d</em> <strong>e</strong> <del>f</del></p>",
    "**bold with *em* inside**": "<p><strong>bold with <em>em</em> inside</strong></p>",
    "snake_case_name and 2 * 3 * 4": "<p>snake_case_name and 2 * 3 * 4</p>",
    "unclosed **bold": "<p>unclosed **bold</p>",
    r"\*not\* `co*d*e` ``a ` b``": "<p>*not* <code>co*d*e</code> <code>a ` b</code></p>",
    "# One\n### Three ###\n#no": "<h3>One</h3><h5>Three</h5><p>#no</p>",
    "---\n***": "<hr><hr>",
    "> a\n> - b": '<blockquote><p>a</p><ul><li><span class="line">b</span></li></ul></blockquote>',
    "text:\n- a\n- b\n  - c": '<p>text:</p><ul><li><span class="line">a</span></li><li><span class="line">b</span><ul><li><span class="line">c</span></li></ul></li></ul>',
    "3. a\n4. b": '<ol start="3"><li><span class="line">a</span></li><li><span class="line">b</span></li></ol>',
    "1. a\n\n   more\n\n2. b": '<ol start="1"><li><p>a</p><p>more</p></li><li><p>b</p></li></ol>',
    "in 1999. It was": "<p>in 1999. It was</p>",
    "[a](https://example.org/x_(y) \"t\")": f"<p>{anchor('https://example.org/x_(y)', 'a')}</p>",
    "[**a** b](http://example.org/)": f"<p>{anchor('http://example.org/', '<strong>a</strong> b')}</p>",
    "see https://example.org/a_b_c.": f"<p>see {anchor('https://example.org/a_b_c', 'https://example.org/a_b_c')}.</p>",
    "![a](https://example.org/p.png)": f"<p>{anchor('https://example.org/p.png', 'a')}</p>",
    "a & b < c > d &amp;": "<p>a &amp; b &lt; c &gt; d &amp;amp;</p>",
}  # fmt: skip

INERT = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[a](javascript:alert(1))",
    "[a](JaVaScRiPt:alert(1))",
    "[a](\tjavascript:alert(1))",
    "[a](data:text/html,<script>alert(1)</script>)",
    "[a](vbscript:x) [b](file:///etc/passwd) [c](//example.org) [d](/v1/models)",
    "[a](https://user:secret@example.org/)",
    "<javascript:alert(1)>",
    "<a href='javascript:1'>x</a><iframe srcdoc='x'></iframe><svg onload=alert(1)>",
]


@pytest.mark.parametrize("text", USUAL)
def test_usual_markdown(chat: Page, text: str) -> None:
    assert chat.evaluate(RENDER, [[text]]) == USUAL[text]


def test_usual_markdown_grows_token_by_token(chat: Page) -> None:
    """However an answer arrives, it ends as the same nodes."""
    text = "\n\n".join(USUAL) + "\n\n```py\nx = 1\n\ny = 2\n```\n\n| a | b |\n|---|:-:|\n| 1 | 2 |\n"
    whole = chat.evaluate(RENDER, [[text]])
    grown = chat.evaluate(RENDER, [[text[:end] for end in range(1, len(text) + 1)]])
    assert grown == whole
    assert "<table>" in whole and '<td class="to-centre">2</td>' in whole
    assert ">x = 1\n\ny = 2</code>" in whole


def test_a_code_block_that_grows_keeps_its_node(chat: Page) -> None:
    same = chat.evaluate(
        """async () => {
          const { Prose } = await import("/markdown.js");
          const root = document.createElement("div");
          const prose = new Prose(root);
          prose.set("text\\n\\n```js\\nlet a");
          const [first, code] = [root.children[0], root.children[1]];
          prose.set("text\\n\\n```js\\nlet a = 1;\\nlet b");
          return [root.children[0] === first, root.children[1] === code, code.querySelector("code").textContent];
        }"""
    )
    assert same == [True, True, "let a = 1;\nlet b"]


@pytest.mark.parametrize("text", INERT)
def test_hostile_markup_makes_no_element(chat: Page, text: str) -> None:
    html = chat.evaluate(RENDER, [[text]])
    counted = chat.evaluate(
        """html => {
          const inert = new DOMParser().parseFromString(html, "text/html");
          return [...inert.body.querySelectorAll("*")].map((node) => node.tagName + [...node.attributes].map((a) => a.name));
        }""",
        html,
    )
    assert counted == ["P"], html


def test_links_lead_to_http_only_and_tell_where(chat: Page) -> None:
    html = chat.evaluate(RENDER, [['[a](https://exa"mple.org/" onclick="alert(1))']])
    assert html == f"<p>{anchor('https://exa&quot;mple.org/%22', 'a')}</p>"
    html = chat.evaluate(RENDER, [["[a](HTTPS://Example.ORG/%22onclick=) <http://example.org/?a=<b>"]])
    assert html.startswith(f"<p>{anchor('https://example.org/%22onclick=', 'a')}")


def test_characters_that_are_not_seen_are_named(chat: Page) -> None:
    html = chat.evaluate(
        RENDER, [["a\u202eb\u0000c\u001b[31m \u2066d\u2069 \U000e0041e\n\n```\nrm\u202e x\n```"]]
    )
    for name in ("U+202E", "U+0000", "U+001B", "U+2066", "U+2069", "U+E0041"):
        assert f'<span class="unseen">{name}</span>' in html
    assert not set(html) & set("\u202e\u0000\u001b\u2066\u2069\U000e0041")
    heaped = chat.evaluate(RENDER, [["e" + "\u0301" * 500 + " " + "\u202e" * 500]])
    assert (
        heaped.count("\u0301") == 12 and ">and 484 more</span>" in heaped and ">and 496 more</span>" in heaped
    )
    kept = "👩\u200d👩\u200d👧 عربي \u200f e\u0301"
    assert kept in chat.evaluate(RENDER, [[kept]])


HUGE = {
    "line": "x" * 300_000,
    "stars": "*a " * 60_000,
    "nested emphasis": "*a **b " * 20_000,
    "brackets": "[" * 100_000,
    "links": "[a](" * 40_000,
    "backticks": "".join("`" * n + " " for n in range(1, 400)),
    "quotes": ">" * 20_000 + " a\n" * 10,
    "lists": "\n".join(" " * n + "- a" for n in range(400)),
    "blank lines in a list": "- a" + "\n" * 200_000 + "b",
    "pipes": "|" * 50_000 + "\n" + "|-" * 50_000,
    "wide table": "|a" * 2_000 + "\n" + "|-" * 2_000 + "\n" + ("|b" * 2_000 + "\n") * 50,
    "hashes": "# " + "#" * 100_000 + " x",
    "spaces": "a" + " " * 200_000 + "b",
    "tildes": "~~~" * 30_000,
    "angles": "<" * 100_000,
    "fences": "```\n" * 20_000,
    "combining": "e" + "\u0301" * 50_000,
    "urls": "https://" * 20_000,
    "overrides": "\u202e" * 20_000,
    "backslashes": "\\" * 100_000,
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_answer_is_rendered(chat: Page, name: str) -> None:
    """What grows with the square of its length would not come back within the test's time."""
    depth = chat.evaluate(
        """async ([text]) => {
          const { Prose } = await import("/markdown.js");
          const root = document.querySelector("#exchanges").appendChild(document.createElement("div"));
          root.className = "prose";
          new Prose(root).set(text);
          const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
          let deepest = 0;
          for (const node of root.querySelectorAll(":not(:has(*))")) {
            let depth = 0;
            for (let up = node; up !== root; up = up.parentElement) depth += 1;
            deepest = Math.max(deepest, depth);
          }
          root.remove();
          return [wide, deepest];
        }""",
        [HUGE[name]],
    )
    assert depth[0] <= 0 and depth[1] <= 450


def test_a_hostile_answer_does_nothing(site: Site, visit: Callable[..., Visit]) -> None:
    fresh = visit(site.url)
    chat = fresh.page
    chat.wait_for_selector("#chat-view:not([hidden])")
    asked: list[str] = []
    chat.on("request", lambda request: asked.append(request.url))
    chat.on("popup", lambda _: pytest.fail("a window was opened"))
    chat.fill("#message", "Be hostile")
    chat.click("#chat-send")
    exchange = chat.locator(".exchange")
    expect(exchange).to_have_attribute("data-state", "done")
    assert chat.evaluate("window.hacked") is None
    assert exchange.locator(".prose :is(script, img, iframe, svg, object, form, style)").count() == 0
    links = exchange.locator(".prose a").evaluate_all("nodes => nodes.map((node) => [node.href, node.rel])")
    assert [href for href, _ in links] == [
        "https://example.org/p.png",
        "https://example.org/safe",
        "https://example.org/bare",
    ]
    assert all("noopener" in rel for _, rel in links)
    expect(exchange.locator(".prose")).to_contain_text("<script>window.hacked = 2</script>")
    expect(exchange.locator(".prose")).to_contain_text("https://bank.example@evil.example/")
    assert exchange.locator(".prose .unseen").count() >= 4
    assert not [url for url in asked if "example" in url]
    assert HOSTILE.count("hacked") > 5
    assert fresh.complaints == []
