"""What a model's card says of sampling and length reaches the worker, unless the client says otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from tests.fake_worker import CARD, FakeWorker
from tests.gateway_thread import GatewayThread
from tests.http_client import ask

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"input": "hi"},
    "/v1/query": {"question": "hi"},
    "/v1/completions": {"prompt": "hi"},
}


@pytest.fixture
def worker() -> Iterator[FakeWorker]:
    changes = {
        "default_max_tokens": 77,
        "default_temperature": 0.6,
        "default_top_p": 0.95,
        "default_top_k": 20,
        "default_min_p": 0.05,
        "default_repetition_penalty": 1.1,
    }
    with FakeWorker(card=msgspec.structs.replace(CARD, **changes)) as worker:
        yield worker


@pytest.mark.parametrize("path", ASKED)
def test_the_cards_defaults_reach_the_worker(gateway: GatewayThread, worker: FakeWorker, path: str) -> None:
    assert ask(gateway.url, path, ASKED[path]).status == 200
    submit = worker.submits[-1]
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.95, 20)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.05, 1.1)
    # OpenAI documents 16 for completions, and clients count on it.
    assert submit.max_tokens == (16 if path == "/v1/completions" else 77)


@pytest.mark.parametrize(("given", "sent"), [(0, 0), (-1, 0), (5, 5)])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/completions"])
def test_the_client_has_the_last_word(
    gateway: GatewayThread, worker: FakeWorker, path: str, given: int, sent: int
) -> None:
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    assert ask(gateway.url, path, {**ASKED[path], "top_k": given, limit: 3}).status == 200
    assert (worker.submits[-1].sampling.top_k, worker.submits[-1].max_tokens) == (sent, 3)


def test_the_client_turns_the_cards_penalty_off(gateway: GatewayThread, worker: FakeWorker) -> None:
    asked = {**CHAT, "min_p": 0, "repetition_penalty": 1}
    assert ask(gateway.url, "/v1/chat/completions", asked).status == 200
    sampling = worker.submits[-1].sampling
    assert (sampling.min_p, sampling.repetition_penalty) == (0.0, 1.0)


def test_the_default_length_is_cut_to_what_fits(worker: FakeWorker) -> None:
    worker.card = msgspec.structs.replace(worker.card, default_max_tokens=100_000)
    with GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_ready()
        assert ask(gateway.url, "/v1/chat/completions", CHAT).status == 200
        submit = worker.submits[-1]
        assert submit.max_tokens + len(submit.prompt) // 4 == worker.card.context_tokens
