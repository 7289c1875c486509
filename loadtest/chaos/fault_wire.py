"""Owns faults between gateway and worker: frames that are no messages, doubled or of a dead epoch, skewed versions, a bad network."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from typing import Final

import msgspec
import zmq

from loadtest.chaos.asking import Heard, body, client, metric, readiness, stream
from loadtest.chaos.faults import Fault, Found, Size, counted
from loadtest.chaos.services import entered, sim_fleet
from loadtest.fault_proxy import FaultProxy, Faults
from loadtest.peers.process import free_port
from shared.protocol import (
    NO_MESSAGE,
    PROTOCOL_VERSION,
    Cancel,
    Fatal,
    Hello,
    Ready,
    StepOutputs,
    Submit,
    decode_from_worker,
    encode,
    pack_i32,
    schema_hash,
)

TOLD_S: Final = 1.0
SILENT_S: Final = 4.5  # 3 s of silence, a heartbeat, a busy machine
NUM_BAD: Final = 200


class Relay:
    """Between one gateway and its worker, on a thread of its own: everything passes, and more comes to the gateway than was sent."""

    def __init__(self, listen: str, worker: str) -> None:
        self.num_garbage = self.num_doubled = self.num_stale = 0
        self._listen, self._worker = listen, worker
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    def __enter__(self) -> Relay:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        front, back = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
        for one in (front, back):
            one.linger = 0
        front.bind(self._listen)
        back.connect(self._worker)
        poller = zmq.Poller()
        poller.register(front, zmq.POLLIN)
        poller.register(back, zmq.POLLIN)
        identity, number = b"", 0
        rng = random.Random(7)
        while not self._ended.is_set():
            ready = dict(poller.poll(50))
            if front in ready:
                identity, *frames = front.recv_multipart()
                back.send_multipart(frames)
            if back in ready:
                frames = back.recv_multipart()
                front.send_multipart([identity, *frames])
                message = decode_from_worker(frames[0])
                if not isinstance(message, StepOutputs):
                    continue
                number += 1
                if number % 5 == 0:
                    self.num_garbage += 1
                    front.send_multipart([identity, rng.randbytes(rng.randrange(1, 60))])
                elif number % 5 == 1:
                    self.num_doubled += 1
                    front.send_multipart([identity, *frames])
                elif number % 5 == 2:
                    self.num_stale += 1
                    stale = msgspec.structs.replace(message, epoch=message.epoch - 1)
                    front.send_multipart([identity, encode(stale), *frames[1:]])
        front.close()
        back.close()
        context.term()


async def _bad_frames(size: Size) -> list[Found]:
    """To the worker from a second gateway, and to the gateway from a relay before the worker."""
    async with entered(sim_fleet("--max-rows", "8")) as running, client() as session:
        endpoint = running.workers[0].address
        heard = Heard(0.0)
        beside = asyncio.create_task(stream(session, running.url, body("beside", 600), heard))
        await heard.first.wait()
        finished = await asyncio.to_thread(_spray, endpoint)
        await beside
        lives = running.workers[0].is_running
        listen = f"ipc://{running.folder}/relay.sock"
        with Relay(listen, endpoint) as relay:
            gateway = running.gateways[0]
            gateway.stop()
            await asyncio.to_thread(gateway.reap, 10.0)
            gateway.environment["DEGAS_GATEWAY_WORKERS"] = listen
            gateway.start()
            await asyncio.to_thread(running.wait_ready)
            answers = [await stream(session, running.url, body(f"relayed {n}", 100)) for n in range(3)]
            counts = f"{relay.num_garbage} of garbage, {relay.num_doubled} doubled, {relay.num_stale} of a dead epoch"
            num_counted = await metric(session, running.url, "degas_worker_anomalies_total")
            num_sent = relay.num_garbage + relay.num_doubled + relay.num_stale
    return [
        Found(
            "the worker drops them, and nothing raises in its loop",
            f"{NUM_BAD} bad frames: it {'lives' if lives else 'died'}; a good one among them {'was answered' if finished else 'was not'}; a "
            f"stream beside it is {heard.outcome}",
            lives and finished and heard.is_whole,
        ),
        Found(
            "the gateway drops and counts them",
            f"{counts}: streams are {counted(one.outcome for one in answers)}; {num_counted:g} of {num_sent} counted",
            all(one.is_whole for one in answers) and num_counted >= num_sent > 0,
        ),
    ]


def _spray(endpoint: str) -> bool:
    """Whether a good request that comes after all the bad ones is answered."""
    rng = random.Random(11)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    own = context.socket(zmq.DEALER)
    own.linger = 0
    own.connect(endpoint)
    try:
        own.send(encode(Hello(PROTOCOL_VERSION, schema_hash(), "spray", 30.0)))
        ready = _next(own, Ready)
        if not isinstance(ready, Ready):
            return False
        good = encode(Submit(ready.epoch, 5, "good", pack_i32([40, 41, 42]), 5, ignore_eos=True))
        bad = [
            encode(Submit(ready.epoch - 1, 5, "stale", pack_i32([40]), 5)),
            encode(Submit(ready.epoch, 6, "no ids", b"\1\2\3", 5)),
            encode(Submit(ready.epoch, 7, "huge ids", pack_i32([2**31 - 1]), 5)),
            encode(Submit(ready.epoch, 8, "negative", pack_i32([40]), -5)),
            encode(Cancel(ready.epoch, [99, -1])),
            encode(Cancel(ready.epoch - 7, [5])),
            good[:-3],
            b"",
            b"\x91" * 5000,
        ]
        for number in range(NUM_BAD):
            one = bad[number % len(bad)] if number % 2 else rng.randbytes(rng.randrange(1, 80))
            own.send_multipart([one] if number % 3 else [one, b"a payload that nobody asked for"])
        own.send(good)
        own.send(good)  # and once more: a doubled id
        deadline_s = time.monotonic() + 10
        while time.monotonic() < deadline_s:
            outputs = _next(own, StepOutputs)
            if isinstance(outputs, StepOutputs) and any(
                finish.sequence_id == 5 and finish.completion_tokens == 5 for finish in outputs.finishes
            ):
                return True
        return False
    finally:
        own.close()
        context.term()


def _next(own: zmq.Socket[bytes], kind: type[object]) -> object | None:
    """The next message of a kind within two seconds."""
    deadline_s = time.monotonic() + 2
    while time.monotonic() < deadline_s:
        if not own.poll(100):
            continue
        try:
            message = decode_from_worker(own.recv_multipart()[0])
        except NO_MESSAGE:
            continue
        if isinstance(message, kind):
            return message
    return None


async def _skew(size: Size) -> list[Found]:
    async with entered(sim_fleet()) as running, client() as session:
        found = []
        for what, hello in (
            ("a newer protocol", Hello(PROTOCOL_VERSION + 1, schema_hash(), "newer", 5.0)),
            ("other fields", Hello(PROTOCOL_VERSION, "0123456789abcdef", "other", 5.0)),
        ):
            asked_s = time.perf_counter()
            answer = await asyncio.to_thread(_say_hello, running.workers[0].address, hello)
            took_s = time.perf_counter() - asked_s
            said = f"{answer.code}: {answer.message}" if isinstance(answer, Fatal) else "no refusal"
            found.append(
                Found.within(f"refused at hello: {what}", took_s, 2.0, said, also=isinstance(answer, Fatal))
            )
        log = running.workers[0].log.read_text(errors="replace")
        lines = [line for line in log.splitlines() if "skew" in line or "version" in line or "schema" in line]
        served = await stream(session, running.url, body("beside", 3))
    found.append(
        Found(
            "with a clear line in the log",
            lines[0][:140] if lines else "nothing",
            bool(lines) and served.is_whole,
        )
    )
    return found


def _say_hello(endpoint: str, hello: Hello) -> object | None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    own = context.socket(zmq.DEALER)
    own.linger = 0
    own.connect(endpoint)
    try:
        own.send(encode(hello))
        return _next(own, Fatal)
    finally:
        own.close()
        context.term()


async def _network(size: Size) -> list[Found]:
    """A proxy between gateway and worker that is cut, then swallows everything; and one between client and gateway."""
    port = free_port()
    found = []
    async with FaultProxy("127.0.0.1", port) as proxy:
        fleet_over = sim_fleet(
            "--max-rows",
            "8",
            endpoints=[f"tcp://127.0.0.1:{port}"],
            gateway_endpoints=[f"tcp://127.0.0.1:{proxy.port}"],
        )
        async with entered(fleet_over) as running, client() as session:
            for what, bound_s in (("cut", TOLD_S), ("swallows everything", SILENT_S)):
                heard = [Heard(0.0) for _ in range(4)]
                tasks = [
                    asyncio.create_task(stream(session, running.url, body("through", 3000), one))
                    for one in heard
                ]
                await asyncio.gather(*(one.first.wait() for one in heard))
                at_s = time.perf_counter()
                proxy.faults.blackhole = what != "cut"
                if what == "cut":
                    proxy.cut()
                await asyncio.gather(*tasks)
                told_s = max(one.end_s for one in heard) - at_s
                proxy.faults.blackhole = False
                proxy.cut()
                healed = await _healed(running.url)
                found.append(
                    Found.within(
                        f"between gateway and worker, {what}: streams are told",
                        told_s,
                        bound_s,
                        f"4 streams: {counted(one.outcome for one in heard)}; served again {healed:.1f} s after it is mended",
                        also=all(one.code for one in heard) and healed < 20,
                    )
                )
            gateway_port = int(running.url.rpartition(":")[2])
            async with FaultProxy("127.0.0.1", gateway_port, faults=Faults(reset=True)) as outer:
                heard = [Heard(0.0) for _ in range(4)]
                url = f"http://127.0.0.1:{outer.port}"
                tasks = [
                    asyncio.create_task(stream(session, url, body("through", 3000), one)) for one in heard
                ]
                await asyncio.gather(*(one.first.wait() for one in heard))
                outer.cut()
                cut_s = time.perf_counter()
                while await metric(session, running.url, "degas_requests_in_flight"):
                    if time.perf_counter() - cut_s > 10:
                        break
                    await asyncio.sleep(0.01)
                free_s = time.perf_counter() - cut_s
                await asyncio.gather(*tasks)
        found.append(
            Found.within(
                "between client and gateway, reset: nothing is left under way",
                free_s,
                TOLD_S,
                f"4 streams: {counted(one.outcome for one in heard)}",
            )
        )
    return found


async def _healed(url: str) -> float:
    since_s = time.perf_counter()
    async with client() as own:
        while time.perf_counter() - since_s < 20:
            if await readiness(own, url) == 200 and (await stream(own, url, body("again", 2))).is_whole:
                return time.perf_counter() - since_s
            await asyncio.sleep(0.05)
    return float("inf")


FAULTS: Final = [
    Fault("bad-frames", "malformed, stale or doubled frames", _bad_frames),
    Fault("version-skew", "gateway and worker of different versions", _skew),
    Fault("network", "a network that cuts, resets and swallows", _network),
]
