"""Owns faults of gateways: told to end with many streams open, and one of two that dies. Real processes, real signals."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Final

from loadtest.chaos.asking import Heard, body, client, readiness, stream
from loadtest.chaos.faults import Fault, Found, Size, counted
from loadtest.chaos.services import entered, probe_of, sim_fleet

DRAIN_S: Final = 5.0
NOTICE_S: Final = 0.5
FREED_S: Final = 8.0  # the lease of a dead gateway is 5 s


async def _drained(size: Size) -> list[Found]:
    """Half of the streams end within the deadline, half never would."""
    flags = [
        "--max-rows",
        str(max(8, size.streams)),
        "--max-waiting",
        str(size.streams),
        "--mixed-tokens",
        "4096",
    ]
    flags += ["--step-tokens", "4096"]
    settings = {
        "drain_deadline_s": str(DRAIN_S),
        "drain_notice_s": str(NOTICE_S),
        "max_queue": str(size.streams),
    }
    async with entered(sim_fleet(*flags, settings=settings)) as running, client() as session, client() as own:
        gateway = running.gateways[0]
        short = [Heard(0.0) for _ in range(size.streams // 2)]
        endless = [Heard(0.0) for _ in range(size.streams - len(short))]
        tasks = []
        # What is to end in time must not take a client on the same cores longer for that there are more streams.
        few = min(60, 12_000 // size.streams)
        for name, group, tokens in (("endless", endless, 12_000), ("short", short, few)):
            tasks += [
                asyncio.create_task(stream(session, running.url, body(f"{name} {n}", tokens), one))
                for n, one in enumerate(group)
            ]
            await asyncio.gather(*(one.first.wait() for one in group))
        open_now = sum(not task.done() for task in tasks)
        told_s = time.perf_counter()
        gateway.send(signal.SIGTERM)
        statuses: list[int] = []
        refused: list[Heard] = []
        while gateway.is_running and time.perf_counter() - told_s < NOTICE_S + DRAIN_S + 10:
            statuses.append(await readiness(own, running.url))
            if len(refused) < 3 and time.perf_counter() - told_s > NOTICE_S + 0.3:
                refused.append(await stream(own, running.url, body("too late", 2)))
            await asyncio.sleep(0.1)
        code = gateway.process.poll() if gateway.process is not None else None
        took_s = time.perf_counter() - told_s
        await asyncio.gather(*tasks)
    seen = [status for number, status in enumerate(statuses) if number == 0 or status != statuses[number - 1]]
    new = counted(one.outcome for one in refused)
    return [
        Found(
            "readiness 503 first, then new work refused",
            f"readiness {' → '.join(map(str, seen))}; new requests: {new}",
            503 in seen and 200 not in seen[seen.index(503) :] and not any(one.is_whole for one in refused),
        ),
        Found(
            "what can end ends well, the rest is told: no bare reset",
            f"{open_now} open: {counted(one.outcome for one in (*short, *endless))}",
            all(one.is_whole for one in short)
            and all(one.is_whole or one.code == "shutting_down" for one in endless),
        ),
        Found.within(
            f"ends within its deadline ({NOTICE_S + DRAIN_S:g} s as set)",
            took_s,
            NOTICE_S + DRAIN_S + 3.0,
            f"exit code {code}",
            also=code == 0,
        ),
    ]


async def _one_of_two(size: Size) -> list[Found]:
    async with (
        entered(sim_fleet("--max-rows", "16", num_gateways=2)) as running,
        client() as session,
    ):
        dying, staying = running.gateways
        of_dying = [Heard(0.0) for _ in range(4)]
        of_staying = [Heard(0.0) for _ in range(4)]
        tasks = [
            asyncio.create_task(stream(session, member.address, body(f"{member.name} {n}", 2500), one))
            for member, group in ((dying, of_dying), (staying, of_staying))
            for n, one in enumerate(group)
        ]
        await asyncio.gather(*(one.first.wait() for one in (*of_dying, *of_staying)))
        probe = await probe_of(running)
        try:
            before = (await asyncio.to_thread(probe.beat)).num_running
            died_s = time.perf_counter()
            dying.send(signal.SIGKILL)
            running_now = before
            while running_now > len(of_staying) and time.perf_counter() - died_s < 2 * FREED_S:
                running_now = (await asyncio.to_thread(probe.beat)).num_running
            freed_s = time.perf_counter() - died_s
        finally:
            await asyncio.to_thread(probe.close)
        await asyncio.gather(*tasks)
        dying.start()
        await asyncio.to_thread(running.wait_ready)
        again = await stream(session, dying.address, body("again", 3))
    return [
        Found(
            "only its own clients lose anything",
            f"its own: {counted(one.outcome for one in of_dying)}; the other's: {counted(one.outcome for one in of_staying)}",
            all(one.is_whole for one in of_staying) and not any(one.is_whole for one in of_dying),
        ),
        Found.within(
            "its sequences are cancelled when its lease is over",
            freed_s,
            FREED_S,
            f"{before} running before, {running_now} after; started again, it answers: {again.outcome}",
            also=again.is_whole and running_now <= len(of_staying),
        ),
    ]


FAULTS: Final = [
    Fault("drained", "gateway SIGTERM with streams open", _drained),
    Fault("one-of-two", "two gateways, one dies", _one_of_two),
]
