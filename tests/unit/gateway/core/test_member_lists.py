"""Workers found in a list that somebody else keeps: a file, or a page over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from gateway.config import ConfigError, load
from gateway.core import member_lists
from gateway.core.discovery import Discovery
from tests.gateway_thread import GatewayThread
from tests.http_client import ask
from tests.unit.gateway.core.test_discovery import CHAT, HI, on_tcp

TWO = "# written by a registry\n\n tcp://10.0.0.1:5600 \ntcp://[fd00::1]:5601\r\n"
BOTH = frozenset({"tcp://10.0.0.1:5600", "tcp://[fd00::1]:5601"})


def test_a_list_is_one_endpoint_a_line() -> None:
    assert member_lists.parse(TWO) == BOTH
    assert member_lists.parse("") == frozenset()


@pytest.mark.parametrize(
    "line",
    [
        "ipc:///tmp/x",
        "10.0.0.1:5600",
        "tcp://a",
        "tcp://a:0",
        "tcp://a:65536",
        "tcp://a:5 b",
        "tcp://a:5\x00",
        "<html>",
    ],
)
def test_anything_else_is_refused_with_its_line(line: str) -> None:
    with pytest.raises(ValueError, match="line 2 is"):
        member_lists.parse(f"tcp://10.0.0.1:5600\n{line}\n")


def test_a_list_that_cannot_be_read_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "workers"
    joined: list[str] = []
    found = Discovery(
        f"file://{path}",
        interval_s=1,
        join=joined.append,
        leave=lambda endpoint: pytest.fail(f"{endpoint} left"),
        is_idle=lambda _: True,
    )

    async def write_and_look(data: bytes | None) -> str:
        if data is not None:
            path.write_bytes(data)
        await found.once()
        return found.problem

    async def run() -> None:
        assert "was not found" in await write_and_look(None)
        assert not await write_and_look(TWO.encode())
        for _ in range(5):
            assert "line 1 is 'tcp" in await write_and_look(b"tcp:/half")
            assert "utf-8" in await write_and_look(b"\xff\xfe")
            assert "longer than" in await write_and_look(b"#" * (member_lists.MAX_LIST_BYTES + 1))
        assert not await write_and_look(TWO.encode())

    asyncio.run(run())
    assert sorted(joined) == sorted(BOTH)


@asynccontextmanager
async def registry(answer: web.Response) -> AsyncIterator[str]:
    async def workers(_: web.Request) -> web.Response:
        return answer

    app = web.Application()
    app.router.add_get("/workers", workers)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}/workers"
    finally:
        await runner.cleanup()


async def test_a_page_is_read_like_a_file() -> None:
    async with registry(web.Response(text=TWO)) as url:
        assert await member_lists.read_page(url) == BOTH


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (web.Response(status=503, text=TWO), "status 503"),
        (web.Response(status=302, headers={"location": "http://127.0.0.1:1/"}), "status 302"),
        (web.Response(text="<html>"), "line 1"),
        (web.Response(body=b"#" * (member_lists.MAX_LIST_BYTES + 9)), "longer than"),
    ],
    ids=["503", "redirect", "page", "long"],
)
async def test_a_page_that_is_no_list_is_no_answer(answer: web.Response, said: str) -> None:
    async with registry(answer) as url:
        with pytest.raises(ValueError, match=said):
            await member_lists.read_page(url)


async def test_nobody_there_is_an_oserror() -> None:
    async with registry(web.Response(text="")) as url:
        pass
    with pytest.raises(OSError):
        await member_lists.read_page(url)


def test_workers_of_a_file_come_and_go(tmp_path: Path) -> None:
    path = tmp_path / "workers"
    path.write_text("")
    with GatewayThread(workers=[f"file://{path}"], worker_lookup_s=0.1) as gateway, on_tcp(4) as worker:
        assert ask(gateway.url, CHAT, HI).status == 503
        path.write_text(worker.endpoint + "\n")
        gateway.wait_ready()
        worker.reply("listed")
        assert b"listed" in ask(gateway.url, CHAT, HI).body
        path.write_text("")
        worker.die()
        gateway.wait_for(lambda: not gateway.gateway.service.workers)


@pytest.mark.parametrize(
    "entry", ["file://workers", "file:///", "http://registry:5550", "https:///x", "http://a b/c"]
)
def test_a_malformed_address_of_a_list_is_refused_at_the_start(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"file:///<path> or http://"):
        load({"workers": [entry]})
