"""Owns faults of requests: what one asks for must not hurt another. A real gateway and worker over the simulated device."""

from __future__ import annotations

import asyncio
import json
import random
import struct
import time
import zlib
from base64 import b64encode
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from loadtest.chaos.asking import Heard, body, client, stream, whole
from loadtest.chaos.faults import Fault, Found, Size
from loadtest.chaos.services import entered, probe_of, sim_fleet
from loadtest.fleet import fleet

PLAIN: Final = list(range(40, 80))
NAN_ID, OOM_ID = 11, 12  # orders to the simulated device
CLEAR_S: Final = 2.0  # a refusal of bad input, on a busy machine
BIG_BYTES: Final = 1 << 30
BOMB_BYTES: Final = 100_000_000
MEMORY_MB: Final = 64.0


async def _no_memory(size: Size) -> list[Found]:
    return await _one_of_many(
        [*PLAIN[:8], OOM_ID, 50], "out_of_memory", "that request is shed, the batch goes on"
    )


async def _nan(size: Size) -> list[Found]:
    prompt = [*range(40, 80), NAN_ID, 18]  # the ninth token it makes is a NaN
    found = await _one_of_many(prompt, "numerical_error", "only that row errors")
    async with entered(sim_fleet()) as running, client() as session:
        first = await stream(session, running.url, body(prompt, 30))
        again = await stream(session, running.url, body([*prompt, 60], 3))
    found.append(
        Found(
            "its KV never enters the prefix cache",
            f"{first.outcome}; asked again with the same beginning: {again.cached_tokens} tokens from the cache",
            not again.cached_tokens,
        )
    )
    return found


async def _one_of_many(prompt: list[int], code: str, promise: str) -> list[Found]:
    """Seven streams, and the one that fails in their midst."""
    async with entered(sim_fleet("--max-rows", "8")) as running, client() as session:
        alone = await whole(session, running.url, body(PLAIN, 60))
        heard = [Heard(0.0) for _ in range(7)]
        tasks = [asyncio.create_task(stream(session, running.url, body(PLAIN, 60), one)) for one in heard]
        await asyncio.gather(*(one.first.wait() for one in heard))
        asked_s = time.perf_counter()
        culprit = await stream(session, running.url, body(prompt, 30))
        took_s = time.perf_counter() - asked_s
        await asyncio.gather(*tasks)
    same = sum(one.is_whole and one.text == alone.text for one in heard)
    return [
        Found(
            promise,
            f"{culprit.outcome} after {took_s * 1e3:.0f} ms; of 7 beside it {same} are whole and to the letter as alone",
            culprit.code == code and same == 7,
        )
    ]


async def _few_pages(size: Size) -> list[Found]:
    """A third of the pages that eight answers need."""
    prompts = [[40 + n, *range(50, 80)] for n in range(8)]
    async with entered(sim_fleet("--max-rows", "8", "--num-pages", "32")) as running, client() as session:
        alone = [await whole(session, running.url, body(prompt, 100)) for prompt in prompts]
        started_s = time.perf_counter()
        together = await asyncio.gather(
            *(stream(session, running.url, body(prompt, 100)) for prompt in prompts)
        )
        took_s = time.perf_counter() - started_s
        giant = await stream(session, running.url, body([40] * 700, 10))
        probe = await probe_of(running)
        beat = await asyncio.to_thread(probe.beat)
        await asyncio.to_thread(probe.close)
    same = sum(one.text == other.text and one.is_whole for one, other in zip(together, alone, strict=True))
    preempted = beat.metrics.get("preemptions_total", beat.metrics.get("preempted_total", 0.0))
    return [
        Found.within(
            "preempted and resumed with the same text, no livelock",
            took_s,
            30.0,
            f"31 pages for 8 answers that need 72: {same} of 8 to the letter as alone; {preempted:g} preemptions",
            also=same == 8,
        ),
        Found(
            "what can never fit is refused",
            giant.outcome,
            giant.code in ("context_length_exceeded", "out_of_memory"),
        ),
    ]


async def _never_ends(size: Size) -> list[Found]:
    deadline_s = 2.0
    settings = {"request_deadline_s": str(deadline_s)}
    async with entered(sim_fleet(settings=settings)) as running, client() as session:
        limited = await stream(session, running.url, body("on and on", 50))
        endless = await stream(
            session, running.url, body("grammar", 40, guided_regex="[a-y]{1000,2000}z", ignore_eos=False)
        )
        asked_s = time.perf_counter()
        late = await stream(session, running.url, body("on and on", 12_000))
        took_s = time.perf_counter() - asked_s
    return [
        Found(
            "max_tokens ends it with a reason of its own",
            f"a model that never stops: {limited.finish}; a grammar that cannot end so soon: {endless.finish or endless.outcome}",
            limited.finish == endless.finish == "length",
        ),
        Found.within(
            f"the wall clock ends it ({deadline_s:g} s as set)",
            took_s,
            deadline_s + 1.5,
            f"after {late.num_tokens or 'some'} tokens: {late.finish or late.outcome}",
            also=late.num_terminal == 1
            and (late.code == "deadline_exceeded" or late.finish in ("deadline", "length")),
        ),
    ]


async def _split_characters(size: Size) -> list[Found]:
    """The simulated tokenizer has a token for every byte, and its model any order of them."""
    async with entered(sim_fleet(profile="small")) as running, client() as session:
        rng = random.Random(3)
        same = broken = 0
        for seed in range(30):
            asked = body([rng.randrange(20, 260) for _ in range(9)], 200) | {"temperature": 1.0, "seed": seed}
            at_once = await whole(session, running.url, asked)
            in_parts = await stream(session, running.url, asked)
            same += at_once.text == in_parts.text and in_parts.is_whole
            broken += "\ufffd" in in_parts.text
    return [
        Found(
            "the stream's pieces together are all ids decoded at once",
            f"{same} of 30 answers of 200 random bytes; {broken} of them held bytes of no character",
            same == 30 and broken > 0,
        )
    ]


def bad_bodies() -> dict[str, Any]:
    """What a client may send in a body, and must not; by name."""
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(64):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    schema = {"type": "json_schema", "json_schema": {"name": "deep", "schema": deep}}
    found: dict[str, Any] = {
        "a regex of a thousand thousands": {
            "prompt": "x",
            "max_tokens": 4,
            "guided_regex": "(a{1,1000}){1,1000}",
        },
        "a schema 64 deep": {"prompt": "x", "max_tokens": 4, "response_format": schema},
        "lists ten thousand deep": b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        "no JSON": b'{"prompt": "x',
        "no UTF-8": b'{"prompt": "\xff\xfe"}',
        "a prompt beyond the context": {"prompt": "x" * 100_000, "max_tokens": 4},
    }
    for name in ("max_tokens", "temperature", "top_p", "top_k", "n", "seed", "logprobs"):
        for value in (-1, 2**31, 2**63, "1", True, [1], float("nan")):
            found[f"{name}: {value!r}"] = {"prompt": "x", "max_tokens": 2, name: value}
    return found


async def _hostile(size: Size) -> list[Found]:
    settings = {"max_prompt_chars": "65536"}
    bomb_data = zlib.compress(b'{"prompt": "' + b"x" * BOMB_BYTES + b'"}')  # before anything is timed
    async with entered(sim_fleet(settings=settings)) as running, client() as session:
        pid = running.gateways[0].pid
        await whole(session, running.url, {"prompt": "x", "max_tokens": 2, "guided_regex": "[ab]{3}"})
        before_mb = _family_mb(pid)
        heard = Heard(0.0)
        neighbour = asyncio.create_task(stream(session, running.url, body("neighbour", 1500), heard))
        await heard.first.wait()
        slowest, odd, num_refused, most_mb = (0.0, ""), [], 0, 0.0
        bodies = bad_bodies()
        for name, bad in bodies.items():
            data = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
            began_s = time.perf_counter()
            status = await _post(session, running.url, data)
            slowest = max(slowest, (time.perf_counter() - began_s, name))
            num_refused += 400 <= status < 500
            if status >= 500 or status == 0:
                odd.append(f"{name}: {status}")
            most_mb = max(most_mb, _family_mb(pid) - before_mb)
        began_s = time.perf_counter()
        status, sent = await _endless_body(running.url)
        giant_s = time.perf_counter() - began_s
        most_mb = max(most_mb, _family_mb(pid) - before_mb)
        bomb = await _gzip_bomb(session, running.url, bomb_data)
        await neighbour
    return [
        Found.within(
            "a clear 4xx, or an answer, quickly",
            slowest[0],
            CLEAR_S,
            f"{len(bodies)} bodies: {num_refused} refused, none 5xx; the slowest: {slowest[1]}" if not odd else "; ".join(odd[:4]),
            also=not odd,
        ),
        Found(
            "a body without an end is refused, not read",
            f"status {status} after {sent / 1e6:.0f} of {BIG_BYTES / 1e6:.0f} MB in {giant_s:.1f} s; a gzip bomb: {bomb}",
            status in (400, 413) and sent < BIG_BYTES / 4 and 400 <= bomb < 500,
        ),
        Found("memory stays flat", f"the gateway and its helpers grew by {most_mb:.0f} MB at most", most_mb < MEMORY_MB),
        Found.within(
            "a stream beside it is undisturbed", heard.most_gap_s, 1.0, f"it is {heard.outcome}; its longest gap", also=heard.is_whole
        ),
    ]  # fmt: skip


def png(width: int, height: int, data: bytes | None = None) -> bytes:
    """A grey PNG whose header says so; with `data` None its pixels are there."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    pixels = zlib.compress(b"".join(b"\0" + b"\x80" * width for _ in range(height))) if data is None else data
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def gif(frames: int) -> bytes:
    """An animation of one pixel."""
    frame = b",\0\0\0\0\1\0\1\0\0\2\2D\1\0"
    return b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff" + frame * frames + b";"


async def _pictures(size: Size) -> list[Found]:
    """Of the embedded model, which takes pictures."""
    bad = {
        "50,000 by 50,000": png(50_000, 50_000, zlib.compress(b"\0" * 100)),
        "one pixel": png(1, 1),
        "a GIF of 10,000 frames": gif(10_000),
        "cut in the middle": png(64, 64)[:60],
        "no picture": b"GIF89a" + bytes(200),
        "a small PNG with 50 MB of pixels": png(100, 100, zlib.compress(bytes(50_000_000))),
    }
    good = png(64, 64)
    async with entered(fleet(["--model", "pocket"])) as running, client() as session:
        pid = running.gateways[0].pid
        fine = await _ask_picture(session, running.url, good)
        before_mb, most_mb, slowest, statuses = _family_mb(pid), 0.0, 0.0, {}
        for name, data in bad.items():
            began_s = time.perf_counter()
            statuses[name] = await _ask_picture(session, running.url, data)
            slowest = max(slowest, time.perf_counter() - began_s)
            most_mb = max(most_mb, _family_mb(pid) - before_mb)
        again = await _ask_picture(session, running.url, good)
    said = ", ".join(f"{name} {status}" for name, status in statuses.items())
    # A long animation may be taken as its first frame, and data beyond the last row be left; all others are no pictures.
    refused = all(
        400 <= status < 500
        for name, status in statuses.items()
        if "000 frames" not in name and "50 MB" not in name
    )
    return [
        Found.within(
            "hostile pictures: a clear 4xx, quickly",
            slowest,
            CLEAR_S + 2,
            said,
            also=refused and min(statuses.values()) > 0 and max(statuses.values()) < 500,
        ),
        Found(
            "memory stays flat, and pictures are taken as before",
            f"grew by {most_mb:.0f} MB at most; a good one: {fine} before, {again} after",
            most_mb < MEMORY_MB + 150 and fine == again == 200,
        ),
    ]


async def _ask_picture(session: aiohttp.ClientSession, url: str, data: bytes) -> int:
    image = "data:image/png;base64," + b64encode(data).decode()
    asked = {"image_url": image, "question": "What color is the circle?"}
    try:
        async with session.post(f"{url}/v1/query", json=asked) as response:
            await response.read()
            return response.status
    except (aiohttp.ClientError, OSError, TimeoutError):
        return 0


async def _post(session: aiohttp.ClientSession, url: str, data: bytes) -> int:
    headers = {"Content-Type": "application/json"}
    try:
        async with session.post(f"{url}/v1/completions", data=data, headers=headers) as response:
            await response.read()
            return response.status
    except (aiohttp.ClientError, OSError, TimeoutError):
        return 0


async def _gzip_bomb(session: aiohttp.ClientSession, url: str, data: bytes) -> int:
    headers = {"Content-Type": "application/json", "Content-Encoding": "deflate"}
    try:
        async with session.post(f"{url}/v1/completions", data=data, headers=headers) as response:
            await response.read()
            return response.status
    except (aiohttp.ClientError, OSError, TimeoutError):
        return 0


async def _endless_body(url: str) -> tuple[int, int]:
    """A gigabyte in chunks; the status, and how many bytes went out until it came."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    sent = 0
    answer = asyncio.ensure_future(reader.read(4096))
    try:
        while sent < BIG_BYTES and not answer.done():
            writer.write(piece)
            sent += 65536
            await asyncio.wait_for(writer.drain(), 10.0)
            await asyncio.sleep(0)
        head = await asyncio.wait_for(answer, 10.0)
    except (OSError, TimeoutError):
        head = answer.result() if answer.done() and not answer.exception() else b""
    writer.transport.abort()
    return (int(head[9:12]) if head.startswith(b"HTTP/1.1 ") else 0), sent


def _family_mb(pid: int) -> float:
    """Resident memory of a gateway and the processes that it started."""
    total = 0
    for one in [pid, *_children(pid)]:
        try:
            with open(f"/proc/{one}/statm") as file:
                total += int(file.read().split()[1]) * 4096
        except OSError:
            continue
    return total / 1e6


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except OSError:
        return []


FAULTS: Final = [
    Fault("no-memory", "out of memory at admission", _no_memory),
    Fault("nan", "NaN in one row", _nan),
    Fault("hostile", "giant or hostile input", _hostile),
    Fault("pictures", "hostile pictures", _pictures, needs="pocket"),
    Fault("split-characters", "token ids that end inside a character", _split_characters),
    Fault("never-ends", "a grammar that cannot finish, a model that never stops", _never_ends),
    Fault("few-pages", "page pool exhausted", _few_pages),
]
