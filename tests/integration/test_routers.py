"""What routers, autoscalers and dashboards see of a real gateway and a real worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from tests.http_client import ask
from tests.integration.stack import SIM, Stack, stack
from tests.unit.worker.wire.plain_msgpack import read
from tests.unit.worker.wire.router_view import RouterView

pytestmark = pytest.mark.slow

PAGE_TOKENS = 16
TOPIC = "kv@10.0.0.7@sim"
END = b"\xff" * 8


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("events")
    flags = [*SIM, "--kv-events", f"ipc://{folder}/kv", "--kv-events-replay", f"ipc://{folder}/replay"]
    flags += ["--kv-events-topic", TOPIC, "--price-per-hour", "1"]
    with stack(flags, vllm_metrics="true", image_processes="1") as running:
        yield running


class Router:
    """Follows a worker's events as a prefix-aware router does: subscribed, and asking again for what it has not heard."""

    def __init__(self, running: Stack) -> None:
        flag = running.worker_flags.index
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.subscriber = self.context.socket(zmq.SUB)
        self.subscriber.setsockopt(zmq.SUBSCRIBE, b"kv@")
        self.subscriber.connect(running.worker_flags[flag("--kv-events") + 1])
        self.replay = self.context.socket(zmq.DEALER)
        self.replay.connect(running.worker_flags[flag("--kv-events-replay") + 1])
        for socket in (self.subscriber, self.replay):
            socket.setsockopt(zmq.RCVTIMEO, 10_000)
        self.view = RouterView()

    def catch_up(self) -> None:
        """Ask for everything that was not heard yet."""
        self.replay.send_multipart([b"", len(self.view.times).to_bytes(8, "big")])
        while True:
            _, number, payload = self.replay.recv_multipart()
            if number == END:
                return
            assert int.from_bytes(number, "big") == len(self.view.times)
            self.view.on_payload(payload)

    def close(self) -> None:
        self.subscriber.close(0)
        self.replay.close(0)
        self.context.term()


@pytest.fixture
def router(served: Stack) -> Iterator[Router]:
    made = Router(served)
    yield made
    made.close()


def chat(running: Stack, text: str, max_tokens: int = 4) -> Any:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "ignore_eos": True}
    answer = ask(running.url, "/v1/chat/completions", body)
    assert answer.status == 200, answer.body
    return answer.json


def prompt_ids(running: Stack, text: str) -> list[int]:
    answer = ask(running.url, "/tokenize", {"messages": [{"role": "user", "content": text}]})
    assert answer.status == 200, answer.body
    return list(answer.json["tokens"])


def test_a_router_knows_which_prompt_is_cached(served: Stack, router: Router) -> None:
    """Before the question nothing of it, afterwards all its full pages, and the worker finds as much in its cache."""
    text = "which of these pages will be found again? " * 6
    ids = prompt_ids(served, text)
    assert len(ids) > 3 * PAGE_TOKENS
    router.catch_up()
    assert router.view.prefix_of(ids, PAGE_TOKENS) == 0
    chat(served, text)
    router.catch_up()
    known = router.view.prefix_of(ids, PAGE_TOKENS)
    assert known == len(ids) // PAGE_TOKENS * PAGE_TOKENS
    usage = chat(served, text)["usage"]
    assert usage["prompt_tokens"] == len(ids)
    assert usage["prompt_tokens_details"]["cached_tokens"] == (len(ids) - 1) // PAGE_TOKENS * PAGE_TOKENS
    assert usage["prompt_tokens_details"]["cached_tokens"] <= known


def test_a_subscriber_hears_it_as_it_happens(served: Stack, router: Router) -> None:
    """In the order of numbers, under the topic that says whose events these are."""
    router.catch_up()
    for attempt in range(50):
        chat(served, f"subscribers may come late, number {attempt}: " + "word " * 40)
        if router.subscriber.poll(100):
            break
    topic, number, payload = router.subscriber.recv_multipart()
    assert topic == TOPIC.encode()
    heard = int.from_bytes(number, "big")
    assert heard >= len(router.view.times)
    router.catch_up()
    batch: Any = read(payload)
    assert batch[0] == router.view.times[heard], "what is repeated is what was said"
