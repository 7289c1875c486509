"""Official clients against a real gateway over real sockets, with a scripted worker behind it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import openai
import pytest
from PIL import Image

from tests.fake_worker import FakeWorker
from tests.gateway_thread import GatewayThread
from tests.keys import ANY_KEY


@pytest.fixture
def worker() -> Iterator[FakeWorker]:
    with FakeWorker() as worker:
        yield worker


@pytest.fixture
def gateway(worker: FakeWorker) -> Iterator[GatewayThread]:
    with GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_ready()
        yield gateway


@pytest.fixture
def client(gateway: GatewayThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=ANY_KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def picture() -> Image.Image:
    return Image.new("RGB", (90, 60), "red")


@pytest.fixture
def picture_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
