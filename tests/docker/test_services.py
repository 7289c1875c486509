"""compose.yaml with a real engine: what it serves, how it is confined, and what clients see when parts of it die."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
import pytest
from PIL import Image, ImageDraw

from tests.docker.services import Services, docker, missing, services, signal_worker, size_over_base
from tests.http_client import Opened, ask

pytestmark = [pytest.mark.skipif(bool(missing()), reason=missing()), pytest.mark.timeout(1900)]
BASE = f"python:{os.environ.get('DEGAS_PYTHON', '3.12')}-slim-bookworm"
CHAT = "/v1/chat/completions"
GATEWAY_BYTES, WORKER_BYTES = 250e6, 1.2e9  # over the base image


def circles() -> str:
    """A picture of two circles, as a data URL."""
    picture = Image.new("RGB", (224, 224), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((20, 20, 100, 100), fill="red")
    draw.ellipse((120, 120, 200, 200), fill="blue")
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def last_of(opened: Opened) -> Any:
    """The last event before `[DONE]`."""
    return [event for event in opened.events() if isinstance(event, dict)][-1]


def counting(num_tokens: int, **fields: object) -> dict[str, object]:
    return {"prompt": "count", "max_tokens": num_tokens, "ignore_eos": True, "stream": True, **fields}


@pytest.fixture(scope="module")
def images() -> None:
    Services("build").build()


@pytest.fixture(scope="module")
def pocket(images: None) -> Iterator[Services]:
    with services("pocket") as project:
        yield project


@pytest.fixture(scope="module")
def sim(images: None) -> Iterator[Services]:
    """Long answers at a token in some milliseconds."""
    with services("sim", files=("tests/docker/busy.yaml",), DEGAS_MODEL="sim", DEGAS_DEVICE="sim") as project:
        yield project


def test_images_are_small(images: None) -> None:
    assert size_over_base("degas-gateway", BASE) <= GATEWAY_BYTES
    assert size_over_base("degas-worker", BASE) <= WORKER_BYTES


def test_a_question_about_a_picture_over_http_and_websocket(pocket: Services) -> None:
    asked = {"question": "How many circles are there?", "image_url": circles()}
    answer = ask(pocket.url, "/v1/query", asked).json["answer"]
    assert answer.strip()

    async def over_websocket() -> str:
        picture = {"type": "input_image", "image_url": circles()}
        text = {"type": "input_text", "text": asked["question"]}
        message = {"type": "message", "role": "user", "content": [picture, text]}
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{pocket.url}/v1/responses") as socket,
        ):
            await socket.send_json({"type": "response.create", "model": "pocket", "input": [message]})
            said = ""
            async for frame in socket:
                event = frame.json()
                said += event.get("delta", "") if event["type"] == "response.output_text.delta" else ""
                if event["type"] in ("response.completed", "response.failed", "error"):
                    break
            return said

    assert asyncio.run(over_websocket()).strip() == answer.strip()


def test_the_same_over_grpc(pocket: Services) -> None:
    import grpc
    from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2, vllm_engine_pb2_grpc

    media = vllm_engine_pb2.MediaRefs(
        items=[vllm_engine_pb2.MediaRef(modality=common_pb2.IMAGE, url=circles())]
    )
    asked = vllm_engine_pb2.GenerateRequest(text="How many circles are there?", media_refs=media)
    with grpc.insecure_channel(f"127.0.0.1:{pocket.grpc_port}") as channel:
        (only,) = vllm_engine_pb2_grpc.VllmEngineStub(channel).Generate(asked, timeout=30)
    assert only.complete.output_ids


@pytest.mark.parametrize("service", ["gateway", "worker"])
def test_containers_are_confined(pocket: Services, service: str) -> None:
    status = pocket.inside(service, "cat", "/proc/self/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split()[0] == "10001"
    assert int(fields["CapEff"], 16) == 0 and int(fields["CapBnd"], 16) == 0
    assert fields["NoNewPrivs"].strip() == "1"
    with pytest.raises(AssertionError, match="Read-only file system"):
        pocket.inside(service, "touch", "/opt/degas/x")


def test_keys_are_made_once_and_outlive_the_containers(pocket: Services) -> None:
    before = pocket.inside("gateway", "cat", "/keys/worker.key")
    pocket.compose("down", "-t", "5")
    pocket.up()
    assert pocket.inside("gateway", "cat", "/keys/worker.key") == before
    keys = docker(
        "inspect", "-f", "{{.State.ExitCode}} {{.RestartCount}}", pocket.compose("ps", "-aq", "keys")
    )
    assert keys == "0 0"


@pytest.mark.parametrize("service", ["gateway", "worker"])
def test_it_starts_and_stops_without_complaint(pocket: Services, service: str) -> None:
    """What an operator finds in the log of a calm life: JSON lines, and one warning, that nobody needs a key."""
    started = pocket.up_since(service)
    pocket.compose("stop", service)
    (container,) = pocket.compose("ps", "-aq", service).split()
    assert docker("inspect", "-f", "{{.State.ExitCode}}", container) == "0"
    text = pocket.logs("--no-log-prefix", "--since", started[0], service)
    lines = [json.loads(line) for line in text.splitlines()]
    wrong = {line["event"] for line in lines if line["level"] != "info"}
    assert wrong == ({"no_api_keys"} if service == "gateway" else set()), lines
    assert lines[-1]["event"] == "gateway_stopped" or lines[-1]["message"] == "stopped"
    pocket.up()


def test_a_killed_worker_ends_its_streams_at_once_and_comes_back(sim: Services) -> None:
    with Opened(sim.url, "/v1/completions", counting(16_000)) as opened:
        events = opened.events()
        next(events)
        killed_s = time.monotonic()
        sim.compose("kill", "-s", "SIGKILL", "worker")
        last = last_of(opened)
        assert last["error"]["code"] == "worker_lost" and time.monotonic() - killed_s < 5
    assert ask(sim.url, "/readyz").status == 503
    sim.up()
    assert ask(sim.url, "/v1/completions", counting(3, stream=False)).status == 200


def test_a_worker_process_that_dies_or_hangs_is_replaced_inside_its_container(sim: Services) -> None:
    for signal in ("KILL", "STOP"):
        signal_worker(sim.containers("worker")[0], signal)
        deadline_s = time.monotonic() + 60
        while ask(sim.url, "/v1/completions", counting(3, stream=False)).status != 200:
            assert time.monotonic() < deadline_s, sim.logs()[-3000:]
            time.sleep(0.1)
    assert docker("inspect", "-f", "{{.RestartCount}}", sim.containers("worker")[0]) == "0"


def test_a_gateway_that_is_asked_to_stop_lets_200_streams_finish(sim: Services) -> None:
    with ThreadPoolExecutor(200) as pool:
        begun = list(
            pool.map(lambda _: Opened(sim.url, "/v1/completions", counting(150)).__enter__(), range(200))
        )
        sim.compose("kill", "-s", "SIGTERM", "gateway")
        ends = list(pool.map(last_of, begun))
        list(pool.map(lambda opened: opened.close(), begun))
    reasons = [end["choices"][0]["finish_reason"] if "choices" in end else end for end in ends]
    assert reasons == ["length"] * 200, [reason for reason in reasons if reason != "length"][:5]
    sim.wait_gone("gateway")
    sim.up()
