"""A node dies in mid-stream, and what becomes of its streams, of those that wait, and of its worker."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.ray.cluster import NODES, Nodes, Up, folders, nodes, ours, up, wait_gone

# Ray itself is imported by the fixture: it reads its variables while it is.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed; make test-ray"),
]

SIM = ("--model", "sim", "--device", "sim", "--sim-profile", "b200", "--max-rows", "2")
LONG = 3000  # tokens: some seven seconds of the simulated device


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with nodes() as found:
        yield found


@pytest.fixture(scope="module")
def running(cluster: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    keys = tmp_path_factory.mktemp("ray") / "keys"
    flags = ("--min-workers", "2", "--keys-dir", str(keys), "--registry", "127.0.0.1:0")
    with up(cluster.address, *SIM, *flags) as found:
        found.wait_ready()
        found.wait_for(lambda: sum(" serves" in line for line in found.lines) == 2)
        yield found


class Stream:
    """One answer as its client sees it."""

    def __init__(self, session: aiohttp.ClientSession, url: str, max_tokens: int) -> None:
        self.events: list[dict[str, Any]] = []
        self.has_begun = asyncio.Event()
        self.ended_s = 0.0
        self._session, self._url, self._max_tokens = session, url, max_tokens
        self.task = asyncio.create_task(self._run())

    @property
    def code(self) -> str | None:
        """Of its error; None without."""
        assert not any("error" in event for event in self.events[:-1]), "an error is the last event"
        error = self.events[-1].get("error")
        return None if error is None else str(error["code"])

    async def _run(self) -> None:
        body = {
            "model": "sim",
            "prompt": "x",
            "max_tokens": self._max_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    self.events.append(json.loads(line[6:]))
                    self.has_begun.set()
        self.ended_s = time.monotonic()


async def answer(session: aiohttp.ClientSession, url: str) -> str | None:
    """A short answer's error code."""
    one = Stream(session, url, 5)
    await one.task
    return one.code


async def wait_for_queue(session: aiohttp.ClientSession, url: str, number: int) -> None:
    """Until workers say that so many requests wait."""
    while True:
        async with session.get(f"{url}/metrics") as response:
            lines = (await response.text()).splitlines()
        if (
            sum(float(line.split()[-1]) for line in lines if line.startswith("degas_worker_num_waiting{"))
            == number
        ):
            return
        await asyncio.sleep(0.05)


def places(running: Up) -> dict[str, str]:
    """Nodes by the endpoint of the worker that serves there."""
    workers = running.status()["workers"]
    return {one["endpoint"]: one["node"] for one in workers if one["state"] == "serving"}


async def test_a_node_that_dies_ends_its_streams_only(running: Up, cluster: Nodes) -> None:
    before = places(running)
    assert sorted(before.values()) == sorted(NODES)
    url, with_keys = running.url, folders()
    assert len(with_keys) == 2
    async with aiohttp.ClientSession() as session, asyncio.timeout(120):
        begun = [Stream(session, url, LONG) for _ in range(4)]
        await asyncio.gather(*(one.has_begun.wait() for one in begun))  # two on each node
        waiting = [Stream(session, url, 5) for _ in range(6)]
        await wait_for_queue(session, url, 6)
        assert not any(one.task.done() for one in begun)
        killed_s = time.monotonic()
        await asyncio.to_thread(cluster.kill, NODES[0])
        await asyncio.gather(*(one.task for one in begun))
        lost = [one for one in begun if one.code is not None]
        assert [one.code for one in lost] == ["worker_lost"] * 2, "the two streams of the node that died"
        # Told by the connection, not by a silence of seconds.
        assert all("connection closed" in one.events[-1]["error"]["message"] for one in lost)
        await asyncio.gather(*(one.task for one in waiting))
        assert not any(one.code for one in waiting), "an unstarted request is tried again"
        print("told after", [round(one.ended_s - killed_s, 2) for one in lost])

        returned_s = await asyncio.to_thread(
            running.wait_for,
            lambda: sum(NODES[1] in line and line.endswith(" serves") for line in running.lines) == 2,
        )
        print("the actor serves elsewhere after", round(time.monotonic() - killed_s, 2), round(returned_s, 2))
        after = await asyncio.to_thread(places, running)
        assert sum(path.exists() for path in with_keys) == 1, "the keys went with the node"
        assert list(after.values()) == [NODES[1], NODES[1]]
        assert len(after.keys() - before.keys()) == 1
        assert await answer(session, url) is None


async def test_gateways_elsewhere_are_told_where_workers_are(running: Up) -> None:
    page = next(line for line in running.lines if "gateways elsewhere" in line).rpartition(" ")[2]
    async with aiohttp.ClientSession() as session, session.get(page) as response:
        listed = (await response.text()).split()
    assert set(listed) == places(running).keys()


def test_a_second_fleet_of_the_name_is_refused(running: Up, cluster: Nodes) -> None:
    with up(cluster.address, *SIM) as second:
        assert second.process.wait(60) == 2
    assert "is up on this cluster already" in second.text


def test_down_ends_everything_in_order(running: Up) -> None:
    shown = running.command("status")
    assert "2 workers, 2 wanted" in shown.stdout
    with_keys = folders()
    done = running.command("down")
    assert done.returncode == 0 and "has ended" in done.stdout, done.stderr
    assert running.process.wait(30) == 0
    assert "draining" in running.text
    wait_gone(with_keys)
    own = [
        Path(line.split('"file://')[1].split("/workers")[0]) for line in running.lines if '"file://' in line
    ]
    assert own and not any(folder.exists() for folder in own)
    assert not ours()
    assert running.command("status").returncode == 1


def test_wrong_settings_of_a_worker_are_said_and_not_tried_again(cluster: Nodes) -> None:
    with up(cluster.address, "--model", "/nowhere/model", "--device", "cpu") as wrong:
        assert wrong.process.wait(90) == 2
    assert "/nowhere/model" in wrong.text
    assert "refuses its settings" in wrong.text


async def test_workers_are_added_under_load_and_taken_away_again(cluster: Nodes) -> None:
    scaling = ("--max-workers", "2", "--scale-up-s", "1", "--scale-down-s", "2")
    with up(cluster.address, *SIM, *scaling) as running:
        await asyncio.to_thread(running.wait_ready)
        async with aiohttp.ClientSession() as session:
            load = [Stream(session, running.url, LONG // 2) for _ in range(6)]
            await asyncio.to_thread(running.wait_for, lambda: "1 → 2 workers" in running.text)
            await asyncio.to_thread(
                running.wait_for, lambda: sum(" serves" in line for line in running.lines) == 2
            )
            await asyncio.gather(*(one.task for one in load))
            assert not any(one.code for one in load)
            await asyncio.to_thread(running.wait_for, lambda: "has ended" in running.text)
            assert "2 → 1 workers" in running.text
            assert await answer(session, running.url) is None


def test_workers_see_the_gpus_that_they_were_given_and_end_with_a_killed_up(cluster: Nodes) -> None:
    cluster.add("127.0.0.5", num_gpus=2)
    with up(
        cluster.address, *SIM, "--min-workers", "2", "--num-gpus", "1", "--worker-ports", "5600-5699"
    ) as running:
        running.wait_ready()
        running.wait_for(lambda: sum(" serves" in line for line in running.lines) == 2)
        supervisors = [seen for words, seen in ours().items() if words[-3:-1] == ("--only", "worker")]
        assert sorted(seen["CUDA_VISIBLE_DEVICES"] for seen in supervisors) == ["0", "1"]
        ports = [int(seen["DEGAS_WORKER_ENDPOINT"].rpartition(":")[2]) for seen in supervisors]
        assert all(5600 <= port <= 5699 for port in ports)
        with_keys = folders()
        running.process.kill()
        running.process.wait()
    wait_gone(with_keys)
    deadline_s = time.monotonic() + 30
    while ours():
        assert time.monotonic() < deadline_s, ours().keys()
        time.sleep(0.1)
