"""Owns `degas top`: reads servers again and again and shows what they do. Main thread, and a thread for each server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from rich.console import Console
from rich.live import Live

from degas.top.figures import Figures, figures
from degas.top.scrape import Scrape, fetch
from degas.top.view import render

FEWEST_COLUMNS: Final = 80
MAX_SERVERS: Final = 64


class Watch:
    """The servers and what they said last."""

    def __init__(self, urls: Sequence[str], key: str | None, timeout_s: float) -> None:
        self._urls = list(dict.fromkeys(urls))
        self._key = key
        self._timeout_s = timeout_s
        self._before: dict[str, Scrape] = {}

    def look(self, pool: ThreadPoolExecutor) -> Figures:
        """Read every server at once. One that is away, or comes back, is that server's figures and nobody else's."""
        now = list(pool.map(lambda url: fetch(url, self._key, self._timeout_s), self._urls))
        found = figures(now, self._before)
        self._before = {scrape.url: scrape for scrape in now}
        return found


def run(
    urls: Sequence[str],
    *,
    key: str | None,
    interval_s: float,
    once: bool,
    as_json: bool,
    say: Callable[[str], None] = print,
) -> int:
    """Show figures until interrupted, or once. The exit code of `once` is 1 where no server answered."""
    watch = Watch(urls, key, timeout_s=max(2.0, interval_s))
    with ThreadPoolExecutor(min(len(urls), MAX_SERVERS), "degas-top") as pool:
        try:
            if once:
                return _once(watch, pool, interval_s, as_json=as_json, say=say)
            if as_json:
                for found in _looks(watch, pool, interval_s):
                    say(json.dumps(found.to_json()))
            else:
                _live(watch, pool, interval_s)
        except KeyboardInterrupt:
            pass
        except BrokenPipeError:  # `degas top --json | head`
            return 1
    return 0


def _once(
    watch: Watch, pool: ThreadPoolExecutor, interval_s: float, *, as_json: bool, say: Callable[[str], None]
) -> int:
    """One frame of two readings, so that rates are of now; with an interval of 0 of one, since the start."""
    found = watch.look(pool)
    if interval_s and any(one.is_there for one in found.gateways):
        time.sleep(interval_s)
        found = watch.look(pool)
    if as_json:
        say(json.dumps(found.to_json(), indent=1))
    else:
        _console().print(render(found, _clock()))
    return 0 if any(one.is_there for one in found.gateways) else 1


def _looks(watch: Watch, pool: ThreadPoolExecutor, interval_s: float) -> Iterator[Figures]:
    while True:
        started_s = time.monotonic()
        yield watch.look(pool)
        time.sleep(max(0.05, interval_s - (time.monotonic() - started_s)))


def _live(watch: Watch, pool: ThreadPoolExecutor, interval_s: float) -> None:
    console = _console()
    with Live(
        console=console, screen=console.is_terminal, auto_refresh=False, vertical_overflow="crop"
    ) as live:
        for found in _looks(watch, pool, interval_s):
            live.update(render(found, _clock()), refresh=True)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=max(FEWEST_COLUMNS, console.width))


def _clock() -> str:
    return time.strftime("%H:%M:%S")
