"""A fake text model for the page's conversation: canned answers by what the last message holds, paced."""

from __future__ import annotations

import msgspec

from shared import protocol as wire
from shared.errors import ErrorCode, FinishReason
from tests.fake_worker import CARD, Action, End, FakeWorker, Reject, Token, Wait, ids_text, text_ids

TEMPLATE = b"{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}<assistant>"

MARKDOWN = """\
## Reversing a string

Python strings are **sequences**, so a *slice* with step `-1` reads them backwards:

```python
def reverse(text: str) -> str:
    \"\"\"The characters of `text`, last first.\"\"\"
    return text[::-1]


print(reverse("a very long line that does not fit on a narrow screen without scrolling sideways"))
```

1. It copies the string once.
2. It works on bytes and lists too:
   - `reverse(b"abc")`
   - `[1, 2, 3][::-1]`
3. It does *not* keep combining marks with their letters.

| Way | Copies | Speed |
|:----|:------:|------:|
| `text[::-1]` | 1 | 1.0 |
| `"".join(reversed(text))` | 2 | 0.3 |

> A string that is its own reverse is a palindrome.

See [the documentation](https://docs.python.org/3/library/stdtypes.html) for slices.
"""

HOSTILE = """\
<img src=x onerror="window.hacked = 1"><script>window.hacked = 2</script>

[press here](javascript:window.hacked=3) [and here](data:text/html,<script>1</script>) ![p](https://example.org/p.png)

[bank](https://bank.example@evil.example/) <https://example.org/safe> https://example.org/bare).

```<b>html</b>
</code></pre><script>window.hacked = 4</script>
```

| <script>window.hacked = 5</script> | b |
|---|---|
| [x](vbscript:hacked) | <a href="javascript:1">y</a> |

invoice\u202efdp.exe and \u0007bell \u2066isolated\u2069
"""

CHAT_CARD = msgspec.structs.replace(
    CARD,
    model_id="chatty",
    family="llama",
    image=None,
    capabilities=["chat", "completions"],
    templates={},
    suppress_ids=[],
    context_tokens=2048,
    default_max_tokens=1500,
)
SEEING_CARD = msgspec.structs.replace(
    CHAT_CARD, model_id="seeing", image=CARD.image, templates=CARD.templates
)

ANSWERS = {
    "capital": "The capital of France is **Paris**.",
    "markdown": MARKDOWN,
    "hostile": HOSTILE,
    "huge": "x" * 1400,
    "endless": "bead " * 260,
    "lines": "a line of verse\n\n" * 60,
}


def prompt_of(submit: wire.Submit) -> str:
    """The rendered conversation."""
    return ids_text(wire.unpack_i32(submit.prompt).tolist())


def answer_to(submit: wire.Submit) -> str:
    """The canned answer to the last user message; else what was asked, and how many messages there were."""
    prompt = prompt_of(submit)
    asked = prompt.rpartition("<user>")[2].partition("</user>")[0]
    for word, answer in ANSWERS.items():
        if word in asked.lower():
            return answer
    return f"You said: {asked}. That is message {prompt.count('<user>')}."


def script(submit: wire.Submit, *, gap_s: float = 0.004, first_s: float = 0.03) -> list[Action]:
    """Paced tokens, several of which make a character where it is not ASCII."""
    asked = prompt_of(submit).rpartition("<user>")[2]
    if "busy" in asked:
        return [Reject(ErrorCode.QUEUE_FULL, "full", retry_after_s=1.0)]
    ids = text_ids(answer_to(submit))
    actions: list[Action] = [Wait(first_s)]
    pause_s = gap_s if "endless" in asked else 0.0
    for token_id in ids[: submit.max_tokens]:
        actions += [Token(token_id), *([Wait(pause_s)] if pause_s else [])]
    return [*actions, End(FinishReason.STOP if len(ids) <= submit.max_tokens else FinishReason.LENGTH)]


def chat_worker(card: wire.ModelCard = CHAT_CARD) -> FakeWorker:
    """A fake worker that converses as above."""
    worker = FakeWorker(card=card, chat_template=TEMPLATE)
    worker.script = script
    return worker


def base_worker() -> FakeWorker:
    """A fake worker whose model has no chat template: it goes on with texts."""
    worker = FakeWorker(
        card=msgspec.structs.replace(CHAT_CARD, model_id="base", capabilities=["completions"])
    )

    def go_on(submit: wire.Submit) -> list[Action]:
        prompt = prompt_of(submit)
        if "busy" in prompt:
            return [Reject(ErrorCode.QUEUE_FULL, "full", retry_after_s=1.0)]
        text = "on and " * 200 if "Endless" in prompt else "\n    return **n** > 1"
        ids = text_ids(text)[: submit.max_tokens]
        actions: list[Action] = [action for token_id in ids for action in (Token(token_id), Wait(0.004))]
        return [*actions, End(FinishReason.LENGTH if len(ids) == submit.max_tokens else FinishReason.STOP)]

    worker.script = go_on
    return worker
