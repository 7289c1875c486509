"""A real gateway on a loop in a thread of its own, so that tests may use blocking clients against it.

    with FakeWorker() as worker, GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_ready()
        httpx_or_urllib(gateway.url + "/v1/models")

Settings are those of `GatewayConfig`; the port is always a free one on the loopback interface. The picture process is started
with the first picture: most tests send none, and each start takes a tenth of a second of a core.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, TypeVar

import uvloop

from gateway.__main__ import Gateway
from gateway.config import load
from gateway.confined.images import ImageDecoder
from gateway.generation import PreparedImage
from shared.protocol import ImageSpec

T = TypeVar("T")


class GatewayThread:
    """See the module's docstring."""

    def __init__(self, **settings: Any) -> None:
        defaults = {"host": "127.0.0.1", "port": 0, "image_processes": 1, "drain_deadline_s": 1.0}
        self.config = load({**defaults, **settings})
        self.gateway: Gateway = None  # type: ignore[assignment]
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gateway", daemon=True)

    @property
    def url(self) -> str:
        """Where it answers."""
        return self.gateway.url

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 30.0) -> T:
        """Run a coroutine on the gateway's loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def call(self, function: Callable[[], T]) -> T:
        """Run a function on the gateway's loop and wait for it."""

        async def work() -> T:
            return function()

        return self.run(work())

    def wait_ready(self, timeout_s: float = 10.0) -> None:
        """Block until a worker serves. Raises TimeoutError."""
        self.wait_for(lambda: self.gateway.service.readiness()[0], timeout_s)

    def wait_for(self, holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Block until something holds on the gateway's loop. Raises TimeoutError."""
        until_s = time.monotonic() + timeout_s
        while not self.call(holds):
            if time.monotonic() > until_s:
                raise TimeoutError("it did not come to hold")
            time.sleep(0.005)

    def __enter__(self) -> GatewayThread:
        self._thread.start()

        async def start() -> Gateway:
            gateway = Gateway(self.config)
            _start_with_the_first_picture(gateway.service.images)
            await gateway.start()
            return gateway

        self.gateway = self.run(start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.run(self.gateway.stop(drain_s=0))
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()


def _start_with_the_first_picture(images: ImageDecoder) -> None:
    start, prepare = images.start, images.prepare
    is_started = False

    async def wait() -> None:
        """Nothing to do yet."""

    async def started(data_url: str, spec: ImageSpec, *, param: str) -> PreparedImage:
        nonlocal is_started
        if not is_started:
            is_started = True
            await start()
        return await prepare(data_url, spec, param=param)

    images.start, images.prepare = wait, started  # type: ignore[method-assign]
