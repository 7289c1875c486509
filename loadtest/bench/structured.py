"""Owns `degas bench loop --structured`: what constrained output costs a mixed batch. Runs in the main thread.

Clients follow one request with the next, a share of them asking for text that matches a regular expression. A
simulated GPU in real time, a real gateway, real streams; throughput at each share is compared with none.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from loadtest.bench.processes import WorkerProbe, serving

LENGTH = 60
PATTERN = f"[a-z]{{{LENGTH}}}"


@dataclass(frozen=True)
class Share:
    """Throughput with `structured_pct` per cent of the requests constrained."""

    structured_pct: int
    where: str  # where the constraint is enforced: device or host
    tokens_per_s: float
    relative: float  # to the round's throughput without constrained requests
    zombie_pct: float

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {name: round(v, 4) if isinstance(v, float) else v for name, v in asdict(self).items()}


def measure(shares: list[int], profile: str, rows: int, seconds: float, rounds: int) -> list[Share]:
    """Every share with the automaton on the device and with masks made by the host, `rounds` times in turn."""
    done: list[Share] = []
    for where, flags in (("device", []), ("host", ["--device-automata", "false"])):
        sim = [
            "--device",
            "sim",
            "--sim-profile",
            profile,
            "--max-rows",
            str(rows),
            "--num-pages",
            str(rows * 20),
        ]
        with serving([*sim, *flags]) as (url, probe):
            rates: dict[int, list[float]] = {share: [] for share in shares}
            zombies: dict[int, list[float]] = {share: [] for share in shares}
            asyncio.run(_round(url, 100, rows, 1.0, probe))  # compiles the grammar once
            for _ in range(rounds):
                for share in shares:
                    tokens_per_s, zombie_pct = asyncio.run(_round(url, share, rows, seconds, probe))
                    rates[share].append(tokens_per_s)
                    zombies[share].append(zombie_pct)
        base = rates[shares[0]]
        for share in shares:
            ratios = [rate / none for rate, none in zip(rates[share], base, strict=True)]
            done.append(
                Share(
                    share,
                    where,
                    statistics.median(rates[share]),
                    statistics.median(ratios),
                    statistics.median(zombies[share]),
                )
            )
    return done


async def _round(url: str, share: int, rows: int, seconds: float, probe: WorkerProbe) -> tuple[float, float]:
    """(tokens a second, per cent of zombie rows) with `rows` clients, `share` per cent asking for the pattern.

    The worker counts the tokens: free text is random bytes, and some of them complete no character to send.
    """
    stop_s = time.perf_counter() + seconds + 2.0
    clients = [_client(url, i, i * 100 < share * rows, stop_s) for i in range(rows)]
    tasks = [asyncio.create_task(client) for client in clients]
    await asyncio.sleep(0.5)
    first = (await asyncio.to_thread(probe.beat)).metrics
    await asyncio.sleep(seconds)
    last = (await asyncio.to_thread(probe.beat)).metrics
    await asyncio.gather(*tasks)

    def delta(name: str) -> float:
        return last[name] - first[name]

    return (
        delta("generation_tokens_total") / delta("loop_seconds_total"),
        100 * delta("zombie_rows_total") / delta("step_rows_total"),
    )


async def _client(url: str, index: int, structured: bool, stop_s: float) -> None:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    number = 0
    try:
        while time.perf_counter() < stop_s:
            number += 1
            request = {"model": "sim", "prompt": f"{index} {number}", "stream": True, "temperature": 0}
            if structured:
                request |= {"max_tokens": LENGTH + 8, "guided_regex": PATTERN}
            else:
                request |= {"max_tokens": LENGTH, "ignore_eos": True}
            body = json.dumps(request).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            tail = b""
            while b"[DONE]" not in tail:
                data = await reader.read(65536)
                if not data or b'"error"' in data:
                    raise RuntimeError(f"a stream failed: {data[-300:]!r}")
                tail = (tail + data)[-64:]
            while b"0\r\n\r\n" not in tail:
                tail = (tail + await reader.read(65536))[-64:]
    finally:
        writer.close()
