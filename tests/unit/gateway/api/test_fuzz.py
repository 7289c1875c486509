"""No body, however odd, is answered with a 5xx, and none leaves anything behind.

Each goes through sockets; `python -m tests.fuzz` tries a thousand times as many without.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.api import (
    anthropic,
    chat,
    completions,
    moondream,
    ollama,
    ollama_models,
    response_bodies,
    tokenize,
)
from tests.fake_worker import FakeWorker
from tests.gateway_thread import GatewayThread
from tests.http_client import ask

ROUTES = {
    "/v1/chat/completions": chat.ChatBody,
    "/v1/completions": completions.CompletionBody,
    "/v1/responses": response_bodies.CreateBody,
    "/v1/messages": anthropic.MessagesBody,
    "/v1/messages/count_tokens": anthropic.CountBody,
    "/api/chat": ollama.ChatBody,
    "/api/generate": ollama.GenerateBody,
    "/api/show": ollama_models.ShowBody,
    "/tokenize": tokenize.TokenizeBody,
    "/detokenize": tokenize.DetokenizeBody,
    "/v1/query": moondream.QueryBody,
    "/v1/caption": moondream.CaptionBody,
    "/v1/detect": moondream.ObjectBody,
    "/v1/point": moondream.ObjectBody,
}
SOUND: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    "prompt": "hi",
    "input": "hi",
    "question": "what?",
    "object": "cat",
}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(["user", "data:image/png;base64,AAAA", "short", "json_object", "json_schema", "auto"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "url", "schema", "include_usage", "20", "a"]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def served() -> Iterator[GatewayThread]:
    with FakeWorker(step_s=0.0005) as worker, GatewayThread(workers=[worker.endpoint]) as gateway:
        worker.reply("ok")
        gateway.wait_ready()
        yield gateway


@pytest.mark.slow
@pytest.mark.parametrize("path", ROUTES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_odd_bodies(served: GatewayThread, path: str, data: st.DataObject) -> None:
    fields = ROUTES[path].__struct_fields__
    body = {name: value for name, value in SOUND.items() if name in fields and data.draw(st.integers(0, 9))}
    body |= data.draw(st.dictionaries(st.sampled_from(fields), VALUES, max_size=3))
    if body.get("model") is not None and data.draw(st.booleans()):
        body["model"] = "fake-vl"
    answer = ask(served.url, path, json.dumps(body).encode())
    assert answer.status in (200, 400, 404, 413), (body, answer.body)
    if answer.status != 200:
        error = json.loads(answer.body)["error"]
        if path.startswith("/api/"):
            assert isinstance(error, str) and error
        else:
            own = (
                {"message", "type"}
                if path.startswith("/v1/messages")
                else {"message", "type", "param", "code"}
            )
            assert set(error) == own and error["message"]
    service = served.gateway.service
    assert served.call(lambda: (service.num_in_flight, service.workers[0].occupancy.num_active)) == (0, 0)
