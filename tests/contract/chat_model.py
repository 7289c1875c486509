"""A gateway before a scripted worker whose model has a chat template that shows tools and thinks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import msgspec

from tests.fake_worker import CARD, FakeWorker
from tests.gateway_thread import GatewayThread

TEMPLATE = """{%- for tool in tools or [] %}<tool>{{ tool | tojson }}</tool>{% endfor %}
{%- for message in messages %}[{{ message.role }}]{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{%- endfor %}
{%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}[assistant]"""


@contextlib.contextmanager
def chat_model(**settings: Any) -> Iterator[tuple[GatewayThread, FakeWorker]]:
    """The gateway and its worker, ready."""
    card = msgspec.structs.replace(
        CARD, family="llama", image=None, templates={}, suppress_ids=[], default_max_tokens=400
    )
    with (
        FakeWorker(card=card, chat_template=TEMPLATE.encode()) as worker,
        GatewayThread(workers=[worker.endpoint], **settings) as gateway,
    ):
        gateway.wait_ready()
        yield gateway, worker
