"""Gateway, wire and workers as one Hypothesis state machine: whatever the wire does, every promise to clients is kept."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from gateway.generation import PreparedImage
from shared import protocol as wire
from shared.errors import ErrorCode, FinishReason
from tests.two_sheets import image_input
from tests.unit.wire.client import Client, Habits
from tests.unit.wire.fake_zmq import Frames
from tests.unit.wire.node import KILL_DIGEST, KILL_TOKEN, Node
from tests.unit.wire.world import World
from tests.unit.worker.loop.simulation import CARD
from worker.loop.inbox import Received
from worker.schedule.sequence import Sequence
from worker.sim.runner import NAN_TOKEN
from worker.sim.tokenizer import SIM_TOKENIZER

GARBAGE: dict[str, bytes] = {
    "empty": b"",
    "no msgpack": b"\xc1 is none",
    "wrong fields": msgspec.msgpack.encode(["StepOutputs", 1, "x"]),
    "unknown message": msgspec.msgpack.encode(["Nonsense", 1]),
    "not an array": msgspec.msgpack.encode({"type": "Ready"}),
    "too large": bytes(wire.MAX_MESSAGE_BYTES + 1),
    "the other side's": b"",
    "unequal arrays": b"",
    "half a number": b"",
}

indexes = st.integers(0, 7)
numbers = st.integers(0, 1)


class Service(RuleBasedStateMachine):
    """Requests come and go while frames are lost, repeated, late or spoilt and workers die and come back."""

    clients = Bundle("clients")

    @initialize(
        num_workers=st.sampled_from([1, 1, 2]),
        num_encoders=st.sampled_from([0, 0, 1, 2]),
        encoder_jobs=st.sampled_from([2, 8]),
        num_prefills=st.sampled_from([0, 0, 1, 2]),
        depth=st.integers(1, 3),
        max_rows=st.integers(1, 4),
        num_pages=st.sampled_from([12, 24, 64]),
        page_tokens=st.sampled_from([2, 4]),
        step_tokens=st.sampled_from([12, 64]),
        prefix_cache=st.booleans(),
        max_waiting=st.sampled_from([3, 64]),
        max_queue=st.sampled_from([3, 64]),
        jitter=st.sampled_from([None, 1, 2]),
        late_launch=st.booleans(),
        automata=st.booleans(),
        supervised=st.sampled_from([True, True, False]),
        ending=st.sampled_from(["rest", "drain", "stop"]),
    )
    def start(
        self,
        num_workers: int,
        num_encoders: int,
        encoder_jobs: int,
        num_prefills: int,
        depth: int,
        max_rows: int,
        num_pages: int,
        page_tokens: int,
        step_tokens: int,
        prefix_cache: bool,
        max_waiting: int,
        max_queue: int,
        jitter: int | None,
        late_launch: bool,
        automata: bool,
        supervised: bool,
        ending: str,
    ) -> None:
        self.ending = ending
        self.world = World(
            num_workers=num_workers,
            num_encoders=num_encoders,
            encoder_jobs=encoder_jobs,
            num_prefills=num_prefills,
            max_queue=max_queue,
            supervised=supervised,
            depth=depth,
            num_slots=max(2, depth),
            max_rows=max_rows,
            num_pages=num_pages,
            page_tokens=page_tokens,
            step_tokens=step_tokens,
            prefix_cache=prefix_cache,
            max_waiting=max_waiting,
            jitter_seed=jitter,
            late_launch=late_launch,
            automata=automata,
        )

    def node(self, number: int) -> Node:
        """One of the workers."""
        return self.world.nodes[number % len(self.world.nodes)]

    # ------------------------------------------------------------ requests and clients

    @rule(
        target=clients,
        words=st.lists(st.integers(20, 24), max_size=5),
        max_tokens=st.integers(1, 24),
        image=st.sampled_from([None, None, None, b"x", b"y", b"z"]),
        task=st.sampled_from(["text", "text", "detect", "point"]),
        temperature=st.sampled_from([0.0, 1.0]),
        seed=st.integers(0, 1 << 40),
        tenant=st.sampled_from(["", "a"]),
        priority=st.integers(0, 1),
        deadline_s=st.sampled_from([0.0, 0.0, 0.0, 0.02, 1.5]),
        stop_at=st.sampled_from([-1, -1, 0, 3]),
        cancels_at=st.sampled_from([-1, -1, -1, 1, 2]),
        raises_at=st.sampled_from([-1, -1, -1, 1, 3]),
        error=st.sampled_from([ConnectionResetError, KeyError]),
        comes_back=st.booleans(),
    )
    def submit(
        self,
        words: list[int],
        max_tokens: int,
        image: bytes | None,
        task: str,
        temperature: float,
        seed: int,
        tenant: str,
        priority: int,
        deadline_s: float,
        stop_at: int,
        cancels_at: int,
        raises_at: int,
        error: type[Exception],
        comes_back: bool,
    ) -> Client:
        images = []
        if image is not None:
            spec = image_input(1, 9, 8, hashlib.sha256(image).digest())
            images = [PreparedImage(spec, [bytes(192), bytes(192)])]
        habits = Habits(cancels_at, raises_at, error)
        if comes_back:
            habits.at_end = lambda: self.submit_again([30, *words, 23])
        return self.world.submit(
            [30, *words],
            max_tokens,
            habits=habits,
            stop_at=stop_at if task == "text" else -1,
            images=images,
            task=task,
            max_objects=2 if task != "text" else 0,
            sampling=wire.Sampling(temperature=temperature, seed=seed),
            tenant=tenant,
            priority=priority,
            deadline_s=deadline_s,
        )

    def submit_again(self, prompt: list[int]) -> None:
        """From inside the end of the request before: the core must bear it."""
        self.world.submit(prompt, 3)

    @rule(target=clients, word=st.integers(20, 24), max_tokens=st.integers(4, 20))
    def submit_plainly(self, word: int, max_tokens: int) -> Client:
        return self.world.submit([30, word], max_tokens)

    @rule(target=clients, at=st.integers(0, 3), kills=st.booleans())
    def submit_trouble(self, at: int, kills: bool) -> Client:
        """A row that turns NaN, or a poison request."""
        return self.world.submit([30, KILL_TOKEN, at] if kills else [30, NAN_TOKEN, at, 21], 5)

    @rule(target=clients, word=st.integers(20, 24), image=st.integers(0, 9), kills=st.integers(0, 9))
    def submit_picture(self, word: int, image: int, kills: int) -> Client:
        """Often a new one, which encoders are asked for where there are any; seldom one that kills them."""
        digest = hashlib.sha256(bytes([image])).digest() if kills else KILL_DIGEST
        prepared = PreparedImage(image_input(1, 9, 8, digest), [bytes(192), bytes(192)])
        return self.world.submit([30, word], 3, images=[prepared])

    @rule(client=clients, what=st.sampled_from(["cancel", "hang up", "stop reading", "read on"]))
    def client_acts(self, client: Client, what: str) -> None:
        if what == "cancel":
            self.world.within(client.cancel)
        elif what == "hang up":
            client.hang_up()
        elif what == "stop reading":
            client.stop_reading()
        else:
            client.transport.read_on()

    @rule(client=clients, before_launch=st.booleans())
    def cancel_in_the_tick_that_commits(self, client: Client, before_launch: bool) -> None:
        """It reaches the worker between a launch and its commit, or crosses the finish on the wire."""
        if before_launch:
            self.world.deliver()
            for node in self.world.nodes:
                deadly = any(_kills(seq) for seq in node.sim.scheduler.waiting)
                if node.serves and not node.device_lost and not deadly:
                    node.sim.engine._plan_and_launch()
            self.world.within(client.cancel)
            self.world.deliver()
        else:
            self.world.tick()
            self.world.within(client.cancel)
        self.world.flow()

    # ------------------------------------------------------------ ordinary life

    @rule(times=st.integers(1, 4))
    def flow(self, times: int) -> None:
        self.world.flow(times)

    @rule(times=st.integers(1, 4))
    def tick(self, times: int) -> None:
        self.world.tick(times)

    @rule(number=numbers, most=st.integers(1, 4), to_worker=st.booleans(), seen=st.booleans())
    def deliver_some(self, number: int, most: int, to_worker: bool, seen: bool) -> None:
        """Not `seen`: what comes next finds the frames in the socket, and the loop not yet woken."""
        node = self.node(number)
        if to_worker:
            node.between.deliver_to_worker(most)
            node.turn()
        else:
            node.between.deliver_to_gateway(most)
            if seen:
                self.world.loop.settle()

    @rule(seconds=st.sampled_from([0.001, 0.1, 0.6, 3.5, 7.0]))
    def time_passes(self, seconds: float) -> None:
        """At once, for everybody: after the long ones heartbeats and leases have run out."""
        self.world.clock.advance(seconds)

    @rule(seconds=st.sampled_from([0.3, 1.1, 3.6]))
    def live(self, seconds: float) -> None:
        self.world.live(seconds)

    # ------------------------------------------------------------ workers

    @rule(
        number=numbers,
        what=st.sampled_from(["crash", "freeze", "device error", "drain"]),
        num_arriving=st.sampled_from([0, 1, 100]),
        deadline_s=st.sampled_from([0.0, 0.01, 30.0]),
    )
    def worker_fails(self, number: int, what: str, num_arriving: int, deadline_s: float) -> None:
        node, world = self.node(number), self.world
        if what == "crash":  # as by SIGKILL; so many of the frames it sent still arrive
            node.die(num_arriving)
            world.loop.settle()
        elif what == "freeze":
            node.freeze()
        elif what == "device error":
            node.device_lost = True
            world.device_faults += 1
            world.flow(2)
        else:  # as by SIGTERM
            node.sim.inbox.put(Received(b"", wire.Drain(deadline_s)))
            world.drained = True

    @rule(number=numbers)
    def worker_is_back(self, number: int) -> None:
        """Restarted if it is dead, thawed if it was frozen."""
        self.node(number).frozen = False
        self.world.restart(number % len(self.world.nodes))

    # ------------------------------------------------------------ encoders

    @rule(
        number=numbers,
        what=st.sampled_from(["crash", "freeze", "device error", "drain", "back", "apart"]),
        num_arriving=st.sampled_from([0, 1, 100]),
    )
    def encoder_fails(self, number: int, what: str, num_arriving: int) -> None:
        if not self.world.encoders:
            return
        number %= len(self.world.encoders)
        node = self.world.encoders[number]
        if what == "crash":
            node.die(num_arriving)
            self.world.loop.settle()
        elif what == "freeze":
            node.freeze()
        elif what == "device error":
            node.device_lost = True
            self.world.device_faults += 1
            self.world.flow(2)
        elif what == "drain":
            node.inbox.put(Received(b"", wire.Drain(0.01)))
            self.world.drained = True
        elif what == "back":
            node.frozen = False
            self.world.restart_encoder(number)
        else:
            node.between.disconnect()
            node.between.connect()
            self.world.loop.settle()

    # ------------------------------------------------------------ prefill workers

    @rule(
        number=numbers,
        what=st.sampled_from(["crash", "freeze", "device error", "drain", "back", "apart"]),
        num_arriving=st.sampled_from([0, 1, 100]),
    )
    def prefill_worker_fails(self, number: int, what: str, num_arriving: int) -> None:
        """`apart`: from a worker that asks it."""
        world = self.world
        if not world.prefills:
            return
        number %= len(world.prefills)
        node = world.prefills[number]
        if what == "crash":
            node.die(num_arriving)
            world.loop.settle()
        elif what == "freeze":
            node.freeze()
        elif what == "device error":
            node.device_lost = True
            world.device_faults += 1
            world.flow(2)
        elif what == "drain":
            node.inbox.put(Received(b"", wire.Drain(0.01)))
            world.drained = True
        elif what == "back":
            node.frozen = False
            world.restart_prefill(number)
        else:
            between = world.page_wires[0][f"ipc:///prefill-{number}"]
            between.disconnect()
            between.connect()

    @rule(
        number=numbers,
        how=st.sampled_from(["drop", "repeat", "cut", "spoil"]),
        at=indexes,
        to_prefill=st.booleans(),
    )
    def tamper_between_workers(self, number: int, how: str, at: int, to_prefill: bool) -> None:
        """With one of the frames between a worker and a prefill worker: no client may ever notice."""
        if not self.world.prefills:
            return
        number %= len(self.world.prefills)
        connection = self.world.page_wires[0][f"ipc:///prefill-{number}"].connection
        self.world.tick()
        if connection is None:
            return
        queue = connection.to_worker if to_prefill else connection.to_gateway
        if not queue:
            return
        at %= len(queue)
        frames = queue[at]
        if how == "drop":
            del queue[at]
        elif how == "repeat":
            queue.insert(at, frames)
        elif how == "cut":
            queue[at] = [*frames[:-1], frames[-1][: len(frames[-1]) // 2]]
        else:
            queue[at] = [*frames[:-1], bytes(len(frames[-1]))]
        self.world.flow()

    # ------------------------------------------------------------ the wire to encoders

    @rule(
        number=numbers, how=st.sampled_from(["drop", "repeat", "cut"]), at=indexes, to_encoder=st.booleans()
    )
    def tamper_at_an_encoder(self, number: int, how: str, at: int, to_encoder: bool) -> None:
        """With one of the frames on their way; of features also with what they hold."""
        if not self.world.encoders:
            return
        connection = self.world.encoders[number % len(self.world.encoders)].between.connection
        self.world.tick()
        if connection is None:
            return
        queue = connection.to_worker if to_encoder else connection.to_gateway
        if not queue:
            return
        at %= len(queue)
        frames = queue[at]
        if how == "drop":
            del queue[at]
        elif how == "repeat":
            queue.insert(at, frames)
        else:
            queue[at] = [*frames[:-1], frames[-1][: len(frames[-1]) // 2]]
        if not to_encoder:
            self.world.lossy = True
        self.world.tampered |= to_encoder
        self.world.flow()

    # ------------------------------------------------------------ the wire

    @rule(number=numbers, hwm=st.sampled_from([0, 1, 2, 10_000]))
    def wire_changes(self, number: int, hwm: int) -> None:
        """0 breaks the connection: both ends live on, and meet again under another identity. Else the queues hold
        next to nothing, and what is sent beyond is refused by the socket."""
        between = self.node(number).between
        if hwm:
            between.hwm = hwm
            self.world.lossy |= hwm < 10
            return
        between.disconnect()
        between.connect()
        self.world.loop.settle()

    @rule(
        number=numbers,
        how=st.sampled_from(["drop", "repeat", "swap", "cut", "unequal"]),
        at=indexes,
        to_worker=st.booleans(),
    )
    def tamper(self, number: int, how: str, at: int, to_worker: bool) -> None:
        """With one of the frames on their way when a worker has just gone on."""
        self.world.tick()
        connection = self.node(number).between.connection
        if connection is None:
            return
        queue = connection.to_worker if to_worker else connection.to_gateway
        if not queue:
            return
        if to_worker:
            self.world.tampered = True
        else:
            self.world.lossy = True
        telling = [i for i, frames in enumerate(queue) if _tells_tokens(frames[0])] or range(len(queue))
        at = telling[at % len(telling)]
        frames = queue[at]
        if how == "drop":
            del queue[at]
        elif how == "repeat":
            queue.insert(at, frames)
        elif how == "swap":
            other = (at + 1) % len(queue)
            queue[at], queue[other] = queue[other], frames
        elif how == "cut":
            queue[at] = [frames[0][: len(frames[0]) // 2], *frames[1:]]
        else:
            queue[at] = _unequal(frames)
        self.world.flow()

    @rule(number=numbers, at=indexes)
    def frame_of_a_dead_connection(self, number: int, at: int) -> None:
        """It comes when another connection, perhaps to another worker, is there."""
        between = self.node(number).between
        if between.late and between.dealer is not None:
            self.world.lossy = True
            between._arrive(between.late.pop(at % len(between.late)))
            self.world.loop.settle()

    @rule(number=numbers, what=st.sampled_from(["tokens", "finish", "rejected", "fatal", "beat", "ready"]))
    def frame_of_a_dead_epoch(self, number: int, what: str) -> None:
        """It names sequences that live: only its epoch tells that it does not mean them."""
        number %= len(self.world.nodes)
        link, between = self.world.links[number], self.world.nodes[number].between
        if between.dealer is None:
            return
        self.world.loop.settle()
        flights = self.world.service.workers[number].flights.by_id
        before = (
            link.anomalies["stale_epoch"],
            link.ready,
            {f: f.state.next_index for f in flights.values()},
        )
        between._arrive(
            _of_epoch(8 if what == "ready" else 7, what, {n: f.state.next_index for n, f in flights.items()})
        )
        self.world.loop.settle()
        if what == "ready":
            self.world.lossy = True  # taken for a new worker, until the real one is heard of again
            return
        num, ready, indexes = before
        assert link.anomalies["stale_epoch"] == num + 1, "a frame of a dead epoch was not counted"
        assert link.ready is ready and indexes == {f: f.state.next_index for f in flights.values()}

    @rule(number=numbers, at=indexes)
    def message_for_a_dead_epoch(self, number: int, at: int) -> None:
        """What the gateway sent to a worker that is gone reaches its successor."""
        node = self.node(number)
        between = node.between
        if not between.late_to_worker or between.connection is None or not node.serves:
            return
        frames = between.late_to_worker.pop(at % len(between.late_to_worker))
        self.world.tampered = True
        node.turn()
        node.sim.engine.take_commands()
        known = set(node.sim.scheduler.sequences)
        node.router.received.append([between.connection.identity, *frames])
        node.turn()
        node.sim.engine.take_commands()
        message = wire.decode_from_gateway(frames[0]) if _is_whole(frames[0]) else None
        if isinstance(message, wire.Submit) and message.epoch != node.epoch:
            assert set(node.sim.scheduler.sequences) <= known, "a request for another epoch was taken"

    @rule(number=numbers, what=st.sampled_from(sorted(GARBAGE)))
    def garbage_for_the_gateway(self, number: int, what: str) -> None:
        number %= len(self.world.nodes)
        link, between = self.world.links[number], self.world.nodes[number].between
        if between.dealer is None:
            return
        self.world.loop.settle()
        before = (_num_bad(link.anomalies), link.ready, self.world.service.unlanded)
        data = GARBAGE[what]
        if what == "the other side's":
            data = wire.encode(wire.Hello(1, "", "a gateway, not a worker"))
        elif what == "unequal arrays":
            data = wire.encode(
                wire.StepOutputs(link.epoch, 1, wire.pack_i64([1, 2]), b"", wire.pack_i32([9]))
            )
        elif what == "half a number":
            data = wire.encode(wire.StepOutputs(link.epoch, 1, b"123", b"", b""))
        between._arrive([data])
        self.world.loop.settle()
        num, ready, unlanded = before
        assert _num_bad(link.anomalies) == num + 1, "a malformed frame was not counted"
        assert link.ready is ready and self.world.service.unlanded == unlanded

    @rule(number=numbers, what=st.sampled_from(sorted(GARBAGE)))
    def garbage_for_a_worker(self, number: int, what: str) -> None:
        node = self.node(number)
        if not node.serves or node.between.connection is None:
            return
        node.turn()
        num, commands = node.transport.num_bad_frames, node.sim.inbox.qsize()
        own = wire.encode(wire.Fatal(1, ErrorCode.INTERNAL, "a worker"))
        data = own if what == "the other side's" else GARBAGE[what]
        node.router.received.append([node.between.connection.identity, data])
        node.turn()
        assert node.transport.num_bad_frames == num + 1, "a malformed frame was not counted"
        assert node.sim.inbox.qsize() == commands

    # ------------------------------------------------------------ what must hold

    @rule()
    def rest(self) -> None:
        self.world.come_to_rest()
        self.world.probe()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        if self.ending == "rest":
            world.come_to_rest()
            world.probe()
        elif self.ending == "drain":
            world.drained = True
            world.service.begin_drain()
            late = world.submit([30, 21], 2)
            assert late.refused is not None
            world.come_to_rest()
        world.close()


def _kills(seq: Sequence) -> bool:
    return KILL_TOKEN in seq.tokens or any(picture.digest == KILL_DIGEST for picture in seq.pictures)


def _of_epoch(epoch: int, what: str, indexes: dict[int, int]) -> Frames:
    """A frame that fits what is going on in everything but its epoch."""
    ids, first = list(indexes), list(indexes.values())
    messages: dict[str, wire.FromWorker] = {
        "tokens": wire.StepOutputs(
            epoch, 1, wire.pack_i64(ids), wire.pack_i32(first), wire.pack_i32([33] * len(ids))
        ),
        "finish": wire.StepOutputs(
            epoch, 1, b"", b"", b"", [wire.Finish(i, FinishReason.LENGTH, 1, n) for i, n in indexes.items()]
        ),
        "rejected": wire.Rejected(epoch, ids[0] if ids else 0, ErrorCode.INTERNAL, ""),
        "fatal": wire.Fatal(epoch, ErrorCode.INTERNAL, ""),
        "beat": wire.Beat(epoch, 1, 0, 0, 1, 1, draining=True),
        "ready": wire.Ready(
            wire.PROTOCOL_VERSION, wire.schema_hash(), epoch, CARD, wire.Limits(2, 2, 64, 4, 64, 128), "sim"
        ),
    }
    return [wire.encode(messages[what]), *([SIM_TOKENIZER, b""] if what == "ready" else [])]


def _tells_tokens(data: bytes) -> bool:
    try:
        message = wire.decode_from_worker(data)
    except msgspec.DecodeError:
        return False
    return isinstance(message, wire.StepOutputs) and len(message.token_ids) > 0


def _is_whole(data: bytes) -> bool:
    for decode in (wire.decode_from_worker, wire.decode_from_gateway):
        try:
            decode(data)
        except msgspec.DecodeError:
            continue
        return True
    return False


def _num_bad(anomalies: Any) -> int:
    return int(anomalies["malformed"] + anomalies["oversized"])


def _unequal(frames: Frames) -> Frames:
    """Well-formed msgpack whose packed arrays do not fit together, or a frame too few."""
    if not _is_whole(frames[0]):
        return frames
    try:
        message: object = wire.decode_from_worker(frames[0])
    except msgspec.DecodeError:
        message = wire.decode_from_gateway(frames[0])
    if isinstance(message, wire.StepOutputs):
        cut = msgspec.structs.replace(message, token_ids=message.token_ids[:-1] or b"\0")
        return [wire.encode(cut), *frames[1:]]
    if isinstance(message, wire.Submit):
        return [wire.encode(msgspec.structs.replace(message, prompt=message.prompt[:-1])), *frames[1:]]
    return frames[:1]
