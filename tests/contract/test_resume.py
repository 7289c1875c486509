"""Streams that are gone on with after their connection was lost: cut at every event, nothing missing, nothing twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import openai
import pytest
from websockets.sync.client import ClientConnection, connect
from websockets.sync.connection import Connection

from tests.fake_worker import CARD, FakeWorker
from tests.gateway_thread import GatewayThread
from tests.http_client import Opened, ask
from tests.keys import ANY_KEY, KEY, OTHER_KEY

TEXT = "Hé 🎈 yes"
ASKED = {"X-Degas-Resumable": "true"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "n": 2},
    "/v1/completions": {"prompt": "hi", "stream_options": {"include_usage": True}},
    "/v1/messages": {"model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"input": "hi"},
    "/v1/query": {"question": "hi"},
}

Event = tuple[str, bytes]  # its id, and the rest of it


def events_of(opened: Opened) -> Iterator[Event]:
    """Events with ids; comments have none."""
    lines: list[bytes] = []
    for line in opened.response:
        if line.strip():
            lines.append(line)
        elif lines and lines[0].startswith(b"id: "):
            yield lines[0][4:].strip().decode(), b"".join(lines[1:])
            lines = []
        else:
            lines = []


def ask_for(gateway: GatewayThread, path: str, headers: dict[str, str] | None = None, **more: Any) -> Opened:
    body = {**BODIES[path], "stream": True, **more}
    if path == "/v1/messages":
        body["model"] = CARD.model_id
    return Opened(gateway.url, path, body, headers={**ASKED, **(headers or {})})


def again(gateway: GatewayThread, last_id: str, headers: dict[str, str] | None = None) -> list[Event]:
    path = f"/v1/streams/{last_id.partition(':')[0]}"
    with Opened(gateway.url, path, headers={"Last-Event-ID": last_id, **(headers or {})}) as opened:
        assert opened.response.status in (200, 204), opened.response.read()
        return list(events_of(opened))


def text_of(path: str, events: list[Event]) -> str:
    """The answer's text; of chat the first choice's."""
    texts = []
    for _, event in events:
        data = event[event.index(b"data: ") + 6 :].strip()
        if not data.startswith(b"{"):
            continue
        said = json.loads(data)
        if path == "/v1/chat/completions":
            texts += [c["delta"].get("content", "") for c in said["choices"] if c["index"] == 0]
        elif path == "/v1/completions":
            texts += [choice["text"] for choice in said["choices"]]
        elif path == "/v1/messages":
            texts.append(said.get("delta", {}).get("text", ""))
        elif path == "/v1/responses":
            texts.append(said["delta"] if said["type"] == "response.output_text.delta" else "")
        elif "chunk" in said:
            texts.append(said["chunk"])
    return "".join(texts)


@pytest.mark.parametrize("path", BODIES)
def test_cut_at_every_event(gateway: GatewayThread, worker: FakeWorker, path: str) -> None:
    worker.reply(TEXT)
    with ask_for(gateway, path) as opened:
        whole = list(events_of(opened))
        assert opened.response.getheader("x-degas-stream") == whole[0][0].partition(":")[0]
    assert text_of(path, whole) == TEXT
    for cut in range(1, len(whole) + 1):
        with ask_for(gateway, path) as opened:
            events = events_of(opened)
            seen = [next(events) for _ in range(cut)]
        rest = again(gateway, seen[-1][0])
        stream_id = seen[0][0].partition(":")[0]
        assert [one for one, _ in seen + rest] == [f"{stream_id}:{n}" for n in range(len(whole))]
        assert seen + rest == again(gateway, f"{stream_id}:-1")
        assert text_of(path, seen + rest) == TEXT


def test_it_goes_on_while_nobody_listens_and_comes_live_again() -> None:
    with FakeWorker(step_s=0.005) as worker, GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_ready()
        worker.reply(TEXT)
        for cut in range(1, 12):
            with ask_for(gateway, "/v1/completions") as opened:
                events = events_of(opened)
                seen = [next(events) for _ in range(cut)]
            seen += again(gateway, seen[-1][0])
            assert text_of("/v1/completions", seen) == TEXT
        assert not worker.cancelled and len(worker.submits) == 11


def test_the_same_post_with_the_last_id_asks_for_nothing_new(
    gateway: GatewayThread, worker: FakeWorker
) -> None:
    for path in BODIES:
        before = len(worker.submits)
        with ask_for(gateway, path) as opened:
            seen = [next(events_of(opened))]
        with ask_for(gateway, path, {"Last-Event-ID": seen[0][0]}) as opened:
            seen += events_of(opened)
        assert text_of(path, seen) == "Hello, wörld 🎈!"
        assert len(worker.submits) == before + BODIES[path].get("n", 1)


def test_a_large_body_is_taken_off_the_line(gateway: GatewayThread, worker: FakeWorker) -> None:
    """A client that sends all of its body before it reads would wait for the stream's end."""
    worker.script = lambda _: []
    with ask_for(gateway, "/v1/responses") as opened:
        last_id, _ = next(events_of(opened))
    headers = {"Last-Event-ID": last_id}
    body = {"input": "x" * (16 << 20)}
    with Opened(gateway.url, "/v1/responses", body, headers=headers, timeout_s=3) as opened:
        assert opened.response.status == 200
        assert b"in_progress" in next(events_of(opened))[1]


def test_a_stream_that_did_not_ask_has_no_ids_and_ends_with_its_client(
    gateway: GatewayThread, worker: FakeWorker
) -> None:
    body = {**BODIES["/v1/completions"], "stream": True}
    with Opened(gateway.url, "/v1/completions", body) as opened:
        assert opened.response.getheader("x-degas-stream") is None
        assert b"id: " not in opened.response.read()
    worker.hold()
    with Opened(gateway.url, "/v1/completions", body):
        pass
    worker.wait_cancelled(1)


def refused(gateway: GatewayThread, stream: str, headers: dict[str, str]) -> tuple[int, str, str]:
    answer = ask(gateway.url, f"/v1/streams/{stream}", headers=headers)
    return answer.status, answer.error["param"] or "", answer.error["message"]


def test_nobody_else_can_tell_that_it_exists(worker: FakeWorker) -> None:
    with GatewayThread(workers=[worker.endpoint], api_keys=f"{KEY},{OTHER_KEY}") as gateway:
        gateway.wait_ready()
        own, other = ({"Authorization": f"Bearer {key}"} for key in (KEY, OTHER_KEY))
        for path in ("/v1/completions", "/v1/responses"):
            with ask_for(gateway, path, own) as opened:
                last_id, _ = list(events_of(opened))[-1]
            stream = last_id.partition(":")[0]
            there = refused(gateway, stream, {**other, "Last-Event-ID": f"{stream}:0"})
            assert there == refused(gateway, "st_none", {**own, "Last-Event-ID": "0"}) and there[0] == 404
            for method in ("GET", "DELETE"):
                answers = [
                    ask(gateway.url, f"/v1/streams/{name}", method=method, headers=headers)
                    for name, headers in ((stream, other), ("st_none", own))
                ]
                assert [answer.status for answer in answers] == [404, 404]
                assert answers[0].body == answers[1].body
            assert ask(gateway.url, f"/v1/responses/{stream}", headers=other).status == 404
            assert len(again(gateway, f"{stream}:0", own)) > 2


def test_what_is_not_held_any_more_is_said(worker: FakeWorker) -> None:
    worker.reply("x" * 60)
    with GatewayThread(workers=[worker.endpoint], resume_bytes=4096) as gateway:
        gateway.wait_ready()
        with ask_for(gateway, "/v1/completions", max_tokens=60) as opened:
            whole = list(events_of(opened))
        assert text_of("/v1/completions", whole) == "x" * 60
        stream = whole[0][0].partition(":")[0]
        status, param, message = refused(gateway, stream, {"Last-Event-ID": whole[3][0]})
        assert status == 400 and param == "Last-Event-ID" and "not held any more" in message
        status, _, message = refused(gateway, stream, {"Last-Event-ID": f"{stream}:{len(whole)}"})
        assert status == 400 and f"the last event so far is {len(whole) - 1}" in message
        assert again(gateway, whole[-4][0]) == whole[-3:]
        assert again(gateway, whole[-1][0]) == []
        for wrong in ("x", "st_other:3", f"{stream}:x", f"{stream}:"):
            assert refused(gateway, stream, {"Last-Event-ID": wrong})[0] == 400


def test_the_window_ends(worker: FakeWorker) -> None:
    with GatewayThread(workers=[worker.endpoint], resume_window_s=0.3) as gateway:
        gateway.wait_ready()
        journals = gateway.gateway.resumption.journals
        with ask_for(gateway, "/v1/completions") as opened:
            events = list(events_of(opened))
        gateway.wait_for(lambda: len(journals) == 0)
        assert refused(gateway, events[0][0].partition(":")[0], {"Last-Event-ID": events[0][0]})[0] == 404
        worker.script = lambda _: []  # says nothing and never ends
        with ask_for(gateway, "/v1/responses") as opened:
            next(events_of(opened))  # the opening, after a moment
        gone_s = time.monotonic()
        worker.wait_cancelled(1)
        assert time.monotonic() - gone_s > 0.2
        gateway.wait_for(lambda: len(journals) == 0 and journals.size_bytes == 0)
    with GatewayThread(workers=[worker.endpoint], resume_window_s=0) as gateway:
        gateway.wait_ready()
        with ask_for(gateway, "/v1/completions") as opened:
            assert opened.response.status == 400
            assert json.loads(opened.response.read())["error"]["param"] == "X-Degas-Resumable"


def test_the_later_of_two_followers_wins(gateway: GatewayThread, worker: FakeWorker) -> None:
    worker.script = lambda _: []
    with ask_for(gateway, "/v1/responses") as first:
        last_id, _ = next(events_of(first))
        stream = last_id.partition(":")[0]
        with Opened(gateway.url, f"/v1/streams/{stream}", headers={"Last-Event-ID": last_id}) as second:
            rest = events_of(second)
            next(rest)
            with pytest.raises(Exception, match=r"read|reset|Incomplete"):
                first.response.read()
            assert ask(gateway.url, f"/v1/streams/{stream}", method="DELETE").status == 204
            assert b"response.incomplete" in list(rest)[-1][1]
    worker.wait_cancelled(1)


def test_errors_before_and_in_the_stream(gateway: GatewayThread, worker: FakeWorker) -> None:
    journals = gateway.gateway.resumption.journals
    worker.reject("invalid_request", message="no")  # type: ignore[arg-type]
    for path in BODIES:
        with ask_for(gateway, path) as opened:
            assert opened.response.status == 400, opened.response.read()
    assert gateway.call(lambda: (len(journals), journals.size_bytes)) == (0, 0)
    with Opened(
        gateway.url, "/api/generate", {"model": CARD.model_id, "prompt": "hi"}, headers=ASKED
    ) as opened:
        assert opened.response.status == 400
    worker.die()
    answer = ask(gateway.url, "/v1/completions", {"prompt": "x"}, headers={"X-Degas-Resumable": "maybe"})
    assert answer.status == 400 and answer.error["param"] == "X-Degas-Resumable"


def test_a_dead_worker_is_told_to_who_comes_back(gateway: GatewayThread, worker: FakeWorker) -> None:
    worker.hold()
    with ask_for(gateway, "/v1/completions") as opened:
        worker.wait_submits(1)
        worker.release()
        seen = [next(events_of(opened))]
    worker.reply("x" * 2000)
    with ask_for(gateway, "/v1/completions", max_tokens=2000) as opened:
        seen = [next(events_of(opened))]
    worker.die()
    rest = again(gateway, seen[-1][0])
    assert json.loads(rest[-1][1][6:])["error"]["code"] == "worker_lost"


def test_more_than_the_write_buffer_is_caught_up(worker: FakeWorker) -> None:
    with GatewayThread(workers=[worker.endpoint], write_buffer_bytes=4096) as gateway:
        gateway.wait_ready()
        worker.reply("y" * 400)
        with ask_for(gateway, "/v1/responses", max_output_tokens=400) as opened:
            whole = list(events_of(opened))
        assert sum(len(event) for _, event in whole) > 16 * 4096
        stream = whole[0][0].partition(":")[0]
        assert again(gateway, f"{stream}:-1") == whole
        with connect(gateway.url.replace("http", "ws") + "/v1/responses") as ws:
            ws.send(json.dumps({"type": "degas.resume", "response_id": stream}))
            assert [event["sequence_number"] for event in receive(ws)] == list(range(len(whole)))
        assert gateway.gateway.service.metrics.num_slow_clients == 0


# ------------------------------------------------------------ the official clients


def test_openai_goes_on_with_a_response(gateway: GatewayThread, worker: FakeWorker) -> None:
    worker.reply(TEXT)
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=ANY_KEY, max_retries=0) as client:
        with client.responses.create(input="hi", stream=True, extra_headers=ASKED) as stream:
            events = [next(stream) for _ in range(6)]
        response_id = events[0].response.id  # type: ignore[union-attr]
        last = events[-1].sequence_number
        rest = list(client.responses.retrieve(response_id, stream=True, starting_after=last))
        texts = [e.delta for e in [*events, *rest] if e.type == "response.output_text.delta"]
        assert "".join(texts) == TEXT
        assert [e.sequence_number for e in [*events, *rest]] == list(range(len(events) + len(rest)))
        assert client.responses.retrieve(response_id).output_text == TEXT
        assert client.responses.cancel(response_id).status == "completed"
        chat = client.chat.completions.create(
            model=CARD.model_id,
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            extra_headers=ASKED,
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chat) == TEXT


def test_anthropic_does_not_mind_ids(gateway: GatewayThread, worker: FakeWorker) -> None:
    worker.reply(TEXT)
    client = anthropic.Anthropic(base_url=gateway.url, api_key=ANY_KEY, max_retries=0)
    asked = client.messages.stream(
        model=CARD.model_id,
        max_tokens=50,
        messages=[{"role": "user", "content": "hi"}],
        extra_headers=ASKED,
    )
    with client, asked as stream:
        assert stream.get_final_text() == TEXT


# ------------------------------------------------------------ the WebSocket


@pytest.fixture
def open_socket(gateway: GatewayThread) -> Callable[[], ClientConnection]:
    return lambda: connect(gateway.url.replace("http", "ws") + "/v1/responses")


def receive(ws: Connection, count: int | None = None) -> list[dict[str, Any]]:
    """So many events, or all up to the terminal one."""
    events: list[dict[str, Any]] = []
    while len(events) != count:
        events.append(json.loads(ws.recv(5)))
        if events[-1]["type"] in ("response.completed", "response.incomplete", "response.failed", "error"):
            break
    return events


CREATE = {"type": "response.create", "input": "hi", "stream_id": "a", "degas": {"resumable": True}}


def test_a_websocket_comes_back_at_every_event(
    gateway: GatewayThread, worker: FakeWorker, open_socket: Callable[[], ClientConnection]
) -> None:
    worker.reply(TEXT)
    with open_socket() as ws:
        ws.send(json.dumps(CREATE))
        total = len(receive(ws))
    for cut in range(1, total):
        with open_socket() as ws:
            ws.send(json.dumps(CREATE))
            seen = receive(ws, cut)
        response_id = seen[0]["response"]["id"]
        with open_socket() as ws:
            ws.send(
                json.dumps({"type": "degas.resume", "response_id": response_id, "starting_after": cut - 1})
            )
            seen += receive(ws)
            assert [event["sequence_number"] for event in seen] == list(range(total))
            assert "".join(e["delta"] for e in seen if e["type"] == "response.output_text.delta") == TEXT
            ws.send(
                json.dumps({"type": "response.create", "input": "x", "previous_response_id": response_id})
            )
            assert receive(ws)[-1]["type"] == "response.completed"
    assert not worker.cancelled


def test_a_websocket_can_cancel_what_it_came_back_for(
    gateway: GatewayThread, worker: FakeWorker, open_socket: Callable[[], ClientConnection]
) -> None:
    worker.script = lambda _: []
    with open_socket() as ws:
        ws.send(json.dumps(CREATE))
        (created,) = receive(ws, 1)
    response_id = created["response"]["id"]
    resume = json.dumps({"type": "degas.resume", "response_id": response_id})
    with open_socket() as old, open_socket() as ws:
        for one in (old, ws):
            one.send(resume)
            assert receive(one, 1)[0]["type"] == "response.created"
        receive(ws, 3)
        ws.send(resume)
        assert "already" in receive(ws, 1)[0]["error"]["message"]
        ws.send(json.dumps({"type": "response.cancel", "response_id": response_id}))
        assert receive(ws)[-1]["type"] == "response.incomplete"
        old.send(json.dumps({"type": "degas.resume", "response_id": "resp_none"}))
        late = [event for event in receive(old) if event["type"] != "error"]
        assert all(event["sequence_number"] < 4 for event in late)  # what came before it was replaced
    worker.wait_cancelled(1)
    events = again(gateway, f"{response_id}:0")  # begun over the WebSocket, gone on with over HTTP
    assert b"response.incomplete" in events[-1][1]
