"""Every accepted request ends in exactly one terminal event, whatever becomes of its worker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest

from shared import protocol as wire
from shared.errors import ErrorCode, FinishReason
from tests.fake_worker import (
    CARD,
    LIMITS,
    Action,
    Die,
    End,
    FakeWorker,
    Skip,
    Token,
    Wait,
    ids_text,
    text_ids,
)
from tests.gateway_thread import GatewayThread
from tests.http_client import Answer, Opened, ask

CHAT = "/v1/chat/completions"


def chat(text: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


def in_background(work: Callable[[], Answer]) -> tuple[threading.Thread, list[Answer]]:
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(work()), daemon=True)
    thread.start()
    return thread, answers


def test_a_death_in_mid_stream_is_an_error_event_at_once(gateway: GatewayThread, worker: FakeWorker) -> None:
    worker.script = lambda _: [*map(Token, text_ids("so far")), Wait(60)]
    with Opened(gateway.url, CHAT, chat(stream=True)) as opened:
        events = opened.events()
        seen = [next(events) for _ in range(7)]
        assert "".join(event["choices"][0]["delta"]["content"] for event in seen) == "so far"
        died_s = time.monotonic()
        worker.die()
        last = list(events)
        assert time.monotonic() - died_s < 1.0
    assert [event["error"]["code"] for event in last] == ["worker_lost"]
    worker.restart()
    gateway.wait_ready()
    worker.reply("again")
    assert ask(gateway.url, CHAT, chat()).json["choices"][0]["message"]["content"] == "again"


def test_unstarted_requests_are_retried_once(gateway: GatewayThread, worker: FakeWorker) -> None:
    worker.hold()
    thread, answers = in_background(lambda: ask(gateway.url, CHAT, chat()))
    worker.wait_submits(1)
    worker.die()
    worker.reply("second time")
    worker.restart()
    thread.join(10)
    assert answers[0].status == 200 and b"second time" in answers[0].body
    assert len(worker.submits) == 2
    first, second = worker.submits
    assert first.prompt == second.prompt and first.sequence_id != second.sequence_id


@pytest.mark.slow
def test_a_poison_request_is_quarantined_and_the_others_served(
    gateway: GatewayThread, worker: FakeWorker
) -> None:
    def script(submit: wire.Submit) -> list[Action]:
        text = ids_text(wire.unpack_i32(submit.prompt).tolist())
        if text == "poison":
            return [Wait(0.05), Die()]
        return [Wait(0.2), *map(Token, text_ids(text)), End()]

    worker.script = script
    texts = ["one", "two", "poison", "three", "four"]
    stop = threading.Event()

    def supervise() -> None:
        while not stop.is_set():
            if worker._thread is not None and not worker._thread.is_alive():
                worker.restart()
            time.sleep(0.01)

    supervisor = threading.Thread(target=supervise)
    supervisor.start()
    try:
        with ThreadPoolExecutor(len(texts)) as pool:
            answers = list(pool.map(lambda text: ask(gateway.url, CHAT, chat(text)), texts))
    finally:
        stop.set()
        supervisor.join()
    for text, answer in zip(texts, answers, strict=True):
        if text == "poison":
            assert (answer.status, answer.error["code"]) == (422, "quarantined")
        else:
            assert (answer.status, answer.json["choices"][0]["message"]["content"]) == (200, text)
    tried = [ids_text(wire.unpack_i32(submit.prompt).tolist()) for submit in worker.submits]
    assert tried.count("poison") == 2
    assert gateway.call(lambda: gateway.gateway.service.num_in_flight) == 0


@pytest.mark.slow
def test_without_a_new_worker_the_retry_ends_in_an_error(worker: FakeWorker) -> None:
    with GatewayThread(workers=[worker.endpoint], retry_wait_s=0.3) as gateway:
        gateway.wait_ready()
        worker.hold()
        thread, answers = in_background(lambda: ask(gateway.url, CHAT, chat()))
        worker.wait_submits(1)
        worker.die()
        thread.join(10)
        assert (answers[0].status, answers[0].error["code"]) == (503, "worker_lost")
        assert int(answers[0].headers["retry-after"]) >= 1
        refused = ask(gateway.url, CHAT, chat())
        assert (refused.status, refused.error["code"]) == (503, "loading")
        assert ask(gateway.url, "/readyz").status == 503
        assert ask(gateway.url, "/healthz").status == 200


@pytest.mark.slow
def test_a_silent_decode_thread_is_a_lost_worker_though_its_socket_lives(worker: FakeWorker) -> None:
    worker.limits = msgspec.structs.replace(worker.limits, progress_timeout_s=0.4)
    with GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_ready()
        worker.script = lambda _: [*map(Token, text_ids("ab")), Wait(60)]
        with Opened(gateway.url, CHAT, chat(stream=True)) as opened:
            events = opened.events()
            for _ in range(3):
                next(events)
            worker.freeze()
            assert [event["error"]["code"] for event in events] == ["worker_lost"]
        assert ask(gateway.url, "/readyz").status == 503
        worker.thaw()
        gateway.wait_ready()
        assert worker.wait_cancelled(1) == [worker.submits[0].sequence_id], (
            "the old sequence is not left running"
        )
        worker.reply("back")
        assert b"back" in ask(gateway.url, CHAT, chat()).body


def test_a_restart_behind_the_same_address_is_seen_by_its_epoch(
    gateway: GatewayThread, worker: FakeWorker
) -> None:
    worker.hold()
    thread, answers = in_background(lambda: ask(gateway.url, CHAT, chat()))
    worker.wait_submits(1)
    worker.reply("new epoch")
    worker.epoch = 9
    worker.release()
    worker.send_raw(worker.ready_frames())
    thread.join(10)
    assert b"new epoch" in answers[0].body
    assert [submit.epoch for submit in worker.submits] == [1, 9]


def test_fatal_ends_streams_with_its_own_code(gateway: GatewayThread, worker: FakeWorker) -> None:
    worker.script = lambda _: [*map(Token, text_ids("ab")), Wait(60)]
    with Opened(gateway.url, CHAT, chat(stream=True)) as opened:
        events = opened.events()
        for _ in range(3):
            next(events)
        worker.send_raw([wire.encode(wire.Fatal(1, ErrorCode.DEVICE_ERROR, "the device fell over"))])
        (last,) = list(events)
    assert last["error"]["code"] == "device_error"


@pytest.mark.parametrize(
    "frames",
    [
        [b"not msgpack \xc1"],
        [b""],
        [msgspec.msgpack.encode(["StepOutputs", 1, "x"])],
        [wire.encode(wire.StepOutputs(1, 1, b"123", b"", b""))],
        [wire.encode(wire.StepOutputs(1, 1, wire.pack_i64([1, 2]), wire.pack_i32([0]), wire.pack_i32([9])))],
        [wire.encode(wire.StepOutputs(77, 1, b"", b"", b""))],
        [wire.encode(wire.Rejected(77, 1, ErrorCode.INTERNAL, ""))],
        [wire.encode(wire.Ready(wire.PROTOCOL_VERSION, wire.schema_hash(), 55, CARD, LIMITS, "x"))],
        [wire.encode(wire.Hello(1, "", "a gateway, not a worker"))],
        [b"\x00" * (5 << 20)],
    ],
)
def test_bad_frames_are_counted_dropped_and_nothing_else(
    gateway: GatewayThread, worker: FakeWorker, frames: list[bytes]
) -> None:
    link = gateway.gateway.service.workers[0].link
    before = gateway.call(lambda: sum(link.anomalies.values()))
    for _ in range(3):
        worker.send_raw(frames)
    gateway.wait_for(lambda: sum(link.anomalies.values()) >= before + 3)
    assert ask(gateway.url, CHAT, chat()).status == 200
    assert b"degas_worker_anomalies_total" in ask(gateway.url, "/metrics").body


def test_duplicates_are_dropped(gateway: GatewayThread, worker: FakeWorker) -> None:
    a, b, c = map(Token, text_ids("abc"))
    worker.script = lambda _: [a, b, Skip(-1), b, c, End()]
    assert ask(gateway.url, CHAT, chat()).json["choices"][0]["message"]["content"] == "abc"
    link = gateway.gateway.service.workers[0].link
    assert gateway.call(lambda: link.anomalies["duplicate_token"]) == 1


def test_a_gap_ends_the_stream_with_an_error_and_frees_the_worker(
    gateway: GatewayThread, worker: FakeWorker
) -> None:
    worker.script = lambda _: [*map(Token, text_ids("ab")), Skip(1), *map(Token, text_ids("cd")), Wait(60)]
    answer = ask(gateway.url, CHAT, chat())
    assert (answer.status, answer.error["code"]) == (500, "stream_gap")
    worker.wait_cancelled(1)


def test_version_skew_is_refused_in_words(worker: FakeWorker) -> None:
    worker._hello_answer = lambda _: [
        wire.encode(wire.Ready(99, "other", 5, worker.card, worker.limits, "x")),
        b"",
        b"",
    ]
    with GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_for(lambda: bool(gateway.gateway.service.workers[0].link.refusal))
        ready = ask(gateway.url, "/readyz")
        assert ready.status == 503 and "protocol 99" in ready.json["reason"]


def test_an_unusable_tokenizer_is_refused(worker: FakeWorker) -> None:
    worker.tokenizer_json = b"{}"
    with GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_for(lambda: bool(gateway.gateway.service.workers[0].link.refusal))
        assert "tokenizer" in ask(gateway.url, "/readyz").json["reason"]


@pytest.mark.slow
def test_two_workers_share_the_load_and_one_may_die(worker: FakeWorker) -> None:
    with FakeWorker() as other, GatewayThread(workers=[worker.endpoint, other.endpoint]) as gateway:
        gateway.wait_for(lambda: all(w.link.ready is not None for w in gateway.gateway.service.workers))
        for one in (worker, other):
            one.script = lambda _: [Wait(0.1), *map(Token, text_ids("ok")), End()]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda i: ask(gateway.url, CHAT, chat(str(i))), range(8)))
        assert all(answer.status == 200 for answer in answers)
        assert worker.submits and other.submits
        other.die()
        gateway.wait_for(lambda: gateway.gateway.service.workers[1].link.ready is None)
        assert ask(gateway.url, CHAT, chat()).status == 200


@pytest.mark.slow
def test_the_wall_clock_ends_what_a_worker_never_ends(worker: FakeWorker) -> None:
    with GatewayThread(workers=[worker.endpoint], request_deadline_s=0.2) as gateway:
        gateway.wait_ready()
        worker.script = lambda _: [Wait(60)]
        answer = ask(gateway.url, CHAT, chat())
        assert answer.error["code"] == "deadline_exceeded"
        assert 0 < worker.submits[0].deadline_s <= 0.2
        worker.wait_cancelled(1)


def test_a_deadline_of_the_workers_own_has_its_own_finish_reason(
    gateway: GatewayThread, worker: FakeWorker
) -> None:
    worker.reply("part", FinishReason.DEADLINE)
    assert ask(gateway.url, CHAT, chat()).json["choices"][0]["finish_reason"] == "deadline"


@pytest.mark.slow
def test_pings_keep_the_lease(gateway: GatewayThread, worker: FakeWorker) -> None:
    gateway.wait_for(lambda: worker.num_pings >= 2, timeout_s=5)
