"""Workers found under a name come and go without a restart of the gateway."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from gateway.config import ConfigError, load
from gateway.core import discovery
from gateway.core.discovery import Discovery
from tests.fake_worker import FakeWorker
from tests.gateway_thread import GatewayThread
from tests.http_client import ask

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}


class Names:
    """A name service whose answer the test writes."""

    def __init__(self) -> None:
        self.answer: frozenset[str] | OSError = socket.gaierror("no such name")

    async def __call__(self, host: str, port: int) -> frozenset[str]:
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    service = Names()
    monkeypatch.setattr(discovery, "look_up", service)
    return service


def on_tcp(number: int) -> FakeWorker:
    with socket.socket() as probe:
        probe.bind((f"127.0.0.{number}", 0))
        port = probe.getsockname()[1]
    return FakeWorker(f"tcp://127.0.0.{number}:{port}", epoch=number)


@pytest.fixture
def gateway(names: Names) -> Iterator[GatewayThread]:
    with GatewayThread(workers=["dns://worker:5555"], worker_lookup_s=0.1) as gateway:
        yield gateway


def known(gateway: GatewayThread) -> dict[str, int]:
    return gateway.call(lambda: {w.link.endpoint: w.key for w in gateway.gateway.service.workers})


def test_a_name_that_nobody_knows_yet_is_said_and_asked_again(gateway: GatewayThread, names: Names) -> None:
    gateway.wait_for(lambda: "dns://worker:5555" in gateway.gateway.service.readiness()[1])
    assert ask(gateway.url, CHAT, HI).status == 503
    with on_tcp(2) as worker:
        names.answer = frozenset({worker.endpoint})
        gateway.wait_ready()
        worker.reply("found")
        assert b"found" in ask(gateway.url, CHAT, HI).body


def test_workers_come_and_go(gateway: GatewayThread, names: Names) -> None:
    with on_tcp(2) as first:
        names.answer = frozenset({first.endpoint})
        gateway.wait_ready()
        with on_tcp(3) as second:
            names.answer = frozenset({first.endpoint, second.endpoint})
            gateway.wait_for(
                lambda: sum(w.link.ready is not None for w in gateway.gateway.service.workers) == 2
            )
            assert sorted(known(gateway).values()) == [0, 1]
            names.answer = frozenset({second.endpoint})  # a name service's whim: the first still serves
            second.reply("from the second")
            first.reply("from the first")
            assert ask(gateway.url, CHAT, HI).status == 200
            assert first.endpoint in known(gateway)
            first.die()
            gateway.wait_for(lambda: len(gateway.gateway.service.workers) == 1)
            assert b"from the second" in ask(gateway.url, CHAT, HI).body
            names.answer = socket.gaierror("the name service is away")
            assert b"from the second" in ask(gateway.url, CHAT, HI).body


def test_a_lookup_in_trouble_is_told_once_and_changes_nothing(names: Names) -> None:
    joined: list[str] = []

    async def run() -> Discovery:
        found = Discovery(
            "dns://worker:5555",
            interval_s=1,
            join=joined.append,
            leave=lambda _: pytest.fail("it left"),
            is_idle=lambda _: True,
        )
        names.answer = frozenset({"tcp://10.0.0.1:5555"})
        await found.once()
        names.answer = OSError("away")
        for _ in range(10):
            await found.once()
        return found

    assert asyncio.run(run()).problem == "dns://worker:5555 was not found: away"
    assert joined == ["tcp://10.0.0.1:5555"]


def test_a_name_that_is_not_there_yet_is_no_warning_until_it_stays_away(names: Names) -> None:
    """Workers that start beside their gateway have their name a moment later."""

    async def run(num_lookups: int) -> list[str]:
        found = Discovery(
            "dns://worker:5555",
            interval_s=1,
            join=lambda _: None,
            leave=lambda _: None,
            is_idle=lambda _: True,
        )
        names.answer = socket.gaierror("not there")
        with capture_logs() as lines:
            for _ in range(num_lookups):
                await found.once()
        return [line["log_level"] for line in lines]

    assert asyncio.run(run(4)) == ["info"]
    assert asyncio.run(run(20)) == ["info", "warning"]


def test_real_names_are_looked_up() -> None:
    assert "tcp://127.0.0.1:5555" in asyncio.run(discovery.look_up("localhost", 5555))
    with pytest.raises(OSError):
        asyncio.run(discovery.look_up("no-such-name.invalid", 1))


@pytest.mark.parametrize("entry", ["dns://worker", "dns://:5", "http://worker:1", "dns://a/b:1"])
def test_a_malformed_name_is_refused_at_the_start(entry: str) -> None:
    with pytest.raises(ConfigError, match="dns://<name>:<port>"):
        load({"workers": [entry]})
