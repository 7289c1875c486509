"""Owns which worker takes a request: who serves its model and has room, and the refusal if none has. Gateway's loop."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Final

from gateway.core.catalog import AnnouncedModel
from gateway.core.flights import Flight, Flights
from gateway.core.worker_link import WorkerLink
from gateway.decisions.admission import Admission, Occupancy
from gateway.decisions.affinity import Candidate, home
from gateway.decisions.held import Held
from gateway.generation import RequestError
from shared import protocol as wire
from shared.errors import ErrorCode
from shared.protocol import FeatureFormat, PageFormat, PrefillAt

AHEAD: Final = 2001  # what a request that is tried again gains in priority: clients may ask for −1000 to 1000
OWN_WAIT_S: Final = 5.0  # how long a suspect waits for a worker of its own


@dataclass(slots=True)
class Worker:
    """One worker: its link, and the requests that this gateway has there."""

    key: int
    link: WorkerLink
    flights: Flights
    occupancy: Occupancy
    model: AnnouncedModel | None = None
    is_leaving: bool = False  # it turned a request away because it drains, before its heartbeat said so
    orphans: list[int] = field(
        default_factory=list
    )  # sequences that the gateway gave up and the worker may still run
    held: Held = field(default_factory=lambda: Held(0))  # pictures whose features it has
    num_pictures: int = 0  # of this gateway, being encoded there
    num_prompts: int = 0  # of this gateway, being computed there for other workers

    @property
    def takes_work(self) -> bool:
        """Whether the worker serves and does not drain."""
        beat = self.link.beat
        return (
            not self.is_leaving and self.link.ready is not None and not (beat is not None and beat.draining)
        )

    @property
    def model_id(self) -> str | None:
        """What it serves, or encodes pictures for; None until it was there."""
        if self.model is not None:
            return self.model.card.model_id
        return self.link.ready.model.model_id if self.link.ready is not None else None

    @property
    def serves_requests(self) -> bool:
        """Whether it takes work, and whole requests."""
        return self.takes_work and not self.is_helper

    @property
    def is_helper(self) -> bool:
        """Whether the worker that serves does so for other workers only: it encodes pictures or computes prompts."""
        ready = self.link.ready
        return ready is not None and ready.role in ("encode", "prefill")

    @property
    def takes_features(self) -> FeatureFormat | None:
        """What pictures may be that come to it encoded; None: they must not."""
        ready = self.link.ready
        return ready.features if ready is not None and ready.role == "decode" else None

    @property
    def takes_pages(self) -> PageFormat | None:
        """What pages it takes from prefill workers; None: none."""
        ready = self.link.ready
        return ready.pages if ready is not None and ready.role == "decode" else None

    @property
    def num_active(self) -> int:
        """Requests there: this gateway's as of now, and the others' as the last heartbeat said; or the pictures and prompts that
        this gateway has encoded or computed there, if these are more.

        The heartbeat's own sum would count those that have left since: a worker that drained would look full until the next one.
        """
        held = self.occupancy.num_active + self.occupancy.num_others
        return max(held, self.num_pictures, self.num_prompts)

    @property
    def load(self) -> float:
        """The share of its places that are taken; 1 is full."""
        return self.num_active / max(1, self.occupancy.capacity)

    @property
    def candidate(self) -> Candidate:
        """What decides whether it is busy."""
        return Candidate(self.link.endpoint, self.num_active, self.occupancy.max_rows)

    def hold(self, flight: Flight, sequence_id: int) -> None:
        """Give a flight its place; `send` follows."""
        flight.sequence_id = sequence_id
        flight.worker_key = self.key
        self.flights.by_id[sequence_id] = flight
        self.occupancy.enter(flight.request.tenant)

    def send(
        self,
        flight: Flight,
        sequence_id: int,
        deadline_s: float,
        encoded: list[int],
        frames: list[bytes],
        prefill_at: PrefillAt | None = None,
    ) -> None:
        """Send the worker a flight, due within `deadline_s`, with its pictures' frames. Raises `RequestError`."""
        request = flight.request
        submit = wire.Submit(
            epoch=self.link.epoch,
            sequence_id=sequence_id,
            request_id=request.request_id,
            prompt=wire.pack_i32(request.prompt_ids),
            max_tokens=request.max_tokens,
            sampling=request.sampling,
            images=[image.spec for image in request.images],
            stop_ids=request.stop_ids,
            task=request.task,
            max_objects=request.max_objects,
            tenant=request.tenant,
            priority=request.priority - (AHEAD if flight.record.num_attempts else 0),
            deadline_s=deadline_s,
            grammar=request.grammar,
            ignore_eos=request.ignore_eos,
            thinking=request.thinking,
            values=list(request.values),
            encoded=encoded,
            encoded_as=self.takes_features if encoded else None,
            prefill_at=prefill_at,
        )
        self.link.submit(submit, frames)
        flight.record.num_attempts += 1


class Placement:
    """All workers that are known. `on_refused` is told of every refusal for lack of a place."""

    def __init__(self, admission: Admission, on_refused: Callable[[ErrorCode], None]) -> None:
        self.workers: list[Worker] = []
        self.by_key: dict[int, Worker] = {}
        self.draining = False
        self.is_leaving = False  # new work is still taken, but balancers are told to send none
        self.num_returning = (
            0  # accepted requests that wait to be tried again: their places are not given away
        )
        self.reserved: Worker | None = (
            None  # for suspects: newcomers go to other workers as long as there are any
        )
        self._admission = admission
        self._on_refused = on_refused

    def add(self, worker: Worker) -> None:
        """A worker that may be there from now on."""
        self.workers.append(worker)
        self.by_key[worker.key] = worker

    def remove(self, worker: Worker) -> None:
        """A worker that serves nobody is gone for good."""
        self.workers.remove(worker)
        del self.by_key[worker.key]
        if self.reserved is worker:
            self.reserved = None

    def place(self, model: AnnouncedModel, tenant: str, num_new: int, key: bytes | None = None) -> Worker:
        """The ready worker with the most room for a newcomer, or the one that has what `key` stands for unless it is busy.

        `key` is `gateway.decisions.affinity.content_key`'s. Raises `RequestError`.
        """
        self._check_open()
        ready = self._ready(model)
        if not ready:
            raise self.nobody("no worker serves this model at the moment")
        shared = ready if self.reserved is None else [w for w in ready if w is not self.reserved]
        best = self._home(shared or ready, key)
        first = self._refusal(best, tenant, num_new)
        if first is None:
            return best
        for other in sorted(ready, key=lambda worker: worker.load):
            if other is not best and self._refusal(other, tenant, num_new) is None:
                return other
        self._on_refused(first.code)
        raise first

    def place_again(self, model: AnnouncedModel, *, is_suspect: bool, waited_s: float) -> Worker | None:
        """A worker for a request that was accepted before and lost its own; None while there is none with room.

        A suspect gets the same worker as other suspects, which newcomers then avoid, where several serve its model;
        while the others are being started again it waits up to `OWN_WAIT_S` for that, lest it take the last one along.
        """
        ready = self._ready(model)
        several = sum(worker.model is model for worker in self.workers) > 1
        if is_suspect and several and len(ready) < 2 and waited_s < OWN_WAIT_S:
            return None
        if is_suspect and len(ready) > 1:
            if self.reserved not in ready:
                self.reserved = min(ready, key=lambda worker: worker.occupancy.num_active)
            ready = [worker for worker in ready if worker is self.reserved]
        elif len(ready) > 1:
            ready = [worker for worker in ready if worker is not self.reserved]
        best = min(ready, key=lambda worker: worker.load, default=None)
        return best if best is not None and best.occupancy.num_free > 0 else None

    def encoders(self, format: FeatureFormat) -> list[Worker]:
        """Those that encode pictures into this format."""
        return [
            worker
            for worker in self.workers
            if (ready := worker.link.ready) is not None
            and (ready.role, ready.features) == ("encode", format)
            and worker.takes_work
        ]

    def place_picture(self, format: FeatureFormat, key: bytes, but: Container[int]) -> Worker | None:
        """The encoder for a picture: the one that has had it before, unless it is busy. `but`: keys of those that failed it."""
        ready = [
            worker
            for worker in self.encoders(format)
            if worker.key not in but and worker.num_active < worker.occupancy.capacity
        ]
        return self._home(ready, key) if ready else None

    def prefills(self, format: PageFormat) -> list[Worker]:
        """Those that compute prompts into such pages."""
        return [
            worker
            for worker in self.workers
            if (ready := worker.link.ready) is not None
            and (ready.role, ready.pages) == ("prefill", format)
            and worker.takes_work
        ]

    def place_prompt(self, format: PageFormat, key: bytes | None) -> Worker | None:
        """The prefill worker for a prompt: the one that has had its beginning before, unless it is busy. None: their rows are
        all taken, so that whoever answers computes it sooner."""
        ready = [
            worker
            for worker in self.prefills(format)
            if worker.num_active < max(1, worker.occupancy.max_rows)
        ]
        return self._home(ready, key) if ready else None

    def serves(self, model_id: str) -> bool:
        """Whether some worker serves a model of this name and takes work."""
        return any(
            w.takes_work and w.model is not None and w.model.card.model_id == model_id for w in self.workers
        )

    def check(self, model: AnnouncedModel, tenant: str, num_new: int) -> None:
        """Raises the error that `place` would; more requests than the largest worker holds count as that many."""
        if num_new > 1:
            served = [worker.occupancy.capacity for worker in self.workers if worker.model is model]
            num_new = min(num_new, max(served, default=1))
        self.place(model, tenant, num_new)

    def check_any(self, tenant: str) -> None:
        """Raises an error if `place` would refuse a request for any model just now."""
        self._check_open()
        refusal: RequestError | None = None
        for worker in self.workers:
            if worker.serves_requests:
                refusal = self._refusal(worker, tenant, 1)
                if refusal is None:
                    return
        if refusal is not None:
            self._on_refused(refusal.code)
            raise refusal

    def nobody(self, message: str) -> RequestError:
        """The error for a request without a worker: `message`, unless waiting will not bring one."""
        if self.workers and all(worker.link.refusal for worker in self.workers):
            return RequestError(ErrorCode.INTERNAL, self.workers[0].link.refusal)
        return RequestError(ErrorCode.LOADING, message)

    def readiness(self) -> tuple[bool, str]:
        """Whether new work would be served, and why not."""
        if self.draining or self.is_leaving:
            return False, "shutting down"
        if any(worker.serves_requests for worker in self.workers):
            return True, "ready"
        refusals = [worker.link.refusal for worker in self.workers if worker.link.refusal]
        if refusals:
            return False, refusals[0]
        if not self.workers:
            return False, "no worker is configured (workers)"
        return False, "no worker is ready"

    def _home(self, ready: list[Worker], key: bytes | None) -> Worker:
        if len(ready) == 1:
            return ready[0]
        if key is not None:
            place = home(key, [worker.candidate for worker in ready])
            if place is not None:
                return ready[place]
        return min(ready, key=lambda worker: worker.load)

    def _ready(self, model: AnnouncedModel) -> list[Worker]:
        return [worker for worker in self.workers if worker.model is model and worker.takes_work]

    def _check_open(self) -> None:
        if self.draining:
            raise RequestError(ErrorCode.SHUTTING_DOWN, "the server is shutting down")

    def _refusal(self, worker: Worker, tenant: str, num_new: int) -> RequestError | None:
        try:
            self._admission.check(worker.occupancy, tenant, num_new, self.num_returning)
        except RequestError as error:
            return error
        return None
