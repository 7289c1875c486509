"""Owns the timing of one request and the adding up of all of them. Times come in as seconds; one task.

A request's latencies count from when it was *due*, not from when it was sent: if the server, or this client,
falls behind, waiting requests show it (no coordinated omission). How late the client itself was is recorded
apart, so that a slow client is never mistaken for a slow server.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from loadtest.histogram import Histogram
from loadtest.scenarios import Slo

OK = "ok"


class Call:
    """One request under way."""

    __slots__ = (
        "code",
        "due_s",
        "end_s",
        "first_s",
        "gaps_s",
        "last_s",
        "sent_s",
        "status",
        "surface",
        "tokens",
    )

    def __init__(self, surface: str, due_s: float) -> None:
        self.surface = surface
        self.due_s = due_s
        self.sent_s = due_s
        self.first_s = 0.0  # 0: no output yet
        self.last_s = 0.0
        self.end_s = 0.0
        self.gaps_s: list[float] = []
        self.tokens: int | None = None  # the server's own count, if it sends one
        self.status = 0  # HTTP's, where there was one
        self.code = ""  # how it ended; empty while it runs

    def on_text(self, now_s: float) -> None:
        """Output arrived."""
        if self.first_s == 0.0:
            self.first_s = now_s
        else:
            self.gaps_s.append(now_s - self.last_s)
        self.last_s = now_s

    def on_end(self, now_s: float, code: str = OK) -> None:
        """Note the request's end; only the first call counts."""
        if not self.code:
            self.code = code
            self.end_s = now_s

    @property
    def ended(self) -> bool:
        """Whether it has an outcome."""
        return bool(self.code)

    @property
    def num_chunks(self) -> int:
        """Pieces of output seen."""
        return len(self.gaps_s) + 1 if self.first_s else 0

    @property
    def num_tokens(self) -> int:
        """Output tokens: the server's count, else the pieces seen."""
        return self.num_chunks if self.tokens is None else self.tokens

    def is_good(self, slo: Slo) -> bool:
        """Whether it ended well and met the objective."""
        if self.code != OK or not self.first_s:
            return False
        if slo.ttft_ms and (self.first_s - self.due_s) * 1e3 > slo.ttft_ms:
            return False
        if slo.gap_ms and self.gaps_s and max(self.gaps_s) * 1e3 > slo.gap_ms:
            return False
        return not slo.total_ms or (self.end_s - self.due_s) * 1e3 <= slo.total_ms


@dataclass(slots=True)
class Tally:
    """Everything counted about one group of requests."""

    slo: Slo
    sent: int = 0
    ok: int = 0
    good: int = 0
    refused: int = 0  # answered with "too many requests"
    empty: int = 0  # ended well without a single piece of output
    tokens: int = 0
    chunks: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    ttft: Histogram = field(default_factory=Histogram)
    gap: Histogram = field(default_factory=Histogram)
    total: Histogram = field(default_factory=Histogram)
    refusal: Histogram = field(
        default_factory=Histogram
    )  # how long refused requests waited for their refusal

    def on_call(self, call: Call) -> None:
        """Count a finished call."""
        self.sent += 1
        self.chunks += call.num_chunks
        if call.code != OK:
            self.errors[call.code] += 1
            self.refused += call.status == 429 or call.code == "queue_full"
            if not call.first_s:
                self.refusal.record(call.end_s - call.due_s)
            return
        self.ok += 1
        self.tokens += call.num_tokens
        self.total.record(call.end_s - call.due_s)
        if not call.first_s:
            self.empty += 1
            return
        self.good += call.is_good(self.slo)
        self.ttft.record(call.first_s - call.due_s)
        for gap_s in call.gaps_s:
            self.gap.record(gap_s)

    def summary(self, elapsed_s: float) -> dict[str, Any]:
        """Counts, rates and latencies for the JSON report."""
        per_s = 1 / elapsed_s if elapsed_s > 0 else 0.0
        return {
            "sent": self.sent,
            "ok": self.ok,
            "good": self.good,
            "empty": self.empty,
            "refused_429": self.refused,
            "errors": dict(self.errors.most_common()),
            "throughput_rps": round(self.ok * per_s, 3),
            "goodput_rps": round(self.good * per_s, 3),
            "good_share": round(self.good / self.sent, 4) if self.sent else 0.0,
            "tokens": self.tokens,
            "tokens_per_s": round(self.tokens * per_s, 2),
            "chunks": self.chunks,
            "ttft_ms": self.ttft.summary(),
            "gap_ms": self.gap.summary(),
            "total_ms": self.total.summary(),
            "refusal_ms": self.refusal.summary(),
        }
