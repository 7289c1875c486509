"""A gateway before a scripted worker whose model has a chat template that shows tools and thinks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import msgspec
from tokenizers import AddedToken

from shared.image_spec import ImageSpec
from tests.fake_worker import CARD, VOCAB_SIZE, FakeWorker, byte_tokenizer
from tests.gateway_thread import GatewayThread

TEMPLATE = """{%- for tool in tools or [] %}<tool>{{ tool | tojson }}</tool>{% endfor %}
{%- for message in messages %}[{{ message.role }}]{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{%- endfor %}
{%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}[assistant]"""


MARKS = {"<think>": VOCAB_SIZE, "</think>": VOCAB_SIZE + 1}


@contextlib.contextmanager
def chat_model(
    *, has_marks: bool = False, image: ImageSpec | None = None, **settings: Any
) -> Iterator[tuple[GatewayThread, FakeWorker]]:
    """The gateway and its worker, ready. `has_marks`: thinking's marks are tokens, as Qwen's: added ones, not special.
    `image`: how it takes pictures, if it does."""
    card = msgspec.structs.replace(
        CARD, family="llama", image=image, templates={}, suppress_ids=[], default_max_tokens=400
    )
    tokenizer_json: bytes | None = None
    if has_marks:
        card = msgspec.structs.replace(card, vocab_size=VOCAB_SIZE + len(MARKS))
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
        tokenizer_json = tokenizer.to_str().encode()
    with (
        FakeWorker(card=card, chat_template=TEMPLATE.encode(), tokenizer_json=tokenizer_json) as worker,
        GatewayThread(workers=[worker.endpoint], **settings) as gateway,
    ):
        gateway.wait_ready()
        yield gateway, worker
