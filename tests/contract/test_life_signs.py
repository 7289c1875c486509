"""A stream that waits says so, and official clients take no notice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import moondream
import openai
import pytest
from PIL import Image

from tests.fake_worker import End, FakeWorker, Token, Wait, text_ids
from tests.gateway_thread import GatewayThread
from tests.http_client import Opened
from tests.keys import ANY_KEY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def worker() -> Iterator[FakeWorker]:
    with FakeWorker() as worker:
        worker.script = lambda _: [
            Wait(0.7),
            *map(Token, text_ids("so ")),
            Wait(0.3),
            *map(Token, text_ids("late")),
            End(),
        ]
        yield worker


@pytest.fixture(scope="module")
def gateway(worker: FakeWorker) -> Iterator[GatewayThread]:
    with GatewayThread(workers=[worker.endpoint], life_sign_s=0.1) as gateway:
        gateway.wait_ready()
        yield gateway


@pytest.fixture
def client(gateway: GatewayThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=ANY_KEY, max_retries=0) as client:
        yield client


BODIES: dict[str, Any] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/query": {"question": "hi"},
}


@pytest.mark.parametrize("path", BODIES)
def test_the_comments_are_there(gateway: GatewayThread, path: str) -> None:
    with Opened(gateway.url, path, {**BODIES[path], "stream": True}) as opened:
        lines = opened.response.read().split(b"\n")
    assert lines.count(b": waiting") >= 4
    for place, line in enumerate(lines):
        if line == b": waiting":
            assert lines[place + 1] == b"" and (place == 0 or lines[place - 1] == b"")


def test_the_openai_client_reads_every_stream(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(
        model="fake-vl", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "so late"
    pieces = client.completions.create(model="fake-vl", prompt="hi", stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == "so late"
    events = list(client.responses.create(model="fake-vl", input="hi", stream=True))
    assert events[-1].type == "response.completed" and events[-1].response.output_text == "so late"


def test_the_openai_client_reads_the_socket(client: openai.OpenAI) -> None:
    with client.responses.connect() as connection:
        connection.response.create(model="fake-vl", input="hi")
        for event in connection:
            if event.type == "response.completed":
                assert event.response.output_text == "so late"
                break


def test_the_moondream_client_reads_a_stream(gateway: GatewayThread) -> None:
    model = moondream.vl(endpoint=f"{gateway.url}/v1")
    answer = model.query(Image.new("RGB", (60, 40)), "hi", stream=True)["answer"]
    assert "".join(answer) == "so late"
