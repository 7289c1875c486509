"""Owns the types of what other threads and the decode thread hand each other. Any thread puts, the decode thread takes.

Queues carry them; the threads share nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shared.protocol import Cancel, Drain, FromGateway, FromWorker, Submit, Trace
from worker.constraints.constraint import Constraint
from worker.schedule.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Received:
    """A message of a gateway, with the payload frames behind it. The worker's own drain has no gateway."""

    gateway: bytes
    message: Submit | Cancel | Drain | Trace | FromGateway
    frames: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CompiledSubmit:
    """A submission whose grammar has been compiled."""

    gateway: bytes
    message: Submit
    frames: list[bytes]
    constraint: Constraint


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """A gateway is gone, or was silent for longer than its lease: its sequences end without a message."""

    gateway: bytes


@dataclass(frozen=True, slots=True, eq=False)
class MaskReady:
    """The mask of a sequence that sits out was built (`error` empty) or could not be built."""

    seq: Sequence
    mask: npt.NDArray[np.int32]
    took_s: float
    error: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class PagesHere:
    """Pages of a prompt from a prefill worker, whole and as they were sent."""

    job_id: int
    first: int
    keys: bytes
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class PrefillEnded:
    """No more pages come. `outcome`: done, refused, failed, lost, malformed or mismatched."""

    job_id: int
    outcome: str
    detail: str = ""


Command = Received | CompiledSubmit | LeaseEnded | MaskReady | PagesHere | PrefillEnded
Inbox = SimpleQueue[Command]


@dataclass(frozen=True, slots=True)
class PrefillJob:
    """What a prefill worker is asked for: pages [first_page, num_pages) of a prompt of so many whole pages."""

    job_id: int
    endpoint: str
    prompt: bytes  # packed int32
    first_page: int
    num_pages: int
    tenant: str
    priority: int
    wait_s: float


class Prefills(Protocol):
    """Where the decode thread asks for pages; they come by the inbox, and one `PrefillEnded` a job. Never blocks."""

    def ask(self, job: PrefillJob) -> None:
        """Have pages computed."""

    def cancel(self, job_id: int) -> None:
        """Nobody wants them any more; what comes for the job from now on means nothing."""


class Outbox(Protocol):
    """Where the decode thread leaves messages for the I/O thread. Never blocks."""

    def send(self, gateway: bytes, message: FromWorker, payloads: list[bytes] | None = None) -> None:
        """For one gateway; payloads ride as further frames."""

    def broadcast(self, message: FromWorker) -> None:
        """For every gateway with a lease."""
