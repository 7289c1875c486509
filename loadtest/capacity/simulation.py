"""Owns the simulation of a cluster: requests one by one through gateways, encoders, prefills and decoding workers. No clock of its own.

What is kept: queues and their order, whose row is free, that rows share a step, that prompts hold rows up, refusals. What is
not: single steps, pages, caches, the network of the clients. Members of a stage are alike. A cluster of thousands is simulated
as a part of it with the same use of every stage, so that the result takes seconds.
"""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass, replace
from typing import Final

from loadtest.capacity.cluster import Cluster, Load, Stage, breaks_first, context_of, prompt_of, stages
from loadtest.capacity.costs import Costs
from loadtest.capacity.members import FOREVER, PAGE_TOKENS, Emptiest, Row, Station, Worker

MAX_REQUESTS: Final = 120_000
MIN_REQUESTS: Final = 4_000
MOST_WORKERS: Final = 64  # that decode, in the simulated part
WARM_UP: Final = 0.3  # of the requests do not count: the cluster begins empty
FEW: Final = 200  # answered requests below which percentiles say little

PLACE, JOIN, BEGIN, NEXT, LEAVE = range(5)  # what may happen: to a request, and to a worker


@dataclass(frozen=True, slots=True)
class Objective:
    """What a request must meet to count as good. Zero: not looked at."""

    ttft_ms: float = 1000.0
    gap_ms: float = 100.0  # mean gap of the answer


@dataclass(slots=True)
class Request:
    """One request under way; seconds of the simulation."""

    arrived_s: float
    output_tokens: float
    has_picture: bool
    gateway: int = 0
    begun_s: float = 0.0
    ended_s: float = 0.0
    worker: int = -1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulation says."""

    load: Load
    cluster: Cluster
    seconds: float  # simulated, after the warm-up
    num_requests: int
    simulated_part: float  # of the cluster: 1 is all of it
    answered_per_s: float
    good_per_s: float
    refused_share: float
    ttft_ms: dict[str, float]
    gap_ms: dict[str, float]
    total_ms: dict[str, float]
    use: dict[str, float]  # of each stage's members' time; of image processes and gateways: of their cores
    rows: float  # mean rows of a decoding worker
    max_rows: int  # that it may have, by its setting or its memory
    stages: list[Stage]

    @property
    def first(self) -> Stage:
        """What breaks first."""
        return breaks_first(self.stages)


def part_of(cluster: Cluster, costs: Costs) -> tuple[Cluster, Costs, float]:
    """A smaller cluster with the same use of every stage, its costs, and how many such parts make the whole.

    Counts are divided and rounded; a stage whose count was rounded gets quicker or slower members, so that together they
    do what its part should.
    """
    counts = [cluster.gateways, cluster.encoders, cluster.prefills, cluster.num_decoding]
    factor = max(1.0, min(cluster.num_decoding / MOST_WORKERS, *(count for count in counts if count)))
    if factor == 1.0:
        return cluster, costs, 1.0

    def cut(count: int) -> tuple[int, float]:
        whole = max(1, round(count / factor)) if count else 0
        return whole, whole * factor / count if count else 1.0

    gateways, gateway_x = cut(cluster.gateways)
    encoders, encoder_x = cut(cluster.encoders)
    prefills, prefill_x = cut(cluster.prefills)
    decoding, decode_x = cut(cluster.num_decoding)
    device, gateway = costs.device, costs.gateway
    # Whoever does the work has its speed.
    crop_x = encoder_x if encoders else (prefill_x if prefills else decode_x)
    prompt_x = prefill_x if prefills else decode_x
    smaller = replace(
        costs,
        device=replace(
            device,
            step_ms={rows: ms * decode_x for rows, ms in device.step_ms.items()},
            crop_ms=device.crop_ms * crop_x,
            prefill_us_per_token=device.prefill_us_per_token * prompt_x,
            prefill_ms=device.prefill_ms * prompt_x,
        ),
        gateway=replace(
            gateway,
            request_us=gateway.request_us * gateway_x,
            token_us=gateway.token_us * gateway_x,
            refusal_us=gateway.refusal_us * gateway_x,
            picture_ms=gateway.picture_ms * gateway_x,
        ),
    )
    is_split = cluster.is_split
    part = replace(
        cluster,
        gateways=gateways,
        encoders=encoders,
        prefills=prefills,
        workers=0 if is_split else decoding,
        decodes=decoding if is_split else 0,
    )
    return part, smaller, factor


def simulate(
    load: Load,
    cluster: Cluster,
    costs: Costs,
    objective: Objective | None = None,
    *,
    seed: int = 1,
    num_requests: int = 0,
) -> Outcome:
    """Run it. Raises ValueError for a load or a cluster that cannot be. `num_requests` 0: as many as settle it."""
    load.check()
    cluster.check()
    part, smaller, factor = part_of(cluster, costs)
    part_load = replace(load, rate=load.rate / factor)
    asked = num_requests or _enough(part_load, part, smaller)
    run = _Run(part_load, part, smaller, seed)
    run.run(asked)
    return run.outcome(load, cluster, costs, factor, objective or Objective())


def _enough(load: Load, cluster: Cluster, costs: Costs) -> int:
    """Several times what is under way at once, as far as the time allows."""
    device = costs.device
    rows = max(1, device.rows(context_of(load, costs)))
    answer_s = load.output_tokens * device.step_s(rows) + device.prefill_s(context_of(load, costs))
    under_way = load.rate * answer_s + cluster.num_decoding * rows
    return int(min(MAX_REQUESTS, max(MIN_REQUESTS, 8 * under_way)))


class _Run:
    """The state of one simulation."""

    def __init__(self, load: Load, cluster: Cluster, costs: Costs, seed: int) -> None:
        self._load, self._cluster, self._costs = load, cluster, costs
        self._rng = random.Random(seed)
        device = costs.device
        self._num_rows = device.rows(context_of(load, costs))
        # A balancer spreads connections over gateways without looking; each has its own picture processes.
        self._gateways = [Station(1) for _ in range(cluster.gateways)]
        self._pictures = [Station(costs.gateway.image_processes) for _ in range(cluster.gateways)]
        self._encoders = Station(cluster.encoders) if cluster.encoders else None
        self._prefills = Station(cluster.prefills) if cluster.is_split else None
        self._workers = [
            Worker(device, max(1, self._num_rows), cluster.queue) for _ in range(cluster.num_decoding)
        ]
        self._emptiest = Emptiest(len(self._workers))
        self._requests: list[Request] = []
        self._rows: dict[int, Row] = {}  # on their way to a worker, or in prefill
        self._events: list[tuple[float, int, int, int]] = []  # when, what, whom, version
        self._warm_at = 0
        self._num_refused = 0  # after the warm-up
        self._busy_at_warm: dict[str, float] = {}
        self._warm_s = self._end_s = 0.0

    def run(self, num_requests: int) -> None:
        """All arrivals, and what is due until the last of them."""
        load, rng, events = self._load, self._rng, self._events
        self._warm_at = int(num_requests * WARM_UP)
        at_s = 0.0
        for number in range(num_requests):
            at_s += rng.expovariate(load.rate)
            while events and events[0][0] <= at_s:
                self._happen(*heapq.heappop(events))
            if number == self._warm_at:
                self._warm_s, self._busy_at_warm = at_s, self._busy(at_s)
            self._arrive(at_s, number)
        self._end_s = at_s
        while events and events[0][0] <= at_s:
            self._happen(*heapq.heappop(events))

    def _happen(self, at_s: float, what: int, whom: int, version: int) -> None:
        if what == NEXT:
            worker = self._workers[whom]
            if worker.version == version:
                worker.advance(at_s)
                self._end(at_s, whom, worker, worker.end())
        elif what == LEAVE:
            worker = self._workers[whom]
            self._emptiest.change(whom, worker.load, worker.load - 1)
            worker.release()
            self._fill(at_s, whom, worker)
        elif what == PLACE:
            self._place(at_s, whom)
        elif what == JOIN:
            self._join(at_s, whom)
        else:
            self._begin(at_s, whom)

    def _arrive(self, now_s: float, number: int) -> None:
        load, rng, costs = self._load, self._rng, self._costs.gateway
        mean = load.output_tokens
        tokens = mean if load.fixed_lengths or mean <= 1 else _geometric(rng, mean)
        request = Request(
            now_s, tokens, rng.random() < load.picture_share, rng.randrange(len(self._gateways))
        )
        self._requests.append(request)
        at_s = self._gateways[request.gateway].take(now_s, costs.refusal_us / 1e6)
        if request.has_picture:
            at_s = self._pictures[request.gateway].take(at_s, costs.picture_ms / 1e3)
        heapq.heappush(self._events, (at_s, PLACE, number, 0))

    def _place(self, now_s: float, number: int) -> None:
        """To the worker with the fewest requests, by way of the encoders and prefills if there are any; or refused."""
        request, costs, load = self._requests[number], self._costs, self._load
        which = self._emptiest.lowest()
        worker = self._workers[which]
        if worker.is_full or not self._num_rows:
            self._num_refused += number >= self._warm_at
            return
        gateway, device = costs.gateway, costs.device
        head_s = max(0.0, gateway.request_us - gateway.refusal_us) / 1e6
        tail_s = request.output_tokens * gateway.token_us / 1e6
        at_s = self._gateways[request.gateway].take(now_s, head_s + tail_s, head_s)
        prompt = prompt_of(load, costs, has_picture=request.has_picture)
        work_s, encode_s = device.prefill_s(prompt), 0.0
        if request.has_picture:
            encode_s = device.encode_s(load.crops)
        if self._encoders is not None and encode_s:
            at_s = self._encoders.take(at_s, encode_s) + costs.link.seconds(device.feature_mb * 1e6)
        else:
            work_s += encode_s
        if self._prefills is not None:
            at_s = self._prefills.take(at_s, work_s)
            # Pages leave as each chunk is computed: what of them is still to come when the last is through.
            num_bytes = prompt * device.kv_bytes_per_token
            last_bytes = min(prompt, device.mixed_tokens) * device.kv_bytes_per_token
            at_s += max(costs.link.seconds(last_bytes), costs.link.seconds(num_bytes) - work_s)
            prompt = min(prompt, PAGE_TOKENS)  # the worker computes the last page's rest, and the first token
            work_s = device.prefill_s(prompt)
        self._rows[number] = Row(number, request.output_tokens - 1, work_s, prompt)
        request.worker = which
        self._emptiest.change(which, worker.load, worker.load + 1)
        worker.num_coming += 1
        heapq.heappush(self._events, (at_s, JOIN, number, 0))

    def _join(self, now_s: float, number: int) -> None:
        which = self._requests[number].worker
        worker = self._workers[which]
        worker.num_coming -= 1
        worker.waiting.append(self._rows[number])
        self._fill(now_s, which, worker)

    def _fill(self, now_s: float, which: int, worker: Worker) -> None:
        """Whoever waits takes what rows are free."""
        worker.advance(now_s)
        while worker.waiting and worker.num_rows < worker.max_rows:
            row = worker.waiting.popleft()
            first_s = worker.admit(row)
            heapq.heappush(self._events, (first_s, BEGIN, row.number, 0))
        self._schedule(which, worker)

    def _begin(self, now_s: float, number: int) -> None:
        """A request's first token is out where its row is."""
        request = self._requests[number]
        which = request.worker
        worker = self._workers[which]
        worker.advance(now_s)
        if not request.begun_s:
            request.begun_s = now_s
        row = self._rows.pop(number)
        worker.begin(row)
        if row.tokens <= 0:
            worker.drop(number)
            self._end(now_s, which, worker, number)
            return
        self._schedule(which, worker)

    def _end(self, now_s: float, which: int, worker: Worker, number: int) -> None:
        self._requests[number].ended_s = now_s
        heapq.heappush(self._events, (now_s + worker.turnover_s, LEAVE, which, 0))
        self._schedule(which, worker)

    def _schedule(self, which: int, worker: Worker) -> None:
        next_s = worker.next_end_s()
        if next_s < FOREVER:
            heapq.heappush(self._events, (next_s, NEXT, which, worker.version))

    def _busy(self, now_s: float) -> dict[str, float]:
        """Seconds that each stage's members have worked so far; what they have taken on counts when it is done."""
        found = {
            "gateways": sum(member.done_s(now_s) for member in self._gateways),
            "image processes": sum(member.done_s(now_s) for member in self._pictures),
        }
        if self._encoders is not None:
            found["encoders"] = self._encoders.done_s(now_s)
        if self._prefills is not None:
            found["prefills"] = self._prefills.done_s(now_s)
        found["decoding"] = sum(worker.busy_s for worker in self._workers)
        return found

    def outcome(
        self, load: Load, cluster: Cluster, costs: Costs, factor: float, objective: Objective
    ) -> Outcome:
        """What the requests after the warm-up saw."""
        seconds = self._end_s - self._warm_s
        counted = self._requests[self._warm_at :]
        ended = [one for one in self._requests if one.ended_s >= self._warm_s and one.ended_s]
        begun = [one for one in counted if one.begun_s]
        whole = [one for one in counted if one.ended_s]
        ttft = [one.begun_s - one.arrived_s for one in begun]
        gaps = [
            (one.ended_s - one.begun_s) / (one.output_tokens - 1) for one in whole if one.output_tokens > 1
        ]
        num_good = sum(_is_good(one, objective) for one in ended)
        busy, num = self._busy(self._end_s), len(self._workers)
        members = {
            "gateways": len(self._gateways),
            "image processes": sum(one.num for one in self._pictures),
            "encoders": self._cluster.encoders,
            "prefills": self._cluster.prefills,
            "decoding": num,
        }
        return Outcome(
            load=load,
            cluster=cluster,
            seconds=seconds,
            num_requests=len(self._requests),
            simulated_part=1 / factor,
            answered_per_s=len(ended) / seconds * factor,
            good_per_s=num_good / seconds * factor,
            refused_share=self._num_refused / max(1, len(counted)),
            ttft_ms=_percentiles(ttft),
            gap_ms=_percentiles(gaps),
            total_ms=_percentiles([one.ended_s - one.arrived_s for one in whole]),
            use={
                name: min(1.0, (spent_s - self._busy_at_warm[name]) / seconds / members[name])
                for name, spent_s in busy.items()
            },
            rows=sum(one.ended_s - max(self._warm_s, one.begun_s) for one in ended) / seconds / num,
            max_rows=self._num_rows,
            stages=stages(load, cluster, costs),
        )


def _is_good(request: Request, objective: Objective) -> bool:
    if objective.ttft_ms and (request.begun_s - request.arrived_s) * 1e3 > objective.ttft_ms:
        return False
    if not objective.gap_ms or request.output_tokens <= 1:
        return True
    gap_s = (request.ended_s - request.begun_s) / (request.output_tokens - 1)
    return gap_s * 1e3 <= objective.gap_ms


def _geometric(rng: random.Random, mean: float) -> float:
    """At least 1, of this mean: an answer that ends at each token with the same chance."""
    return 1 + math.floor(math.log(1.0 - rng.random()) / math.log(1.0 - 1.0 / mean))


def _percentiles(seconds: list[float]) -> dict[str, float]:
    """In milliseconds; empty where there is nothing."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "mean": 1e3 * sum(ordered) / len(ordered),
        **{f"p{p}": 1e3 * ordered[round(last * p / 100)] for p in (50, 90, 99)},
    }
