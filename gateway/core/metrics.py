"""Owns the gateway's own counters and histograms. Gateway's loop.

Counting happens on the hot path, so it is plain arithmetic on lists; `gateway.scrape` makes Prometheus families of
it when somebody scrapes. Labels are bounded sets (reason, code, worker number, model id), never user data.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from gateway.core.costs import Ledger
from gateway.generation import End
from shared.errors import ErrorCode
from shared.histogram import Histogram

# The gateway's own histograms, each with its help text.
HISTOGRAMS: Final = {
    "time_to_first_token_seconds": "Accepted request to first token",
    "inter_token_latency_seconds": "Between two tokens of one stream",
    "e2e_request_latency_seconds": "Accepted request to terminal event",
    "request_queue_time_seconds": "Waiting in the worker",
    "request_prefill_time_seconds": "Reading the prompt",
    "request_decode_time_seconds": "From first token to last",
    "encoder_wait_seconds": "Waiting for pictures that encoders encode, where a request had such",
}


class Metrics:
    """The gateway's own figures."""

    def __init__(self) -> None:
        self.accepted: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.http: Counter[tuple[str, int]] = Counter()
        self.num_workers_lost = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.num_slow_clients = 0
        self.pictures: Counter[str] = Counter()  # at encoders, by what became of them
        self.prefills: Counter[str] = Counter()  # prompts for prefill workers, by the choice: sent, full
        self.feature_bytes = 0  # of encoded pictures, sent to workers
        self.ledger = Ledger()
        self.histograms = {name: Histogram() for name in HISTOGRAMS}
        self._ttft = self.histograms["time_to_first_token_seconds"]
        self._gap = self.histograms["inter_token_latency_seconds"]

    # ------------------------------------------------------------ counting

    def on_accepted(self, model_id: str) -> None:
        """A request has a place."""
        self.accepted[model_id] += 1

    def on_refused(self, code: ErrorCode) -> None:
        """A request was turned away at admission, here or by the worker."""
        self.refused[code.value] += 1

    def on_first_token(self, wait_s: float) -> None:
        """Time to first token of one stream."""
        self._ttft.observe(wait_s)

    def on_token_gap(self, gap_s: float, count: int = 1) -> None:
        """Time between two tokens of one stream; of `count` streams with the same."""
        self._gap.observe(gap_s, count)

    def on_end(self, end: End, elapsed_s: float) -> None:
        """A request's terminal event."""
        usage = end.usage
        self.ended[end.reason.value] += 1
        if end.error is not None:
            self.errors[end.error.code.value] += 1
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.generated_tokens += usage.completion_tokens
        self.histograms["e2e_request_latency_seconds"].observe(elapsed_s)
        self.histograms["request_queue_time_seconds"].observe(usage.queue_s)
        self.histograms["request_prefill_time_seconds"].observe(usage.prefill_s)
        self.histograms["request_decode_time_seconds"].observe(usage.decode_s)

    def on_staged(self, wait_s: float) -> None:
        """A request waited so long for its pictures before it was sent."""
        self.histograms["encoder_wait_seconds"].observe(wait_s)

    def on_worker_lost(self) -> None:
        """A worker died, fell silent or restarted."""
        self.num_workers_lost += 1

    def on_response(self, route: str, status: int) -> None:
        """An HTTP answer is out; `route` is the matched route's pattern, never the path."""
        self.http[route, status] += 1
