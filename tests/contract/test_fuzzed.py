"""schemathesis asks everything that `/openapi.json` describes, rightly and wrongly: no 5xx, and every answer is as described.

`make fuzz-api` does the same for longer: `DEGAS_FUZZ_EXAMPLES` is the number of requests for each operation and kind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from gateway.api.described import openapi
from tests.contract.chat_model import chat_model
from tests.fake_worker import FakeWorker
from tests.gateway_thread import GatewayThread

EXAMPLES = int(os.environ.get("DEGAS_FUZZ_EXAMPLES", "4"))
LEFT_OUT = ("/debug/trace",)  # answers when so many steps have run
DOCUMENT = json.loads(openapi.document())
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
WITH_BODY = [
    (method, path)
    for path, item in DOCUMENT["paths"].items()
    for method in item
    if "requestBody" in item[method]
]
WITHOUT = [
    (method, path)
    for path, item in DOCUMENT["paths"].items()
    for method in item
    if "requestBody" not in item[method] and path not in LEFT_OUT
]

load_all_checks()
# A body that fits the schema may still ask for what does not go together, or for more than the model has.
SKIPPED = CHECKS.get_by_names(["positive_data_acceptance"])


@pytest.fixture(scope="module")
def moondream() -> Iterator[GatewayThread]:
    with (
        FakeWorker(step_s=0.0002) as worker,
        GatewayThread(workers=[worker.endpoint], log_level="error") as gateway,
    ):
        worker.reply("ok")
        gateway.wait_ready()
        yield gateway


@pytest.fixture(scope="module")
def chatty() -> Iterator[GatewayThread]:
    with chat_model(log_level="error") as (gateway, worker):
        worker.reply('<think>so</think>ok<tool_call>{"name": "f", "arguments": {}}</tool_call>')
        yield gateway


@cache
def cases(method: str, path: str, mode: GenerationMode) -> SearchStrategy[Any]:
    """Requests of one operation. To make them takes longer than to ask a few."""
    found: SearchStrategy[Any] = SCHEMA[path][method.upper()].as_strategy(generation_mode=mode)
    return found


def ask_all(gateway: GatewayThread, method: str, path: str, mode: GenerationMode, num: int) -> None:
    """Ask so many times, and look at every answer."""

    @settings(
        max_examples=num,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(method, path, mode))
    def ask(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "fake-vl"  # any other name is a 404, and there are many
        response = case.call(base_url=gateway.url, timeout=20)
        if response.status_code == 503:  # on a busy machine the worker's thread may miss its beats
            gateway.wait_ready()
        else:
            case.validate_response(response, excluded_checks=SKIPPED)

    ask()
    gateway.wait_for(
        lambda: gateway.gateway.service.num_in_flight == 0
    )  # a 503 leaves before its cancels arrive


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value
)
@pytest.mark.parametrize(("method", "path"), WITH_BODY, ids=[path for _, path in WITH_BODY])
def test_bodies(
    moondream: GatewayThread, chatty: GatewayThread, mode: GenerationMode, method: str, path: str
) -> None:
    for gateway in (moondream, chatty):
        ask_all(gateway, method, path, mode, EXAMPLES)


@pytest.mark.parametrize(("method", "path"), WITHOUT, ids=[" ".join(one) for one in WITHOUT])
def test_without_a_body(moondream: GatewayThread, method: str, path: str) -> None:
    ask_all(moondream, method, path, GenerationMode.POSITIVE, 3)
