"""Owns `degas bench stages`: one worker beside two with roles, an encoder or a prefill worker and a decoder. Main thread.

Streams of text run while others ask about new pictures, or with new long prompts. Both sides get the same cores in all: the
question is whether a process that encodes, or reads prompts, beside one that decodes pays.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

import aiohttp

from loadtest.bench.cluster import Cluster, cluster
from loadtest.histogram import Histogram
from loadtest.pictures import draw_picture
from loadtest.tables import Figures

WARM_UP_S: Final = 1.0
TIMEOUT_S: Final = 60.0
RANDOM_MODEL: Final = (
    "30m"  # of `loadtest.peers.checkpoint`: what is served for long prompts unless a model is given
)


@dataclass(frozen=True, slots=True)
class StagesLoad:
    """What is asked of both sides; `check` before use."""

    model: str = ""  # empty: pocket, or for long prompts a random model of 30M parameters
    streams: int = 4  # of text, each asking again as soon as it has its answer
    askers: int = 4  # about a picture each, a new one every time; or with a long prompt
    tokens: int = 64  # of an answer in text
    prompt_tokens: int = 0  # of a long prompt; 0: pictures
    picture_px: int = 224
    seconds: float = 8.0
    rounds: int = 3
    threads: int = 2  # in all, of each side
    flags: tuple[str, ...] = ()  # of every worker

    def check(self) -> None:
        """Raise ValueError naming the option and a safe value."""
        if not (0 <= self.streams <= 256 and 0 <= self.askers <= 256 and self.streams + self.askers):
            raise ValueError("--streams and --askers lie in 0 … 256, not both 0; 4 is a safe value")
        if not (self.seconds > 0 and self.rounds > 0 and 1 <= self.tokens <= 4096):
            raise ValueError("--seconds and --rounds are above 0, --tokens in 1 … 4096")
        if self.threads < 2:
            raise ValueError("--threads is at least 2: one for each of the two workers with roles")
        if self.prompt_tokens and not 64 <= self.prompt_tokens <= 1 << 20:
            raise ValueError("--prefill is 0, for pictures, or at least 64 tokens; 1500 is a safe value")

    @property
    def kind(self) -> str:
        """What the askers ask with."""
        return "long prompts" if self.prompt_tokens else "pictures"


@dataclass(slots=True)
class Turn:
    """One side's figures of one round."""

    tokens: int = 0  # of text
    asked: int = 0  # questions about pictures, or long prompts, that were answered
    failed: int = 0
    seconds: float = 0.0
    gaps: Histogram = field(default_factory=Histogram)  # between two parts of a text
    text_first: Histogram = field(default_factory=Histogram)
    asked_first: Histogram = field(default_factory=Histogram)  # from question to first part of the answer


@dataclass(frozen=True, slots=True)
class StagesRow:
    """One side over all rounds: medians of each round's own figures, in ms and per second."""

    side: str
    text_tokens_per_s: float
    asked_per_s: float
    gap_p50_ms: float
    gap_p99_ms: float
    text_first_p50_ms: float
    asked_first_p50_ms: float
    asked_first_p99_ms: float
    failed: int
    done_elsewhere: float
    moved_bytes: float

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def measure(load: StagesLoad) -> list[StagesRow]:
    """Both sides turn about; each stands idle, its processes waiting, while the other is asked. Raises ValueError."""
    load.check()
    with _served(load) as load:
        common = ("--model", load.model, *load.flags)
        one = {"worker": (*common, "--threads", str(load.threads))}
        half = str(max(1, load.threads // 2))
        rest = str(load.threads - int(half))
        helper, role = ("prefill", "prefill") if load.prompt_tokens else ("encoder", "encode")
        two = {
            helper: (*common, "--role", role, "--threads", half),
            "worker": (*common, "--role", "decode", "--threads", rest),
        }
        seeds = itertools.count(1)
        names = "one worker", f"{helper} + decoder"
        turns: dict[str, list[Turn]] = {name: [] for name in names}
        settings = {"DEGAS_GATEWAY_IMAGE_PROCESSES": "1"}
        if load.prompt_tokens:
            settings["DEGAS_GATEWAY_PREFILL_TOKENS"] = str(load.prompt_tokens // 2)
        with cluster(one, gateway_settings=settings) as a, cluster(two, gateway_settings=settings) as b:
            sides = dict(zip(names, (a, b), strict=True))
            for _ in range(load.rounds):
                for name, server in sides.items():
                    turns[name].append(asyncio.run(_turn(server, load, lambda: next(seeds))))
            return [_row(name, turns[name], server.metrics()) for name, server in sides.items()]


@contextmanager
def _served(load: StagesLoad) -> Iterator[StagesLoad]:
    """The load with the model that is served: for long prompts, where none is named, a random one in a folder of its own."""
    if load.model or not load.prompt_tokens:
        yield replace(load, model=load.model or "pocket")
        return
    from loadtest.peers.checkpoint import write_checkpoint

    with tempfile.TemporaryDirectory(prefix="degas-bench-") as folder:
        write_checkpoint(Path(folder), RANDOM_MODEL)
        yield replace(load, model=folder)


async def _turn(server: Cluster, load: StagesLoad, next_seed: Callable[[], int]) -> Turn:
    turn = Turn()
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(server.url, timeout=timeout) as session:
        from_s = time.perf_counter() + WARM_UP_S
        until_s = from_s + load.seconds
        text = [_keep_asking(session, load, turn, from_s, until_s, None) for _ in range(load.streams)]
        others = [_keep_asking(session, load, turn, from_s, until_s, next_seed) for _ in range(load.askers)]
        await asyncio.gather(*text, *others)
    turn.seconds = load.seconds
    return turn


async def _keep_asking(
    session: aiohttp.ClientSession,
    load: StagesLoad,
    turn: Turn,
    from_s: float,
    until_s: float,
    next_seed: Callable[[], int] | None,
) -> None:
    while time.perf_counter() < until_s:
        body: dict[str, Any] = {"model": None, "stream": True, "temperature": 0}
        path = "/v1/chat/completions"
        if next_seed is not None and load.prompt_tokens:
            rng = random.Random(next_seed())
            ids = [rng.randrange(100, 500) for _ in range(load.prompt_tokens)]
            path = "/v1/completions"
            body |= {"prompt": ids, "max_tokens": 16, "ignore_eos": True}
        elif next_seed is None:
            body |= {"messages": [{"role": "user", "content": "Tell me of shapes and colours."}]}
            body |= {"max_tokens": load.tokens, "ignore_eos": True}
        else:
            picture = await asyncio.to_thread(draw_picture, next_seed(), size_px=load.picture_px)
            content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": picture.data_url}}]
            content.append({"type": "text", "text": picture.questions[0]})
            body |= {"messages": [{"role": "user", "content": content}], "max_tokens": 16}
        began_s = time.perf_counter()
        try:
            times = await _read(session, path, body)
        except (aiohttp.ClientError, TimeoutError):
            turn.failed += 1
            await asyncio.sleep(0.05)
            continue
        if began_s >= from_s and times and times[-1] <= until_s:
            _count(turn, began_s, times, is_text=next_seed is None)


async def _read(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> list[float]:
    """When each part of a streamed answer came. Raises `aiohttp.ClientError` also for an answer that is none."""
    times: list[float] = []
    name = b'"text":"' if path == "/v1/completions" else b'"content":"'
    async with session.post(path, data=json.dumps(body),
                            headers={"Content-Type": "application/json"}) as answer:  # fmt: skip
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                if b'"error"' in line[:16]:
                    raise aiohttp.ClientPayloadError("the stream ended with an error")
                if name in line and name + b'"' not in line:
                    times.append(time.perf_counter())
    return times


def _count(turn: Turn, began_s: float, times: Sequence[float], *, is_text: bool) -> None:
    first_s = times[0] - began_s
    if not is_text:
        turn.asked += 1
        turn.asked_first.record(first_s)
        return
    turn.tokens += len(times)
    turn.text_first.record(first_s)
    for before_s, at_s in itertools.pairwise(times):
        turn.gaps.record(at_s - before_s)


def _row(side: str, turns: Sequence[Turn], metrics: dict[str, float]) -> StagesRow:
    def middle(value: Callable[[Turn], float]) -> float:
        return round(median(value(turn) for turn in turns), 3)

    def at(of: Callable[[Turn], Histogram], percentile: float) -> float:
        return middle(lambda turn: of(turn).percentile_ms(percentile) if len(of(turn)) else 0.0)

    return StagesRow(
        side,
        middle(lambda turn: turn.tokens / turn.seconds),
        middle(lambda turn: turn.asked / turn.seconds),
        at(lambda turn: turn.gaps, 50),
        at(lambda turn: turn.gaps, 99),
        at(lambda turn: turn.text_first, 50),
        at(lambda turn: turn.asked_first, 50),
        at(lambda turn: turn.asked_first, 99),
        sum(turn.failed for turn in turns),
        metrics.get('degas_encoder_pictures_total{outcome="encoded"}', 0.0)
        + _sum(metrics, "degas_worker_prefills_total{", 'kind="done"'),
        metrics.get("degas_encoded_picture_bytes_total", 0.0)
        + _sum(metrics, "degas_worker_given_page_bytes_total{"),
    )


def _sum(metrics: dict[str, float], name: str, label: str = "") -> float:
    return sum(value for full, value in metrics.items() if full.startswith(name) and label in full)


def stages_table(rows: Sequence[StagesRow], load: StagesLoad) -> Figures:
    """A line for each side, and the second in relation to the first."""
    names = (
        "",
        "text tokens/s",
        f"{load.kind}/s",
        "gap p50 / p99 ms",
        "text's first part p50 ms",
        "their first part p50 / p99 ms",
        "failed",
        "done elsewhere",
        "MB moved",
    )
    what = f"new prompts of {load.prompt_tokens} tokens" if load.prompt_tokens else "new pictures"
    model = load.model or (f"a random model ({RANDOM_MODEL})" if load.prompt_tokens else "pocket")
    title = f"{load.streams} streams of text, {load.askers} askers of {what}, {model}, "
    table = Figures(title + f"{load.threads} threads of {os.cpu_count()} cores", names, left=("",))
    for row in rows:
        table.add(
            row.side,
            f"{row.text_tokens_per_s:.0f}",
            f"{row.asked_per_s:.1f}",
            f"{row.gap_p50_ms:.1f} / {row.gap_p99_ms:.1f}",
            f"{row.text_first_p50_ms:.0f}",
            f"{row.asked_first_p50_ms:.0f} / {row.asked_first_p99_ms:.0f}",
            str(row.failed),
            f"{row.done_elsewhere:.0f}",
            f"{row.moved_bytes / 1e6:.1f}",
        )
    return table
