"""Owns what each API key has used, and whether it may use more: requests, tokens, answers in the making. Pure.

Requests and tokens are buckets that fill evenly up to a minute's worth (a token bucket), so that a key which was quiet may use
a minute's share at once and no more. A prompt is taken when it is accepted and an answer when it has ended: nobody is cut off
for having written too much; the debt is paid by waiting before the next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gateway.generation import RequestError, Usage
from gateway.keys import KeyEntry
from shared.errors import ErrorCode

_MINUTE_S = 60.0


class Bucket:
    """`limit` a minute."""

    __slots__ = ("_level", "_seen_s", "limit")

    def __init__(self, limit: int, now_s: float) -> None:
        self.limit = limit
        self._level = float(limit)
        self._seen_s = now_s

    def level(self, now_s: float) -> float:
        """What is left now; below 0 after more was taken than there was."""
        passed_s = max(0.0, now_s - self._seen_s)
        self._seen_s = now_s
        self._level = min(float(self.limit), self._level + passed_s * self.limit / _MINUTE_S)
        return self._level

    def take(self, number: float, now_s: float) -> None:
        """Take so much, whether it is there or not."""
        self._level = self.level(now_s) - number

    def wait_s(self, number: float, now_s: float) -> float:
        """Seconds until so much is there."""
        return max(0.0, number - self.level(now_s)) * _MINUTE_S / self.limit


@dataclass(slots=True)
class Totals:
    """What a key has used since this process started."""

    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0


@dataclass(slots=True)
class Meter:
    """One key's use. Times are of one monotonic clock, in seconds."""

    entry: KeyEntry
    requests: Bucket | None = None
    tokens: Bucket | None = None
    num_streams: int = 0
    totals: Totals = field(default_factory=Totals)

    def change(self, entry: KeyEntry, now_s: float) -> None:
        """Take over limits; a bucket whose limit stayed keeps its level."""
        self.entry = entry
        self.requests = _bucket(self.requests, entry.requests_per_minute, now_s)
        self.tokens = _bucket(self.tokens, entry.tokens_per_minute, now_s)

    def on_request(self, now_s: float) -> None:
        """Count one request. Raises `RequestError` RATE_LIMITED where it is one too many, or tokens are still owed."""
        if self.requests is not None and (wait_s := self.requests.wait_s(1, now_s)) > 0:
            raise self._refusal("requests_per_minute", f"{self.requests.limit} requests a minute", wait_s)
        if self.tokens is not None and (wait_s := self.tokens.wait_s(1, now_s)) > 0:
            raise self._refusal("tokens_per_minute", f"{self.tokens.limit} tokens a minute", wait_s)
        if self.requests is not None:
            self.requests.take(1, now_s)
        self.totals.requests += 1

    def on_submit(self, num_prompt: int, now_s: float) -> None:
        """Count one answer in, with its prompt's tokens. Raises `RequestError`."""
        entry = self.entry
        if entry.max_streams is not None and self.num_streams >= entry.max_streams:
            raise self._refusal("max_streams", f"{entry.max_streams} answers at once", 1.0)
        if self.tokens is not None:
            if num_prompt > self.tokens.limit:
                message = (
                    f"{num_prompt} tokens are more than this key may use in a minute, {self.tokens.limit}"
                )
                raise RequestError(ErrorCode.INVALID_REQUEST, message, param="tokens_per_minute")
            if (wait_s := self.tokens.wait_s(num_prompt, now_s)) > 0:
                raise self._refusal("tokens_per_minute", f"{self.tokens.limit} tokens a minute", wait_s)
            self.tokens.take(num_prompt, now_s)
        self.num_streams += 1
        self.totals.prompt_tokens += num_prompt

    def take_back(self, num_prompt: int, now_s: float) -> None:
        """What `on_submit` counted was not begun after all."""
        self.num_streams -= 1
        self.totals.prompt_tokens -= num_prompt
        if self.tokens is not None:
            self.tokens.take(-num_prompt, now_s)

    def on_end(self, usage: Usage, now_s: float) -> None:
        """Count one answer out, with the tokens that were made."""
        self.num_streams -= 1
        self.totals.generated_tokens += usage.completion_tokens
        if self.tokens is not None:
            self.tokens.take(usage.completion_tokens, now_s)

    def headers(self, now_s: float) -> dict[str, str]:
        """`x-ratelimit-…` as OpenAI's API has them; empty for a key without such limits."""
        said: dict[str, str] = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                said[f"x-ratelimit-limit-{name}"] = str(bucket.limit)
                said[f"x-ratelimit-remaining-{name}"] = str(max(0, int(bucket.level(now_s))))
                said[f"x-ratelimit-reset-{name}"] = _duration(bucket.wait_s(bucket.limit, now_s))
        return said

    def _refusal(self, limit: str, said: str, wait_s: float) -> RequestError:
        self.totals.refused += 1
        message = f"this key may use {said}; try again in {max(wait_s, 0.1):.1f} s"
        wait_s = max(0.05, math.ceil(wait_s * 1000) / 1000)
        return RequestError(ErrorCode.RATE_LIMITED, message, param=limit, retry_after_s=wait_s)


class Meters:
    """The meters of the file's keys, by their handles. A revoked key's answers in the making keep its meter themselves."""

    def __init__(self) -> None:
        self._meters: dict[str, Meter] = {}

    def set(self, entries: list[KeyEntry], now_s: float) -> None:
        """These are the keys now."""
        before = self._meters
        self._meters = {entry.handle: before.get(entry.handle) or Meter(entry) for entry in entries}
        for entry in entries:
            self._meters[entry.handle].change(entry, now_s)

    def of(self, handle: str) -> Meter | None:
        """The meter of a key; None for one that is not (or not any more) in the file."""
        return self._meters.get(handle)

    def all(self) -> list[Meter]:
        """Every meter, in the file's order."""
        return list(self._meters.values())


def _bucket(old: Bucket | None, limit: int | None, now_s: float) -> Bucket | None:
    if limit is None:
        return None
    return old if old is not None and old.limit == limit else Bucket(limit, now_s)


def _duration(seconds: float) -> str:
    """As OpenAI writes it: `6m0s`, `1s`, `20ms`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
