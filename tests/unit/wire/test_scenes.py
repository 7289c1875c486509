"""Chosen scenes over the joined gateway and workers: each promise once, on a wire that a test controls."""

from __future__ import annotations

import itertools

import pytest

from gateway.core.placement import OWN_WAIT_S
from gateway.generation import RequestError
from shared import protocol as wire
from shared.errors import ErrorCode, FinishReason
from tests.unit.wire.client import Client
from tests.unit.wire.fake_zmq import Frames
from tests.unit.wire.node import KILL_TOKEN
from tests.unit.wire.world import World
from tests.unit.worker.loop.simulation import oracle
from worker.loop.inbox import Received


def error_of(client: Client) -> ErrorCode | None:
    """How it ended, if badly."""
    assert client.end is not None
    return client.end.error.code if client.end.error is not None else None


def long_prompt(number: int = 0) -> list[int]:
    """One of the prompts that are answered with 24 tokens and more."""
    prompts = ([30, 20 + word] for word in range(70))
    long = (
        prompt
        for prompt in prompts
        if len(oracle(wire.Submit(0, 0, "", wire.pack_i32(prompt), 24)).tokens) == 24
    )
    return next(itertools.islice(long, number, None))


def under_way(world: World, max_tokens: int = 24) -> Client:
    """A client whose stream has begun."""
    client = world.submit(long_prompt(), max_tokens)
    for _ in range(20):
        world.flow()
        if client.ids:
            return client
    raise AssertionError("no token came")


def finish(world: World) -> None:
    world.come_to_rest()
    world.probe()
    world.close()


def steps(world: World, number: int = 0) -> list[tuple[int, wire.StepOutputs]]:
    """The step frames on their way to the gateway, with their places."""
    connection = world.nodes[number].between.connection
    assert connection is not None
    decoded = [(i, wire.decode_from_worker(frames[0])) for i, frames in enumerate(connection.to_gateway)]
    return [(i, message) for i, message in decoded if isinstance(message, wire.StepOutputs)]


def queue(world: World) -> list[Frames]:
    """Where those frames are."""
    connection = world.nodes[0].between.connection
    assert connection is not None
    return connection.to_gateway  # type: ignore[return-value]


def test_an_undisturbed_request_equals_the_oracle() -> None:
    world = World()
    client = under_way(world)
    world.flow(40)
    assert error_of(client) is None
    finish(world)


def test_a_lost_token_is_a_gap_and_the_worker_stops() -> None:
    world = World()
    client = under_way(world)
    world.tick(3)
    del queue(world)[steps(world)[0][0]]
    world.deliver()
    assert error_of(client) is ErrorCode.STREAM_GAP
    world.flow()
    assert not world.nodes[0].sim.scheduler.sequences
    world.lossy = True
    finish(world)


def test_repeated_frames_change_nothing() -> None:
    world = World()
    client = under_way(world)
    for _ in range(20):
        world.tick(2)
        for i, _ in reversed(steps(world)):
            queue(world).insert(i, queue(world)[i])
        world.deliver()
    assert error_of(client) is None
    assert world.links[0].anomalies["duplicate_token"] > 5
    finish(world)


def test_tokens_lost_before_a_deadline_are_said_to_be() -> None:
    """A finish of its own counts what it ends: only one that a stop id made may count one token more."""
    world = World(late_launch=False)
    client = world.submit(long_prompt(), 24, deadline_s=0.02)
    while not client.ids:
        world.flow()
    world.tick()
    num = len(steps(world))
    assert num == 1
    queue(world).pop()
    world.clock.advance(0.03)
    world.tick()
    while not client.end:
        for i, message in reversed(steps(world)):
            if message.token_ids:
                del queue(world)[i]
        world.deliver()
        world.tick()
    assert error_of(client) is ErrorCode.STREAM_GAP
    world.lossy = True
    finish(world)


def test_a_token_lost_before_the_stop_id_is_noticed() -> None:
    """The last frame brings a finish and no token, so only what it counts tells of the loss."""
    world = World(late_launch=False, depth=1)
    answers = ((word, oracle(wire.Submit(0, 0, "", wire.pack_i32([30, word]), 24))) for word in range(20, 90))
    word = next(word for word, a in answers if a.reason is FinishReason.STOP and len(a.tokens) > 2)
    client = world.submit([30, word], 24)
    num = len(client.answer.tokens)
    while not client.end:
        world.tick()
        for i, message in reversed(steps(world)):
            if num - 1 in wire.unpack_i32(message.first_index):
                del queue(world)[i]
        world.deliver()
    assert error_of(client) is ErrorCode.STREAM_GAP
    world.lossy = True
    finish(world)


def test_a_request_for_another_epoch_is_not_taken() -> None:
    world = World()
    node = world.nodes[0]
    connection = node.between.connection
    assert connection is not None
    late = wire.Submit(node.epoch - 1, 5, "late", wire.pack_i32([30, 21]), 4)
    node.router.received.append([connection.identity, wire.encode(late)])
    node.turn()
    node.sim.engine.take_commands()
    assert not node.sim.scheduler.sequences
    node.turn()
    answer = wire.decode_from_worker(connection.to_gateway[-1][0])
    assert isinstance(answer, wire.Rejected) and answer.code is ErrorCode.WORKER_LOST
    world.tampered = True
    finish(world)


@pytest.mark.parametrize("num_arriving", [0, 100])
def test_a_crash_ends_what_began_and_retries_what_did_not(num_arriving: int) -> None:
    world = World(max_rows=1)
    began = under_way(world)
    waits = world.submit([30, 22], 3)
    world.flow()
    world.nodes[0].die(num_arriving)
    world.loop.settle()
    assert error_of(began) is ErrorCode.WORKER_LOST and waits.end is None
    finish(world)
    assert error_of(waits) is None and world.submits[waits.request.request_id] == 2


def test_a_poison_request_is_quarantined_and_nobody_else() -> None:
    world = World(supervised=True)
    # One token each: a request that has shown one is no longer alone, and the next may take it along.
    clients = [world.submit([30, KILL_TOKEN if i == 2 else 21, i + 20], 1) for i in range(5)]
    finish(world)
    assert [error_of(client) for client in clients] == [None, None, ErrorCode.QUARANTINED, None, None]
    assert world.submits[clients[2].request.request_id] == 2


def test_a_poison_request_among_forty_is_found_and_nobody_else_suffers() -> None:
    world = World(supervised=True, max_rows=4, num_pages=256)
    clients = [world.submit([30, KILL_TOKEN if i == 23 else 21, i % 40 + 20], 1) for i in range(40)]
    finish(world)
    assert [i for i, client in enumerate(clients) if error_of(client) is not None] == [23]
    assert error_of(clients[23]) is ErrorCode.QUARANTINED
    assert world.submits[clients[23].request.request_id] <= 5


def test_two_of_the_same_poison_among_many() -> None:
    world = World(supervised=True, max_rows=4, num_pages=256)
    poison = (3, 30)
    clients = [world.submit([30, KILL_TOKEN if i in poison else 21, i % 40 + 20], 1) for i in range(40)]
    finish(world)
    ends = {i: error_of(client) for i, client in enumerate(clients) if error_of(client) is not None}
    assert ends == dict.fromkeys(poison, ErrorCode.QUARANTINED)


def lose_all(world: World, num: int, max_tokens: int = 4) -> list[Client]:
    """So many requests on a worker that is killed before any of them has shown a token; another has just started."""
    clients = [world.submit([30, 20 + i % 60], max_tokens, tenant="ab"[i % 2]) for i in range(num)]
    world.deliver()
    world.nodes[0].die(0)
    world.loop.settle()
    world.restart(0)
    while not world.all_ready():
        world.flow()
        world.clock.advance(0.1)
    return clients


def attempts(world: World, clients: list[Client]) -> list[int]:
    """How often each was sent."""
    return [world.submits[client.request.request_id] for client in clients]


def test_few_are_tried_again_one_by_one_and_a_slow_one_holds_nobody_up_for_long() -> None:
    world = World(max_rows=4)
    clients = lose_all(world, 3)
    assert attempts(world, clients) == [2, 1, 1]
    for _ in range(5):  # no token comes: the worker does not go on
        world.clock.advance(0.3)
        world.loop.settle()
    assert attempts(world, clients) == [2, 2, 2], (
        "a round that does no harm for a second is followed by one twice as large"
    )
    finish(world)
    assert [error_of(client) for client in clients] == [None] * 3


def test_many_are_tried_again_in_growing_rounds_tenants_in_turn_ahead_of_newcomers() -> None:
    world = World(max_rows=2, num_pages=64)
    clients = lose_all(world, 40)
    assert attempts(world, clients) == [2] * 2 + [1] * 38, "the sixteenth part, the oldest of each tenant"
    newcomers = [world.submit([30, 80 + i], 4, tenant="c") for i in range(10)]
    finish(world)
    assert [error_of(client) for client in clients + newcomers] == [None] * 50
    assert max(client.ended_s for client in clients) <= min(client.ended_s for client in newcomers[2:])


def test_places_of_those_who_wait_are_not_given_away() -> None:
    world = World(max_rows=2, max_waiting=6)
    clients = lose_all(world, 8)
    late = world.submit([30, 89], 2)
    assert late.refused is ErrorCode.QUEUE_FULL
    finish(world)
    assert [error_of(client) for client in clients] == [None] * 8


def test_five_kills_in_a_row_make_nobody_guilty_who_was_not_alone() -> None:
    world = World(max_rows=4, num_pages=256)
    clients = lose_all(world, 60)
    for _ in range(4):
        world.flow(3)
        world.nodes[0].die(0)
        world.loop.settle()
        world.restart(0)
        while not world.all_ready():
            world.flow()
            world.clock.advance(0.1)
    finish(world)
    began = {client.request.request_id for client in clients if client.ids}
    failed = {client.request.request_id for client in clients if error_of(client) is not None}
    assert failed <= began, "some that never began were not served"
    assert not any(error_of(client) is ErrorCode.QUARANTINED for client in clients)


def test_of_two_workers_a_poison_request_takes_its_own_and_nobody_else_suffers() -> None:
    world = World(num_workers=2, supervised=True, max_rows=4, num_pages=256)
    clients = [world.submit([30, KILL_TOKEN if i == 7 else 21, i + 20], 1) for i in range(16)]
    for _ in range(4):
        world.live(1.5)
    finish(world)
    assert [i for i, client in enumerate(clients) if error_of(client) is not None] == [7]
    assert error_of(clients[7]) is ErrorCode.QUARANTINED


def test_suspects_have_a_worker_of_their_own_while_there_is_evidence() -> None:
    world = World(num_workers=2, max_rows=4, num_pages=256)
    suspect = world.submit([30, 21], 4)
    world.deliver()
    number = next(
        iter(world.service.workers[i].key for i in (0, 1) if world.service.workers[i].flights.by_id)
    )
    world.nodes[number].die(0)  # it was alone there
    world.loop.settle()
    world.clock.advance(1.0)
    world.loop.settle()
    assert attempts(world, [suspect]) == [1], (
        "it waits for a worker of its own, lest it take the last one along"
    )
    world.restart(number)
    for _ in range(20):
        for node in world.nodes:  # they announce themselves, and begin nothing
            node.tick() if not node.transport.is_announced else node.turn()
        world.deliver()
        if attempts(world, [suspect]) == [2]:
            break
        world.clock.advance(0.1)
        world.loop.settle()
    own = world.service._placement.reserved
    assert own is not None and len(own.flights.by_id) == 1
    newcomers = [world.submit([30, 40 + i], 2) for i in range(5)]
    assert len(own.flights.by_id) == 1, "newcomers go elsewhere"
    finish(world)
    assert [error_of(client) for client in (suspect, *newcomers)] == [None] * 6


def test_a_suspect_does_not_wait_for_ever_for_a_worker_of_its_own() -> None:
    world = World(num_workers=2, max_rows=4)
    suspect = world.submit([30, 21], 4)
    world.deliver()
    number = next(
        iter(world.service.workers[i].key for i in (0, 1) if world.service.workers[i].flights.by_id)
    )
    world.nodes[number].die(0)
    world.live(OWN_WAIT_S + 1.0)
    assert suspect.ids
    finish(world)


def test_a_worker_without_a_place_does_not_end_what_was_accepted() -> None:
    world = World(max_rows=2)
    clients = lose_all(world, 2)
    node = world.nodes[0]
    sequence_id = next(iter(world.service.workers[0].flights.by_id))
    between = node.between
    between._arrive([wire.encode(wire.Rejected(node.epoch, sequence_id, ErrorCode.QUEUE_FULL, "full"))])
    world.loop.settle()
    world.lossy = True  # the worker was not asked, and still runs it
    assert all(client.end is None for client in clients)
    finish(world)
    assert [error_of(client) for client in clients] == [None] * 2


def test_a_device_fault_has_its_own_code() -> None:
    world = World()
    client = under_way(world)
    world.nodes[0].device_lost = True
    world.device_faults += 1
    world.flow(4)
    assert error_of(client) is ErrorCode.DEVICE_ERROR
    finish(world)


def test_a_silent_worker_is_lost_and_what_it_still_runs_is_cancelled() -> None:
    world = World(max_rows=1)
    client = under_way(world)
    world.nodes[0].freeze()
    world.live(3.6)
    assert error_of(client) is ErrorCode.WORKER_LOST
    world.nodes[0].frozen = False
    for _ in range(3):  # hello, ready, cancel
        world.clock.advance(0.3)
        world.deliver()
        world.deliver()
    world.nodes[0].sim.engine.take_commands()
    assert world.all_ready() and not world.nodes[0].sim.scheduler.sequences
    finish(world)


def test_a_new_epoch_behind_the_same_connection_loses_the_old_one() -> None:
    world = World()
    client = under_way(world)
    ready, payloads = world.nodes[0].transport._ready or (None, [])
    assert ready is not None
    other = wire.Ready(ready.protocol_version, ready.schema_hash, 9, ready.model, ready.limits, ready.device)
    world.nodes[0].between._arrive([wire.encode(other), *payloads])
    world.loop.settle()
    assert error_of(client) is ErrorCode.WORKER_LOST
    world.lossy = True
    finish(world)


def test_frames_are_seen_although_a_send_ate_the_edge() -> None:
    world = World()
    client = under_way(world)
    world.tick(2)
    num = len(client.ids)
    world.nodes[0].between.deliver_to_gateway()
    world.submit([30, 22], 2)
    world.loop.settle()
    assert len(client.ids) > num
    finish(world)


def test_what_a_worker_said_before_it_died_counts() -> None:
    world = World()
    client = under_way(world, max_tokens=4)
    world.tick(8)
    world.nodes[0].die(100)
    world.loop.settle()
    assert error_of(client) is None
    finish(world)


def test_a_client_that_reads_nothing_is_cut_off_and_others_are_not() -> None:
    world = World(late_launch=False)
    slow, patient, quick = (world.submit(long_prompt(i), 24) for i in range(3))
    slow.stop_reading()
    patient.stop_reading()
    for turn in range(40):
        world.flow()
        if turn % 3 == 0:
            patient.transport.read_on()
            patient.stop_reading()
    assert slow.end is not None and slow.end.reason is FinishReason.CANCELLED
    assert error_of(patient) is None and error_of(quick) is None
    assert slow.transport.get_write_buffer_size() < 8192
    finish(world)


def test_a_client_that_stalls_is_cut_off_in_time() -> None:
    world = World()
    client = under_way(world, max_tokens=20)
    client.stop_reading()
    world.flow()
    world.nodes[0].freeze()
    world.live(2.0)
    assert client.end is not None and client.end.reason is FinishReason.CANCELLED
    finish(world)


def test_a_full_socket_is_a_gap_for_its_streams_and_the_worker_goes_on() -> None:
    world = World()
    client = under_way(world, max_tokens=20)
    world.nodes[0].between.hwm = 1
    world.lossy = True
    world.tick(4)
    assert world.nodes[0].transport.num_dropped > 0
    world.nodes[0].between.hwm = 100
    world.flow(2)
    assert error_of(client) is ErrorCode.STREAM_GAP
    finish(world)


def test_a_gateway_that_cannot_send_refuses() -> None:
    world = World()
    world.nodes[0].between.hwm = 0
    client = world.submit([30, 21], 2)
    assert client.refused is ErrorCode.QUEUE_FULL
    finish(world)


def test_a_gateway_whose_pings_are_lost_loses_its_lease_and_hears_of_it() -> None:
    world = World()
    client = under_way(world, max_tokens=20)
    node = world.nodes[0]
    world.tampered = True
    client_epoch = node.epoch
    for _ in range(40):
        connection = node.between.connection
        assert connection is not None
        connection.to_worker.clear()
        node.turn()
        if not node.transport._leases:
            break
        node.between.deliver_to_gateway()
        world.loop.settle()
        node.tick() if not client.ids else node.sim.engine._heartbeat.send()
        world.clock.advance(0.24)
    assert not node.transport._leases and client.end is None
    node.sim.engine.take_commands()
    assert not node.sim.scheduler.sequences
    world.live(4.0)
    assert error_of(client) is ErrorCode.WORKER_LOST and node.epoch == client_epoch
    finish(world)


def test_a_drained_worker_finishes_what_it_has_and_leaves() -> None:
    world = World()
    client = under_way(world, max_tokens=4)
    world.nodes[0].sim.inbox.put(Received(b"", wire.Drain(30.0)))
    world.drained = True
    world.flow(20)
    assert error_of(client) is None and not world.nodes[0].alive
    finish(world)


def test_a_stopping_gateway_tells_every_client() -> None:
    world = World()
    client = under_way(world)
    world.drained = True
    world.service.begin_drain()
    world.service.end_all(RequestError(ErrorCode.SHUTTING_DOWN, "the server is shutting down"))
    assert error_of(client) is ErrorCode.SHUTTING_DOWN
    world.flow()
    world.close()
