"""Chosen scenes with encoders: a picture is encoded once and elsewhere, and whatever goes wrong there costs time only."""

from __future__ import annotations

import hashlib

import msgspec
import pytest

from gateway.generation import PreparedImage
from shared import protocol as wire
from shared.errors import ErrorCode
from tests.two_sheets import image_input
from tests.unit.wire.client import Client
from tests.unit.wire.node import KILL_DIGEST
from tests.unit.wire.world import World
from worker.loop.inbox import Received


def picture(name: str = "x", digest: bytes | None = None) -> PreparedImage:
    spec = image_input(1, 9, 8, digest or hashlib.sha256(name.encode()).digest())
    return PreparedImage(spec, [bytes(192), bytes(192)])


def ask(world: World, image: PreparedImage | None = None, word: int = 21, max_tokens: int = 6) -> Client:
    return world.submit([30, word], max_tokens, images=[image or picture()])


def error_of(client: Client) -> ErrorCode | None:
    assert client.end is not None
    return client.end.error.code if client.end.error is not None else None


def outcomes(world: World) -> dict[str, int]:
    return dict(world.service.metrics.pictures)


def finish(world: World) -> None:
    world.come_to_rest()
    world.probe()
    world.close()


def until_ended(world: World, *clients: Client) -> None:
    for _ in range(200):
        if all(client.end is not None for client in clients):
            return
        world.flow()
    raise AssertionError("no end came")


def test_a_picture_is_encoded_elsewhere_with_the_same_tokens() -> None:
    world = World(num_encoders=1)
    client = ask(world)
    until_ended(world, client)
    assert error_of(client) is None
    assert outcomes(world) == {"asked": 1, "encoded": 1}
    assert world.service.metrics.feature_bytes == 9 * 8
    assert world.service.metrics.histograms["encoder_wait_seconds"].cumulative()[-1] == 1
    finish(world)


def test_features_decide_the_tokens() -> None:
    """Wrong ones would be seen: the fake model reads what it was given, not what the digest says."""
    world = World(num_encoders=1)
    encode = world.encoders[0].encoder.encode
    world.encoders[0].encoder.encode = lambda *given: bytes(len(encode(*given)))  # type: ignore[method-assign]
    client = ask(world)
    until_ended(world, client)
    assert client.ids != client.answer.tokens
    world.loop.run(world.service.stop())


def test_a_worker_that_has_a_picture_is_not_given_it_again() -> None:
    world = World(num_encoders=1)
    until_ended(world, ask(world))
    again = [ask(world, word=word) for word in (22, 23)]
    until_ended(world, *again)
    assert outcomes(world) == {"asked": 1, "encoded": 1} and world.encoders[0].num_encoded == 1
    for number in range(6):  # more than the worker says that it keeps
        until_ended(world, ask(world, picture(f"other {number}")))
    until_ended(world, ask(world))
    assert outcomes(world)["asked"] == 8
    finish(world)


def test_two_requests_with_one_picture_ask_once() -> None:
    world = World(num_encoders=2)
    clients = [ask(world, word=word) for word in (21, 22, 23)]
    until_ended(world, *clients)
    assert outcomes(world) == {"asked": 1, "shared": 2, "encoded": 1}
    assert sorted(encoder.num_encoded for encoder in world.encoders) == [0, 1]
    finish(world)


def test_several_pictures_of_one_request_are_spread_and_all_waited_for() -> None:
    world = World(num_encoders=2)
    clients = [ask(world, picture(str(number)), 20 + number) for number in range(12)]
    until_ended(world, *clients)
    assert outcomes(world) == {"asked": 12, "encoded": 12}
    assert all(encoder.num_encoded > 2 for encoder in world.encoders)
    finish(world)


@pytest.mark.parametrize("how", ["crash", "device error", "drain", "freeze"])
def test_a_lost_encoder_is_a_retry_at_another(how: str) -> None:
    world = World(num_encoders=2)
    client = ask(world)
    (job,) = world.service._dispatch.encoders._by_id.values()
    assert job.encoder is not None
    lost = world.encoders[world.service.workers.index(job.encoder) - 1]
    if how == "crash":
        world.deliver()
        lost.die(0)
        world.loop.settle()
    elif how == "device error":
        lost.device_lost = True
        world.device_faults += 1
    elif how == "drain":
        lost.inbox.put(Received(b"", wire.Drain(30.0)))  # before the picture
    else:
        lost.freeze()
        world.live(4.0)
    until_ended(world, client)
    assert error_of(client) is None
    found = outcomes(world)
    assert found["asked"] == 2 and found["encoded"] == 1
    assert found["refused" if how == "drain" else "lost"] == 1
    finish(world)


def test_where_all_encoders_are_lost_the_worker_encodes_itself() -> None:
    world = World(num_encoders=2)
    clients = [ask(world, picture(str(number)), 20 + number) for number in range(4)]
    for encoder in world.encoders:
        encoder.die(0)
        world.loop.settle()
    until_ended(world, *clients)
    assert [error_of(client) for client in clients] == [None] * 4
    assert outcomes(world)["given_up"] == 4 and world.service.metrics.feature_bytes == 0
    later = ask(world, picture("later"))
    until_ended(world, later)
    assert error_of(later) is None and "unplaced" not in outcomes(world)
    finish(world)


def test_a_worker_lost_meanwhile_is_no_evidence_against_who_was_not_sent() -> None:
    world = World(num_encoders=1)
    client = ask(world)
    world.nodes[0].die(0)
    world.loop.settle()
    assert client.end is None
    (flight,) = world.service.unlanded
    assert not flight.record.has_lost and not len(world.service._dispatch.encoders)
    finish(world)
    assert error_of(client) is None


def test_who_is_tried_again_and_waits_for_a_picture_leaves_its_trial_with_a_cancel() -> None:
    world = World(num_encoders=1)
    client = ask(world)
    while not world.submits[client.request.request_id]:
        world.deliver()
        world.encoders[0].tick()
        world.encoders[0].turn()
    world.nodes[0].die(0)
    world.loop.settle()
    world.encoders[0].freeze()
    world.restart(0)
    recovery = world.service._dispatch.recovery
    while not recovery.on_trial:
        world.flow()
        world.clock.advance(0.1)
    (flight,) = world.service.unlanded
    assert flight.staged is not None and flight.record.has_lost
    world.within(client.cancel)
    world.check()
    assert not recovery.on_trial
    finish(world)


def test_a_cancelled_request_leaves_the_encoder() -> None:
    world = World(num_encoders=1)
    clients = [ask(world, picture(str(number)), 20 + number) for number in range(3)]
    world.deliver()
    world.within(clients[1].cancel)
    until_ended(world, *clients)
    assert world.encoders[0].num_encoded == 2
    finish(world)


def test_a_picture_that_kills_encoders_is_quarantined_before_it_kills_a_worker() -> None:
    world = World(num_encoders=2, supervised=True)
    streaming = [world.submit([30, word], 24) for word in range(20, 24)]
    poison = ask(world, picture(digest=KILL_DIGEST))
    until_ended(world, poison, *streaming)
    assert error_of(poison) is ErrorCode.QUARANTINED
    assert all(error_of(client) is None for client in streaming)
    assert world.service.num_losses == 2 and world.nodes[0].alive
    finish(world)


@pytest.mark.parametrize("to_encoder", [True, False])
def test_a_lost_frame_is_noticed_and_costs_seconds_only(to_encoder: bool) -> None:
    world = World(num_encoders=1)
    client = ask(world)
    connection = world.encoders[0].between.connection
    assert connection is not None
    if to_encoder:
        assert isinstance(wire.decode_from_gateway(connection.to_worker.pop()[0]), wire.Encode)
    else:
        world.encoders[0].between.deliver_to_worker()
        world.encoders[0].turn()
        world.encoders[0].tick()
        world.encoders[0].turn()
        answers = [wire.decode_from_worker(frames[0]) for frames in connection.to_gateway]
        at = next(i for i, answer in enumerate(answers) if isinstance(answer, wire.Features))
        del connection.to_gateway[at]
    world.live(6.0)
    assert error_of(client) is None
    assert outcomes(world) == {"asked": 1, "unanswered": 1, "given_up": 1}
    finish(world)


def test_an_encoder_that_was_held_still_is_given_the_time_to_read_what_came() -> None:
    """Its first heartbeat afterwards says that it is idle: the picture waits in its socket."""
    world = World(num_encoders=1)
    encoders, worker = world.service._dispatch.encoders, world.service.workers[1]
    client = ask(world)
    assert worker.link.ready is not None
    beat = wire.Beat(worker.link.epoch, 0, 0, 0, 0, 0, False, {})
    (job,) = encoders._by_id.values()
    job.asked_s -= 10
    encoders.on_beat(worker, beat)
    assert outcomes(world) == {"asked": 1}
    until_ended(world, client)
    assert outcomes(world) == {"asked": 1, "encoded": 1}
    finish(world)


@pytest.mark.parametrize("how", ["size", "format", "frame"])
def test_an_answer_that_does_not_fit_is_counted_and_not_used(how: str) -> None:
    world = World(num_encoders=1)
    client = ask(world)
    worker = world.service.workers[1]
    (job,) = world.service._dispatch.encoders._by_id.values()
    format = wire.FeatureFormat("int64", 1, "other" if how == "format" else "sim")
    answer = wire.encode(wire.Features(worker.link.epoch, job.job_id, format))
    frames = {"size": [bytes(71)], "format": [bytes(72)], "frame": []}[how]
    world.encoders[0].between._arrive([answer, *frames])
    world.loop.settle()
    assert worker.link.anomalies["malformed"] == 1
    until_ended(world, client)
    assert error_of(client) is None and world.service.metrics.feature_bytes == 0
    finish(world)


def test_a_full_encoder_leaves_the_rest_to_the_worker() -> None:
    world = World(num_encoders=1, encoder_jobs=2)
    clients = [ask(world, picture(str(number)), 20 + number) for number in range(5)]
    until_ended(world, *clients)
    assert all(error_of(client) is None for client in clients)
    assert outcomes(world) == {"asked": 2, "unplaced": 3, "encoded": 2}
    finish(world)


def test_another_model_behind_an_encoder_is_not_used_and_a_worker_would_refuse_it() -> None:
    world = World(num_encoders=1)
    link = world.service.workers[1].link
    assert link.ready is not None
    ready = msgspec.structs.replace(link.ready, features=wire.FeatureFormat("int64", 1, "other weights"))
    link._life.ready = ready
    client = ask(world)
    until_ended(world, client)
    assert error_of(client) is None and not outcomes(world)
    finish(world)


def test_an_encoder_alone_serves_nobody() -> None:
    world = World(num_encoders=1)
    world.nodes[0].die(0)
    world.loop.settle()
    assert world.service.readiness() == (False, "no worker is ready")
    assert [model.card.model_id for model in world.service.models()] == ["sim"]
    finish(world)
