"""Chosen scenes with prefill workers: a prompt's pages are computed elsewhere, and whatever goes wrong there costs time only."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from shared import protocol as wire
from shared.errors import ErrorCode, FinishReason
from tests.unit.wire.client import Client
from tests.unit.wire.node import KILL_TOKEN
from tests.unit.wire.world import World
from worker.loop.inbox import Received

PROMPT = [30, *range(40, 60)]  # 21 tokens: five whole pages of four, and one


def ask(world: World, prompt: list[int] | None = None, max_tokens: int = 6, **fields: Any) -> Client:
    return world.submit(prompt or PROMPT, max_tokens, **fields)


def error_of(client: Client) -> ErrorCode | None:
    assert client.end is not None
    return client.end.error.code if client.end.error is not None else None


def outcomes(world: World, number: int = 0) -> dict[str, int]:
    return dict(world.nodes[number].sim.engine.metrics.prefills_total)


def num_given(world: World) -> int:
    return world.nodes[0].sim.engine.metrics.given_pages_total


def computed(world: World) -> int:
    """Prompt tokens that the worker itself computed."""
    return world.nodes[0].sim.engine.metrics.prefill_tokens_total


def finish(world: World) -> None:
    world.come_to_rest()
    world.probe()
    world.close()


def until_ended(world: World, *clients: Client) -> None:
    for _ in range(300):
        if all(client.end is not None for client in clients):
            return
        world.flow()
        world.clock.advance(0.02)
    raise AssertionError("no end came")


def until_asked(world: World, number: int = 0, num: int = 1) -> None:
    """Until the prefill worker holds so many prompts, and has not run them."""
    for _ in range(50):
        world.deliver()
        world.nodes[0].tick()
        world.prefills[number].sim.engine.take_commands()
        if len(world.prefills[number].sim.scheduler.sequences) >= num:
            return
        world.clock.advance(0.05)
    raise AssertionError("nothing was asked for")


@pytest.mark.parametrize("length", [4, 5, 8, 9, 20, 21, 23])
@pytest.mark.parametrize("sampling", [wire.Sampling(), wire.Sampling(temperature=1.0, seed=5)])
def test_the_same_tokens_at_every_length_around_a_pages_end(length: int, sampling: wire.Sampling) -> None:
    world = World(num_prefills=1)
    client = ask(world, PROMPT[:1] + list(range(40, 40 + length - 1)), sampling=sampling)
    until_ended(world, client)
    client.check_complete()
    num_pages = (length - 1) // 4
    assert num_given(world) == num_pages
    assert computed(world) == length - 4 * num_pages
    assert outcomes(world) == ({"asked": 1, "done": 1} if num_pages else {})
    assert client.end is not None and client.end.usage.cached_tokens == 0, (
        "they were computed for this request"
    )
    finish(world)


def test_pages_decide_the_tokens() -> None:
    """Wrong ones would be seen: the fake model reads what it was given."""
    world = World(num_prefills=1)
    store = world.prefills[0].sim.store
    store.read = lambda pages: bytes(32 * len(pages))  # type: ignore[method-assign]
    client = ask(world)
    until_ended(world, client)
    assert client.ids != client.answer.tokens
    world.loop.run(world.service.stop())


def test_only_pages_that_are_not_there_travel() -> None:
    world = World(num_prefills=1, prefill_tokens=8)
    until_ended(world, ask(world))
    again = ask(world, [*PROMPT, *range(60, 76)])  # 37 tokens: five pages are there, four are not
    until_ended(world, again)
    assert num_given(world) == 5 + 4 and outcomes(world) == {"asked": 2, "done": 2}
    assert again.end is not None and again.end.usage.cached_tokens == 20
    short = ask(world, [*PROMPT, 90, 91])
    until_ended(world, short)
    assert outcomes(world)["asked"] == 2, "what it lacks is shorter than what is worth asking for"
    finish(world)


def test_long_prompts_of_several_requests_come_in_bites_while_others_stream() -> None:
    world = World(num_prefills=2, step_tokens=12)
    streaming = [world.submit([30, word], 40) for word in (21, 22)]
    clients = [ask(world, [30, *range(40 + n, 60 + n)]) for n in range(4)]
    until_ended(world, *clients, *streaming)
    for client in [*clients, *streaming]:
        client.check_complete()
    assert outcomes(world) == {"asked": 4, "done": 4} and num_given(world) == 20
    finish(world)


@pytest.mark.parametrize("how", ["crash", "device error", "drain", "freeze", "refuse"])
def test_where_the_prefill_worker_is_lost_the_worker_computes_the_prompt(how: str) -> None:
    world = World(num_prefills=1, prefill_wait_s=60.0)
    client = ask(world)
    until_asked(world)
    lost = world.prefills[0]
    if how == "crash":
        lost.die(0)
    elif how == "device error":
        lost.device_lost = True
        world.device_faults += 1
    elif how == "drain":
        lost.inbox.put(Received(b"", wire.Drain(0.0)))
    elif how == "freeze":
        lost.freeze()
        world.live(5.0)
    else:
        (seq,) = lost.sim.scheduler.sequences.values()
        lost.sim.scheduler.fail(seq, ErrorCode.OUT_OF_MEMORY, "no memory")
        lost.sim.engine._reports.send_finish(seq)
    until_ended(world, client)
    client.check_complete()
    wanted = {
        "crash": "lost",
        "device error": "failed",
        "drain": "failed",
        "freeze": "lost",
        "refuse": "failed",
    }
    assert outcomes(world) == {"asked": 1, wanted[how]: 1} and not num_given(world)
    finish(world)


def test_what_came_before_the_loss_is_used() -> None:
    world = World(num_prefills=1, step_tokens=12)  # three pages a step
    client = ask(world, [30, *range(40, 80)])
    until_asked(world)
    while not world.prefills[0].sim.engine.metrics.sent_pages_total:
        world.prefills[0].tick()
    world.prefills[0].turn()
    world.deliver()
    world.prefills[0].die(0)
    until_ended(world, client)
    client.check_complete()
    assert outcomes(world) == {"asked": 1, "lost": 1} and num_given(world) == 3
    assert computed(world) == 41 - 12
    finish(world)


def test_pages_of_a_prompt_that_failed_over_there_are_not_trusted() -> None:
    """A NaN is seen at a prompt's end, and may stand in any page before."""
    world = World(num_prefills=1, step_tokens=12)  # three pages a step
    client = ask(world, [30, *range(40, 80)])
    until_asked(world)
    giver = world.prefills[0].sim
    while not giver.engine.metrics.sent_pages_total:
        world.prefills[0].tick()
    world.prefills[0].turn()
    world.deliver()
    world.nodes[0].tick()
    assert num_given(world) == 3 and world.nodes[0].sim.pool.num_cached == 3
    (seq,) = giver.scheduler.sequences.values()
    giver.scheduler.fail(seq, ErrorCode.NUMERICAL_ERROR, "a NaN")
    giver.engine._reports.send_finish(seq)
    until_ended(world, client)
    client.check_complete()
    assert outcomes(world) == {"asked": 1, "failed": 1} and computed(world) == 41
    finish(world)


def test_a_cancel_reaches_both() -> None:
    world = World(num_prefills=1)
    client = ask(world)
    until_asked(world)
    world.within(client.cancel)
    world.deliver()
    world.nodes[0].tick()
    world.deliver()
    world.deliver()
    world.prefills[0].sim.engine.take_commands()
    assert not world.prefills[0].sim.scheduler.sequences and outcomes(world) == {"asked": 1, "cancelled": 1}
    finish(world)


def test_a_deadline_ends_it_while_its_pages_are_awaited() -> None:
    world = World(num_prefills=1, prefill_wait_s=60.0)
    client = ask(world, deadline_s=0.5)
    until_asked(world)
    world.prefills[0].freeze()
    world.live(1.5)
    assert client.end is not None and client.end.reason is FinishReason.DEADLINE
    finish(world)


def test_who_waits_for_pages_holds_nobody_up_and_waits_so_long_only() -> None:
    world = World(num_prefills=1, prefill_wait_s=1.0)
    client = ask(world)
    until_asked(world)
    world.prefills[0].freeze()
    short = world.submit([30, 21], 4)
    for _ in range(20):
        world.flow()
    assert short.end is not None and client.end is None
    world.live(1.6)
    until_ended(world, client)
    client.check_complete()
    assert outcomes(world)["late"] == 1
    finish(world)


def test_a_worker_lost_meanwhile_is_tried_again_without_a_prefill_worker() -> None:
    world = World(num_prefills=1)
    client = ask(world)
    until_asked(world)
    world.nodes[0].die(0)
    world.loop.settle()
    world.restart(0)
    world.live(2.0)
    until_ended(world, client)
    client.check_complete()
    assert outcomes(world) == {} and world.service.metrics.prefills == {"sent": 1}
    finish(world)


def test_a_prompt_that_kills_is_not_brought_to_a_second_prefill_worker() -> None:
    world = World(num_prefills=2, num_workers=1, supervised=True)
    client = ask(world, [30, *range(40, 50), KILL_TOKEN, *range(50, 60)])
    until_ended(world, client)
    assert error_of(client) is ErrorCode.QUARANTINED
    assert world.service.metrics.prefills == {"sent": 1}
    finish(world)


@pytest.mark.parametrize("to_prefill", [True, False])
def test_a_lost_frame_costs_seconds_only(to_prefill: bool) -> None:
    world = World(num_prefills=1, prefill_wait_s=1.0)
    until_ended(world, ask(world, list(range(60, 80))))  # they know each other
    client = ask(world)
    connection = world.page_wires[0]["ipc:///prefill-0"].connection
    assert connection is not None
    queue = connection.to_worker if to_prefill else connection.to_gateway
    kind = wire.Prefill if to_prefill else wire.Pages
    decode = wire.decode_from_gateway if to_prefill else wire.decode_from_worker
    for _ in range(50):
        world.tick()
        found = [i for i, frames in enumerate(queue) if isinstance(decode(frames[0]), kind)]
        if found:
            break
        world.deliver()
    del queue[found[0]]
    world.live(2.0)
    until_ended(world, client)
    client.check_complete()
    assert outcomes(world)["late" if to_prefill else "malformed"] == 1
    finish(world)


@pytest.mark.parametrize("how", ["changed", "cut", "other keys", "missing"])
def test_pages_that_are_not_what_was_asked_for_are_not_taken(how: str) -> None:
    world = World(num_prefills=1)
    client = ask(world)
    connection = None
    for _ in range(50):
        world.tick()
        connection = world.page_wires[0]["ipc:///prefill-0"].connection
        queue = connection.to_gateway if connection is not None else []
        at = [i for i, f in enumerate(queue) if isinstance(wire.decode_from_worker(f[0]), wire.Pages)]
        if at:
            break
        world.deliver()
    assert connection is not None and at
    message, data = connection.to_gateway[at[0]]
    pages = wire.decode_from_worker(message)
    assert isinstance(pages, wire.Pages)
    if how == "other keys":
        pages = msgspec.structs.replace(pages, keys=bytes(len(pages.keys)))
    changed = {"changed": [b"\1" + data[1:]], "cut": [data[:-8]], "other keys": [data], "missing": []}[how]
    connection.to_gateway[at[0]] = [wire.encode(pages), *changed]
    until_ended(world, client)
    client.check_complete()
    assert outcomes(world) == {"asked": 1, "malformed": 1} and not num_given(world)
    finish(world)


@pytest.mark.parametrize("field", ["dtype", "page_tokens", "layout", "page_bytes", "weights"])
def test_another_kind_of_pages_is_never_asked_for(field: str) -> None:
    world = World(num_prefills=1)
    link = world.service.workers[1].link
    assert link.ready is not None and link.ready.pages is not None
    other = 7 if isinstance(getattr(link.ready.pages, field), int) else "other"
    pages = msgspec.structs.replace(link.ready.pages, **{field: other})
    link._life.ready = msgspec.structs.replace(link.ready, pages=pages)
    until_ended(world, ask(world))
    assert not world.service.metrics.prefills and outcomes(world) == {}
    link._life.ready = link.ready
    world.loop.run(world.service.stop())


def test_a_worker_refuses_another_kind_of_pages_itself() -> None:
    """A gateway that knows of an older announcement only may ask for it."""
    world = World(num_prefills=1)
    transport = world.prefills[0].transport
    assert transport._ready is not None
    ready, payloads = transport._ready
    assert ready.pages is not None
    transport.announce(
        msgspec.structs.replace(ready, pages=msgspec.structs.replace(ready.pages, weights="other")), payloads
    )
    clients = [ask(world), ask(world, list(range(60, 80)))]
    until_ended(world, *clients)
    assert [error_of(client) for client in clients] == [None, None]
    assert outcomes(world)["mismatched"] == 2 and not world.prefills[0].sim.engine.metrics.steps_total
    finish(world)


def test_what_has_no_plain_pages_is_not_sent() -> None:
    world = World(num_prefills=1)
    scored = ask(world, sampling=wire.Sampling(num_prompt_logprobs=0))
    until_ended(world, scored)
    assert not world.service.metrics.prefills
    finish(world)


def test_where_every_row_of_a_prefill_worker_is_taken_the_prompt_stays() -> None:
    world = World(num_prefills=1, max_rows=2)
    clients = [ask(world, [30, *range(40 + n, 60 + n)]) for n in range(3)]
    assert world.service.metrics.prefills == {"sent": 2, "full": 1}
    until_ended(world, *clients)
    assert outcomes(world) == {"asked": 2, "done": 2}
    assert world.service.workers[1].num_prompts == 0
    finish(world)


def test_where_memory_is_short_nothing_is_pinned() -> None:
    """Pages that came are forgotten like any others; rows that decode never wait for them."""
    world = World(num_prefills=1, num_pages=12, max_rows=2)
    clients = [ask(world, [30, *range(40 + n, 60 + n)], 12) for n in range(4)]
    until_ended(world, *clients)
    for client in clients:
        client.check_complete()
    finish(world)


def test_a_prefill_worker_takes_no_requests_and_others_compute_for_nobody() -> None:
    world = World(num_prefills=1)
    until_ended(world, ask(world))
    assert not world.service.workers[1].serves_requests and world.service.workers[1].model is None
    epoch = world.prefills[0].epoch
    submit = wire.Submit(epoch, 77, "r", wire.pack_i32(PROMPT), 4)
    gateway = next(iter(world.prefills[0].transport._leases))
    world.prefills[0].inbox.put(Received(gateway, submit))
    world.prefills[0].sim.engine.take_commands()
    assert not world.prefills[0].sim.scheduler.sequences
    worker = world.nodes[0]
    prefill = wire.Prefill(worker.epoch, 78, wire.pack_i32(PROMPT))
    worker.inbox.put(Received(gateway, prefill))
    worker.sim.engine.take_commands()
    assert not worker.sim.scheduler.sequences and worker.sim.engine.metrics.rejected_total == 1
    world.loop.run(world.service.stop())
