"""Processes of the world: a worker's, an encoder's and a prefill worker's threads, turn by turn, which may die or stand still."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from queue import SimpleQueue
from typing import Any, Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from shared import protocol as wire
from shared.errors import ErrorCode
from tests.unit.wire.fake_zmq import PageDealer, Router, Wire
from tests.unit.worker.loop.simulation import CARD, SimWorker
from worker.loop.encoding import EncodeLoop
from worker.loop.inbox import Inbox, PrefillJob
from worker.schedule.plan import StepPlan
from worker.schedule.sequence import Picture
from worker.sim.encoder import SIM_FEATURES, SimEncoder
from worker.sim.profiles import TEST
from worker.sim.timeline import VirtualClock
from worker.sim.tokenizer import SIM_TOKENIZER
from worker.step.contract import Progress
from worker.wire.outbox import WireOutbox
from worker.wire.prefill_peer import PrefillPeer
from worker.wire.transport import Transport

KILL_TOKEN: Final = 12
"""A prompt that holds this id kills the worker that runs it, without a word."""

KILL_DIGEST: Final = b"kills whoever encodes it........"

PROGRESS_S: Final = 3.0
FEATURE_BYTES: Final = 400
"""Of a worker's cache as it announces it: five pictures, so that some are forgotten."""


class Killed(Exception):
    """The process is gone, as by SIGKILL."""


class DeviceFault(Exception):
    """What a lost device raises."""


class Process:
    """What a worker and an encoder have in common: an I/O thread, a socket, and an end."""

    def __init__(self, between: Wire, clock: VirtualClock, epoch: int, *others: Wire) -> None:
        """`others`: from workers, beside the gateway's."""
        self.between = between
        self.epoch = epoch
        self.alive = True
        self.frozen = False  # as by SIGSTOP
        self.down_s = 0.0  # when it died or was frozen
        self.device_lost = False
        self._clock = clock
        self.inbox: Inbox = SimpleQueue()
        self.outbox = WireOutbox()
        self.transport = Transport(f"worker {epoch}", self.inbox, self.outbox, now=clock.now)
        self.router = Router(between, *others)

    @property
    def serves(self) -> bool:
        """Whether its threads run."""
        return self.alive and not self.frozen

    def turn(self) -> None:
        """One turn of the I/O thread."""
        if self.serves:
            self.transport._turn(self.router)  # type: ignore[arg-type]

    def announce(
        self,
        limits: wire.Limits,
        role: str,
        features: wire.FeatureFormat | None,
        pages: wire.PageFormat | None = None,
    ) -> None:
        """From now on it answers `Hello`."""
        version, schema = wire.PROTOCOL_VERSION, wire.schema_hash()
        ready = wire.Ready(
            version, schema, self.epoch, CARD, limits, "sim", role=role, features=features, pages=pages
        )
        self.transport.announce(ready, [SIM_TOKENIZER, b""])

    def leave(self, last: wire.Fatal | None = None) -> None:
        """End in good order: what is queued is sent, and lingers until it is there."""
        if last is not None:
            self.outbox.broadcast(last)
        self.turn()
        self.die(10_000)

    def freeze(self) -> None:
        """Stand still, sockets and all."""
        self.frozen, self.down_s = True, self._clock.now()

    def die(self, num_arriving: int) -> None:
        """End without a word; so many of the frames it sent still arrive."""
        if self.alive:
            self.alive = False
            self.down_s = self._clock.now()
            self.router.unbind(num_arriving)
            self.outbox.close()


class PageThread:
    """The thread worker-pages of a worker, turn by turn, and the way to every prefill worker."""

    def __init__(self, wires: Mapping[str, Wire], inbox: Inbox, clock: VirtualClock) -> None:
        self.peers: dict[str, tuple[PrefillPeer, PageDealer]] = {}
        self.format: wire.PageFormat | None = None  # the worker's own
        self._wires = wires
        self._inbox = inbox
        self._clock = clock
        self._asked: list[PrefillJob | int] = []

    def ask(self, job: PrefillJob) -> None:
        self._asked.append(job)

    def cancel(self, job_id: int) -> None:
        self._asked.append(job_id)

    def turn(self) -> None:
        """What the real thread does when its poll returns."""
        asked, self._asked = self._asked, []
        now_s = self._clock.now()
        for one in asked:
            if isinstance(one, int):
                for peer, _ in self.peers.values():
                    peer.cancel(one)
            else:
                self._peer(one.endpoint).ask(one, now_s)
        for peer, dealer in self.peers.values():
            while dealer.received:
                peer.on_frames(dealer.received.popleft(), now_s)
            while dealer.monitor.signalled:
                try:
                    event = parse_monitor_message(dealer.monitor.recv_multipart())["event"]
                except zmq.Again:
                    break
                dealer.monitor.signalled = True
                if event == zmq.EVENT_DISCONNECTED:
                    peer.on_lost("its connection closed")
            peer.on_time(now_s)

    def _peer(self, endpoint: str) -> PrefillPeer:
        if endpoint not in self.peers:
            dealer = PageDealer(self._wires[endpoint])
            assert self.format is not None
            peer = PrefillPeer(endpoint, self.format, "node", dealer.send, self._inbox.put, self._clock.now())
            self.peers[endpoint] = peer, dealer
        return self.peers[endpoint][0]

    def close(self) -> None:
        for _, dealer in self.peers.values():
            dealer.close()


class Node(Process):
    """One worker process: decode thread, I/O thread, and one for pages where there are prefill workers. `takes_features`, and
    wires to prefill workers: its role is decode."""

    def __init__(
        self,
        between: Wire,
        clock: VirtualClock,
        epoch: int,
        options: dict[str, Any],
        *,
        takes_features: bool = False,
        to_prefills: Mapping[str, Wire] | None = None,
    ) -> None:
        super().__init__(between, clock, epoch)
        self._features = SIM_FEATURES if takes_features else None
        self.pages = PageThread(to_prefills, self.inbox, clock) if to_prefills else None
        self._build(options, prefills=self.pages)
        if self.pages is not None:
            self.pages.format = self.sim.store.format

    def _build(self, options: dict[str, Any], **more: Any) -> None:
        self.sim = SimWorker(
            self.outbox,
            epoch=self.epoch,
            inbox=self.inbox,
            clock=self._clock,
            format=self._features,
            **{**options, **more},
        )
        self._launch_forward = self.sim.runner.launch_forward
        self.sim.runner.launch_forward = self._launch  # type: ignore[method-assign]
        self.router.bind()

    def turn(self) -> None:
        """One turn of the I/O thread, and of the one for pages."""
        super().turn()
        if self.serves and self.pages is not None:
            self.pages.turn()

    def die(self, num_arriving: int) -> None:
        if self.alive and self.pages is not None:
            self.pages.close()
        super().die(num_arriving)

    def _launch(self, slot_number: int, plan: StepPlan, progress: Progress) -> None:
        if self.device_lost:
            raise DeviceFault("illegal address")
        if any(KILL_TOKEN in chunk.seq.tokens[: chunk.seq.num_prompt] for chunk in plan.chunks):
            raise Killed
        pictures = [picture for chunk in plan.chunks for picture in chunk.seq.pictures]
        if any(picture.digest == KILL_DIGEST and picture.features is None for picture in pictures):
            raise Killed
        self._launch_forward(slot_number, plan, progress)

    def tick(self) -> bool:
        """One turn of the decode thread; it announces the worker first, and ends it when it is drained."""
        if not self.serves:
            return False
        if not self.transport.is_announced:
            self._announce()
        engine = self.sim.engine
        try:
            progress = engine.tick()
        except Killed:
            self.die(10_000)
            return True
        except DeviceFault as fault:
            engine._give_up(fault)
            self.leave(wire.Fatal(self.epoch, ErrorCode.DEVICE_ERROR, "DeviceFault"))
            return True
        self.sim.check()
        leased = {gateway for gateway, _ in self.sim.scheduler.sequences} <= set(self.transport._leases)
        assert leased, "a sequence of a gateway that is gone still runs"
        if not progress and engine.is_draining and not self.sim.scheduler.has_work:
            self.sim.check_at_rest()
            self.leave()
        return progress

    def _announce(self) -> None:
        scheduler = self.sim.scheduler
        limits = wire.Limits(
            scheduler.limits.max_rows,
            scheduler.limits.max_waiting,
            self.sim.pool.total,
            self.sim.pool.page_tokens,
            scheduler.limits.step_tokens,
            min(scheduler.limits.max_sequence_tokens, self.sim.pool.total * self.sim.pool.page_tokens),
            PROGRESS_S,
            FEATURE_BYTES,
        )
        self._announce_as(limits)

    def _announce_as(self, limits: wire.Limits) -> None:
        takes_pages = self.sim.intake is not None
        role = "decode" if self._features is not None or self.pages is not None else "all"
        self.announce(limits, role, self._features, self.sim.store.format if takes_pages else None)


class PrefillNode(Node):
    """One process with the role prefill: `workers` are the wires from those that it computes for."""

    def __init__(
        self, between: Wire, clock: VirtualClock, epoch: int, options: dict[str, Any], workers: Iterable[Wire]
    ) -> None:
        Process.__init__(self, between, clock, epoch, *workers)
        self._features = None
        self.pages = None
        self._build(options, gives_pages=True)

    def _announce_as(self, limits: wire.Limits) -> None:
        self.announce(limits, "prefill", None, self.sim.store.format)


class FragileEncoder(SimEncoder):
    """Encodes until its device is lost, or the picture comes that kills it."""

    device_lost = False

    def encode(self, tenant: str, picture: Picture, progress: Progress) -> bytes:
        if picture.digest == KILL_DIGEST:
            raise Killed
        if self.device_lost:
            raise DeviceFault("illegal address")
        return super().encode(tenant, picture, progress)


class EncoderNode(Process):
    """One process with the role encode."""

    def __init__(self, between: Wire, clock: VirtualClock, epoch: int, max_jobs: int) -> None:
        super().__init__(between, clock, epoch)
        self.encoder = FragileEncoder(clock, TEST)
        self.num_encoded = 0
        self.loop = EncodeLoop(
            self.encoder,
            CARD,
            inbox=self.inbox,
            outbox=self.outbox,
            clock=clock.now,
            epoch=epoch,
            max_jobs=max_jobs,
        )
        self.router.bind()

    def tick(self) -> bool:
        """One turn of the decode thread."""
        if not self.serves:
            return False
        if not self.transport.is_announced:
            limits = wire.Limits(1, self.loop.queue.max_jobs - 1, 0, 0, 0, 0, PROGRESS_S, FEATURE_BYTES)
            self.announce(limits, "encode", SIM_FEATURES)
        self.encoder.device_lost = self.device_lost
        try:
            progress = self.loop.tick()
        except Killed:
            self.die(10_000)
            return True
        except DeviceFault as fault:
            self.loop.give_up(fault)
            self.leave(wire.Fatal(self.epoch, ErrorCode.DEVICE_ERROR, "DeviceFault"))
            return True
        self.num_encoded += progress
        if self.loop.is_done:
            self.leave()
        return progress
