"""Owns faults of workers: killed, stopped, a device that fails, a prompt that kills. Real processes, real signals."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Final

from loadtest.bench.chaos_server import Server
from loadtest.chaos.asking import Heard, body, client, readiness, stream
from loadtest.chaos.broken_worker import DEATH_ID, ERROR_ID
from loadtest.chaos.faults import Fault, Found, Size, counted
from loadtest.chaos.services import BROKEN, entered, sim_fleet, supervised, until
from loadtest.fleet import Fleet, Member

TOLD_S: Final = 1.0
NOTICED_S: Final = 3.0
STOP_MARGIN_S: Final = 1.5  # the progress heartbeat's own interval, and a busy machine's
READY_S: Final = 5.0
ROWS: Final = 16
PLAIN: Final = list(range(40, 80))  # ids without a meaning to the simulated device


async def _killed(size: Size) -> list[Found]:
    return await _hurt(signal.SIGKILL, TOLD_S, "told within a second of the kill")


async def _stopped(size: Size) -> list[Found]:
    return await _hurt(
        signal.SIGSTOP,
        NOTICED_S + STOP_MARGIN_S,
        "noticed by its progress, and told (3 s of silence and what a heartbeat takes)",
    )


async def _hurt(number: signal.Signals, bound_s: float, promise: str) -> list[Found]:
    """As many streams as there are rows, and as many that wait; then the signal."""
    flags = ["--sim-profile", "b200", "--max-rows", str(ROWS)]
    async with entered(supervised(flags)) as server, client() as session:
        begun = [Heard(0.0) for _ in range(ROWS)]
        tasks = [
            asyncio.create_task(stream(session, server.url, body("begun", 3000), heard)) for heard in begun
        ]
        await asyncio.gather(*(heard.first.wait() for heard in begun))
        unstarted = [
            asyncio.create_task(stream(session, server.url, body(f"waits {n}", 5))) for n in range(ROWS)
        ]
        await asyncio.sleep(0.2)
        await until(lambda: server.pid_of("worker") is not None, 10.0)  # its status is written once a second
        pid = server.pid_of("worker")
        assert pid is not None
        at_s = time.perf_counter()
        os.kill(pid, number)
        lost_at_s = 0.0
        watching = asyncio.create_task(_first_503(server, at_s))
        heard = await asyncio.gather(*tasks)
        lost_at_s = await watching
        back_s = await until(lambda: server.pid_of("worker") not in (None, pid), 20.0)
        waited = await asyncio.gather(*unstarted)
        ready_s = time.perf_counter()
        while await readiness(session, server.url) != 200:
            if time.perf_counter() - ready_s > 20:
                break
            await asyncio.sleep(0.02)
        ready_s = time.perf_counter() - at_s
        again = await stream(session, server.url, body("again", 3))
    told_s = max(one.end_s for one in heard) - at_s
    all_told = all(one.num_terminal == 1 and one.code for one in heard)
    noticed = NOTICED_S + STOP_MARGIN_S if number is signal.SIGSTOP else 0.0
    return [
        Found.within(
            promise,
            told_s,
            bound_s,
            f"{ROWS} begun streams: {counted(one.outcome for one in heard)}",
            also=all_told,
        ),
        Found(
            "what had not begun is tried again",
            f"{ROWS} requests that waited: {counted(one.outcome for one in waited)}",
            sum(one.is_whole for one in waited) == ROWS,
        ),
        Found.within(
            "readiness says 503, and 200 again",
            max(0.0, ready_s - noticed),
            READY_S,
            f"503 after {lost_at_s:.2f} s; then a request is {again.outcome}"
            + (", counted from the notice" if noticed else ""),
            also=again.is_whole and back_s < 20.0,
        ),
    ]


async def _first_503(server: Server, since_s: float) -> float:
    """Seconds until readiness is lost; -1 where nobody saw it. Its own connections: those of clients are busy."""
    async with client() as own:
        while time.perf_counter() - since_s < 8.0:
            if await readiness(own, server.url) == 503:
                return time.perf_counter() - since_s
            await asyncio.sleep(0.005)
    return -1.0


async def _device_error(size: Size) -> list[Found]:
    broken = sim_fleet("--max-rows", "8", module=BROKEN)
    async with entered(broken) as running, client() as session:
        streams = [Heard(0.0) for _ in range(4)]
        tasks = [
            asyncio.create_task(stream(session, running.url, body(PLAIN, 3000), heard)) for heard in streams
        ]
        await asyncio.gather(*(heard.first.wait() for heard in streams))
        at_s = time.perf_counter()
        culprit = await stream(session, running.url, body([*PLAIN[:4], ERROR_ID, 50], 5))
        heard = await asyncio.gather(*tasks)
        told_s = max(one.end_s for one in heard) - at_s
        worker = running.workers[0]
        code = await asyncio.to_thread(worker.wait)
        worker.start()
        began_s = time.perf_counter()
        await asyncio.to_thread(running.wait_ready)
        ready_s = time.perf_counter() - began_s
        again = await stream(session, running.url, body(PLAIN, 3))
    return [
        Found.within(
            "everything in flight fails with a typed error",
            told_s,
            TOLD_S,
            f"4 streams: {counted(one.outcome for one in heard)}; the prompt that did it: {culprit.outcome}",
            also=all(one.code == "device_error" for one in heard),
        ),
        Found("the process ends with an exit code", f"exit code {code}", code not in (0, None)),
        Found.within(
            "started again, it serves",
            ready_s,
            READY_S + 5.0,
            f"a request is {again.outcome}",
            also=again.is_whole,
        ),
    ]


async def _poison(size: Size) -> list[Found]:
    """Nothing supervises a fleet: its dead worker is started again here, as `degas serve` would."""
    broken = sim_fleet("--max-rows", "4", module=BROKEN)
    async with entered(broken) as running, client() as session:
        deaths = 0
        done = asyncio.Event()

        async def keep(worker: Member) -> None:
            nonlocal deaths
            while not done.is_set():
                if not worker.is_running:
                    deaths += 1
                    worker.start()
                await asyncio.sleep(0.02)

        keeping = asyncio.create_task(keep(running.workers[0]))
        try:
            asked = time.perf_counter()
            others = [
                asyncio.create_task(stream(session, running.url, body([*PLAIN, 30 + n], 5))) for n in range(8)
            ]
            poison = asyncio.create_task(stream(session, running.url, body([*PLAIN[:6], DEATH_ID, 50], 5)))
            heard = await asyncio.gather(*others)
            culprit = await poison
            took_s = time.perf_counter() - asked
            await _wait_served(running)
            after = await stream(session, running.url, body(PLAIN, 5))
        finally:
            done.set()
            await keeping
    told = [
        one for one in heard if one.code == "worker_lost" and one.first_s
    ]  # begun: what was said cannot be unsaid
    return [
        Found(
            "at most one retry, then quarantined",
            f"{culprit.outcome} after {deaths} dead workers and {took_s:.1f} s",
            culprit.code == "quarantined" and deaths <= 3,
        ),
        Found(
            "others are served, but for those that had begun beside it, who are told",
            f"8 beside it: {counted(one.outcome for one in heard)}, {len(told)} of them begun; one after it: {after.outcome}",
            sum(one.is_whole for one in heard) + len(told) == len(heard) and after.is_whole,
        ),
    ]


async def _wait_served(running: Fleet) -> None:
    async with client() as own:
        for _ in range(1500):
            if await readiness(own, running.url) == 200:
                return
            await asyncio.sleep(0.02)
    raise RuntimeError("the worker does not come back")


async def _slow_device(size: Size) -> list[Found]:
    """A laptop's processor: a prompt to the context's limit takes seconds, and nothing takes that for a hang."""
    flags = ["--sim-profile", "laptop", "--context", "2048", "--step-s", "0.5", "--gap-s", "0.3"]
    async with entered(supervised(flags)) as server, client() as session:
        await until(lambda: server.pid_of("worker") is not None, 10.0)
        pid = server.pid_of("worker")
        started_s = time.perf_counter()
        long = asyncio.create_task(stream(session, server.url, body("x" * 2036, 2)))
        await asyncio.sleep(0.2)
        neighbour = asyncio.create_task(stream(session, server.url, body("y" * 16, 24)))
        shorts = [
            asyncio.create_task(stream(session, server.url, body("z" * (16 + n), 2)))
            for n in range(size.shorts)
        ]
        statuses = []
        while not long.done():
            statuses.append(await readiness(session, server.url))
            await asyncio.sleep(0.1)
        heard = [await long, *(await asyncio.gather(*shorts))]
        took_s = time.perf_counter() - started_s
        gap = (await neighbour).most_gap_s
        same = server.pid_of("worker") == pid and not server.deaths()
    return [
        Found(
            "every request is answered",
            f"a prompt of 2036 tokens and {size.shorts} short ones: {counted(one.outcome for one in heard)} in {took_s:.0f} s",
            all(one.is_whole for one in heard),
        ),
        Found(
            "no kill, no 503",
            f"the worker {'lives on' if same else 'was replaced'}; readiness {counted(map(str, statuses))}",
            same and set(statuses) <= {200},
        ),
        # A step may take half a second; a token that makes no whole character has no event of its own.
        Found.within(
            "others' gaps stay within the steps' bound",
            gap,
            max(3.0, took_s / 3),
            "the longest gap of a stream beside it",
        ),
    ]


FAULTS: Final = [
    Fault("killed", "worker SIGKILL in the middle of streams", _killed),
    Fault("stopped", "worker SIGSTOP, a stuck device", _stopped),
    Fault("device-error", "the device reports an error", _device_error),
    Fault("poison", "a request that kills the worker", _poison),
    Fault("slow-device", "a device 100 times slower", _slow_device),
]
