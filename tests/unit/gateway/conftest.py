"""A scripted worker and a real gateway in front of it, for one test each."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator

import pytest
from PIL import Image

from tests.fake_worker import FakeWorker
from tests.gateway_thread import GatewayThread


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
def data_url() -> Callable[..., str]:
    """Encode a picture of a given size and colour as a data URL."""

    def encode(width: int = 90, height: int = 60, colour: object = "red", kind: str = "PNG") -> str:
        mode = "RGBA" if isinstance(colour, tuple) and len(colour) == 4 else "RGB"
        file = io.BytesIO()
        Image.new(mode, (width, height), colour).save(file, kind)  # type: ignore[arg-type]
        return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()

    return encode
