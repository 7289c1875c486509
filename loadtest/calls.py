"""Owns the timing of one request and the adding up of all of them. Times come in as seconds; one task.

A request's latencies count from when it was *due*, not from when it was sent: if the server, or this client,
falls behind, waiting requests show it (no coordinated omission). How late the client itself was is recorded
apart, so that a slow client is never mistaken for a slow server.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from loadtest.histogram import Histogram
from loadtest.scenarios import Slo

OK: Final = "ok"
LEFT: Final = "left"
"""How a call ended whose client went away on purpose: neither an answer nor an error."""
MAX_MESSAGE_CHARS: Final = 300


class Call:
    """One request under way."""

    __slots__ = (
        "code",
        "due_s",
        "end_s",
        "first_s",
        "gaps_s",
        "is_cut",
        "kind",
        "last_s",
        "leave_after",
        "message",
        "pause_s",
        "pieces",
        "sent_s",
        "status",
        "surface",
        "tokens",
    )

    def __init__(self, surface: str, due_s: float, kind: str = "short") -> None:
        self.surface = surface
        self.kind = kind
        self.due_s = due_s
        self.sent_s = due_s
        self.first_s = 0.0  # 0: no output yet
        self.last_s = 0.0
        self.end_s = 0.0
        self.gaps_s: list[float] = []
        self.tokens: int | None = None  # the server's own count, if it sends one
        self.status = 0  # HTTP's, where there was one
        self.code = ""  # how it ended; empty while it runs
        self.message = ""  # what the server said of an error
        self.is_cut = False  # the answer ended by its length
        self.leave_after = 0  # pieces of output after which the client goes away; 0: it stays
        self.pause_s = 0.0  # between two reads, of a client that is slow on purpose
        self.pieces: list[str] | None = None  # the answer's text, where somebody wants it

    def on_text(self, now_s: float, text: str = "") -> None:
        """Output arrived."""
        if self.pieces is not None:
            self.pieces.append(text)
        if self.first_s == 0.0:
            self.first_s = now_s
        else:
            self.gaps_s.append(now_s - self.last_s)
        self.last_s = now_s

    def on_end(self, now_s: float, code: str = OK, message: str = "") -> None:
        """Note the request's end; only the first call counts."""
        if not self.code:
            self.code = code
            self.end_s = now_s
            self.message = message[:MAX_MESSAGE_CHARS]

    @property
    def wants_to_leave(self) -> bool:
        """Whether the client has seen as much as it stays for."""
        return bool(self.leave_after) and self.num_chunks >= self.leave_after

    @property
    def text(self) -> str:
        """The answer, if `pieces` were kept."""
        return "".join(self.pieces or ())

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
    left: int = 0  # the client went away on purpose
    tokens: int = 0
    chunks: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    first_errors: dict[str, str] = field(default_factory=dict)  # code -> what the first of them said
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
        if call.code == LEFT:
            self.left += 1
            if call.first_s:
                self.ttft.record(call.first_s - call.due_s)
            return
        if call.code != OK:
            self.errors[call.code] += 1
            if call.message:
                self.first_errors.setdefault(call.code, call.message)
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

    @property
    def good_share(self) -> float:
        """The good ones of those whose clients stayed."""
        stayed = self.sent - self.left
        return self.good / stayed if stayed else 0.0

    def add(self, other: Tally) -> None:
        """Take in everything that another process counted."""
        for name in ("sent", "ok", "good", "refused", "empty", "left", "tokens", "chunks"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.errors.update(other.errors)
        self.first_errors = {**other.first_errors, **self.first_errors}
        for name in ("ttft", "gap", "total", "refusal"):
            getattr(self, name).add(getattr(other, name))

    def summary(self, elapsed_s: float) -> dict[str, Any]:
        """Counts, rates and latencies for the JSON report."""
        per_s = 1 / elapsed_s if elapsed_s > 0 else 0.0
        return {
            "sent": self.sent,
            "ok": self.ok,
            "good": self.good,
            "empty": self.empty,
            "refused_429": self.refused,
            "left": self.left,
            "errors": dict(self.errors.most_common()),
            "first_errors": dict(self.first_errors),
            "throughput_rps": round(self.ok * per_s, 3),
            "goodput_rps": round(self.good * per_s, 3),
            "good_share": round(self.good_share, 4),
            "tokens": self.tokens,
            "tokens_per_s": round(self.tokens * per_s, 2),
            "chunks": self.chunks,
            "ttft_ms": self.ttft.summary(),
            "gap_ms": self.gap.summary(),
            "total_ms": self.total.summary(),
            "refusal_ms": self.refusal.summary(),
        }
