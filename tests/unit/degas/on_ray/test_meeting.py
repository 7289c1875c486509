"""How gateways learn where workers are, and how the fleet learns what they have to do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
import zmq
import zmq.auth

from degas.keys import make_keys
from degas.on_ray.registry import Registry
from degas.on_ray.watch import Watch
from gateway.core import member_lists
from shared.settings import ConfigError
from tests.fake_worker import FakeWorker


async def test_the_list_is_a_file_and_a_page(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "workers")
    path = Path(registry.source.removeprefix("file://"))
    assert await member_lists.read_file(path) == frozenset()
    url = await registry.listen("127.0.0.1", 0)
    try:
        both = frozenset({"tcp://10.0.0.2:5601", "tcp://10.0.0.1:5600"})
        registry.tell(both)
        assert await member_lists.read_file(path) == both == await member_lists.read_page(url)
        registry.tell([])
        assert await member_lists.read_page(url) == frozenset()
        async with aiohttp.ClientSession() as session, session.get(url.removesuffix("/workers")) as other:
            assert other.status == 404
        with pytest.raises(OSError):
            await Registry(tmp_path / "second").listen("127.0.0.1", int(url.split(":")[2].split("/")[0]))
    finally:
        await registry.close()


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it does not come true")


async def test_heartbeats_are_heard_over_curve(tmp_path: Path) -> None:
    make_keys(tmp_path, apart=True)
    public, secret = zmq.auth.load_certificate(tmp_path / "worker" / "worker.key_secret")
    assert secret is not None

    def secure(socket: zmq.Socket[bytes]) -> None:
        socket.curve_publickey, socket.curve_secretkey, socket.curve_server = public, secret, True

    watch = Watch(str(tmp_path / "gateway"))
    try:
        with FakeWorker("tcp://127.0.0.1:0", curve_server=secure) as worker:
            watch.follow({worker.endpoint})
            assert watch.load(worker.endpoint) is None and watch.load("tcp://10.0.0.1:1") is None
            await until(lambda: watch.load(worker.endpoint) is not None)
            load = watch.load(worker.endpoint)
            assert load is not None
            assert load.max_rows == worker.limits.max_rows
            assert 0 <= load.pages_in_use <= load.total_pages
            assert watch.refusal(worker.endpoint) == ""
            worker.die()
            await until(lambda: watch.load(worker.endpoint) is None)
            watch.follow(set())
            assert watch.load(worker.endpoint) is None
    finally:
        watch.close()
        watch.close()


async def test_a_watch_without_keys_is_refused(tmp_path: Path) -> None:
    watch = Watch(str(tmp_path))
    try:
        with pytest.raises(ConfigError, match=r"has no worker\.key"):
            watch.follow({"tcp://127.0.0.1:5600"})
    finally:
        watch.close()
