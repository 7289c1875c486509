"""Pictures encoded, and long prompts computed, by workers of their own, with real processes: the same answers, and losses that
nobody notices."""

from __future__ import annotations

import random
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from degas.keys import make_keys
from loadtest.bench.cluster import Cluster, cluster
from loadtest.peers.waiting import wait_until
from loadtest.pictures import Picture, draw_pictures

pytestmark = pytest.mark.slow

POCKET = ("--device", "cpu", "--threads", "1")


def ask(server: Cluster, picture: Picture, question: str, temperature: float = 0.0) -> str:
    content = [
        {"type": "image_url", "image_url": {"url": picture.data_url}},
        {"type": "text", "text": question},
    ]
    body: dict[str, Any] = {"model": "pocket", "messages": [{"role": "user", "content": content}]}
    found: Any = server.post(
        "/v1/chat/completions", body | {"max_tokens": 40, "temperature": temperature, "seed": 7}
    )
    return str(found["choices"][0]["message"]["content"])


def detect(server: Cluster, picture: Picture, wanted: str) -> object:
    return server.post("/v1/detect", {"image_url": picture.data_url, "object": wanted})["objects"]


def answers(server: Cluster, pictures: list[Picture]) -> list[object]:
    """Text, greedy and drawn, and boxes."""
    found: list[object] = []
    for picture in pictures:
        found += [ask(server, picture, question) for question in picture.questions[:2]]
        found += [ask(server, picture, "Describe it", 1.2), detect(server, picture, "circle")]
    return found


def read_on(server: Cluster, prompt: str, temperature: float = 0.0) -> object:
    body = {"model": "pocket", "prompt": prompt, "max_tokens": 24, "temperature": temperature, "seed": 3}
    found: Any = server.post("/v1/completions", body | {"ignore_eos": True})
    return found["choices"][0]["text"], found["usage"]


def long_prompts(num: int) -> list[str]:
    """Of some 100 tokens each, none beginning like another."""
    words = ["red", "blue", "circle", "square", "left", "right", "above", "below", "small", "large"]
    rng = random.Random(4)
    return [" ".join(rng.choice(words) for _ in range(70 + number)) for number in range(num)]


def prefills(server: Cluster, kind: str) -> float:
    metrics = server.metrics()
    return sum(v for name, v in metrics.items() if "_worker_prefills_total" in name and f'"{kind}"' in name)


def outcome(server: Cluster, name: str) -> float:
    return server.metrics().get(f'degas_encoder_pictures_total{{outcome="{name}"}}', 0.0)


def test_the_same_answers_over_curve_and_without_the_helpers(tmp_path: Path) -> None:
    pictures, prompts = draw_pictures(5, seed=3), long_prompts(4)
    with cluster({"worker": POCKET}) as alone:
        wanted = answers(alone, pictures)
        said = [read_on(alone, prompt, number % 2) for number, prompt in enumerate(prompts)]
        assert "degas_encoder_pictures_total{" not in str(alone.metrics())
    make_keys(tmp_path / "keys")
    roles = {
        "encoder": (*POCKET, "--role", "encode"),
        "prefill": (*POCKET, "--role", "prefill"),
        "worker": (*POCKET, "--role", "decode"),
    }
    settings = {"DEGAS_GATEWAY_PREFILL_TOKENS": "64"}
    with cluster(roles, curve_key_dir=tmp_path / "keys", gateway_settings=settings) as apart:
        assert answers(apart, pictures[:3]) == wanted[:12]
        assert outcome(apart, "asked") == outcome(apart, "encoded") == 3
        found = apart.metrics()
        num_bytes = found["degas_encoded_picture_bytes_total"]
        assert (
            num_bytes and num_bytes % (3 * 49) == 0
        )  # 49 positions a picture, in what this processor's type is
        assert found["degas_encoder_wait_seconds_count"] == 3
        # Pictures that an encoder holds when it is killed are encoded by the worker, and nobody is told.
        encoder = apart.processes["encoder"].process
        encoder.send_signal(signal.SIGSTOP)
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(answers, apart, [picture]) for picture in pictures[3:]]
            wait_until(lambda: outcome(apart, "asked") == 5, "both pictures are at the encoder")
            encoder.kill()
            assert [answer for one in asked for answer in one.result()] == wanted[12:]
        assert outcome(apart, "lost") == outcome(apart, "given_up") == 2
        assert apart.num_up() == 2
        assert answers(apart, draw_pictures(1, seed=9)) and outcome(apart, "asked") == 5
        # The same of prompts: computed elsewhere, then by the worker when the other is killed with them.
        assert [read_on(apart, prompt, number % 2) for number, prompt in enumerate(prompts[:2])] == said[:2]
        wait_until(lambda: prefills(apart, "done") == 2, "a heartbeat tells of both")
        prefill = apart.processes["prefill"].process
        prefill.send_signal(signal.SIGSTOP)
        with ThreadPoolExecutor(2) as pool:
            asked_too = [
                pool.submit(read_on, apart, prompt, number) for number, prompt in enumerate(prompts[2:])
            ]
            wait_until(lambda: prefills(apart, "asked") == 4, "both prompts are at the prefill worker")
            prefill.kill()
            assert [answer.result() for answer in asked_too] == said[2:]
        wait_until(lambda: prefills(apart, "lost") == 2, "a heartbeat tells of both")
        assert apart.num_up() == 1
