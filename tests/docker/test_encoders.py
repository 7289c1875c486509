"""compose.yaml with its profile of encoders: pictures go through them, and are answered whatever becomes of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image, ImageDraw

from tests.docker.services import Services, docker, missing, services, signal_worker, wait_for
from tests.http_client import ask
from tests.integration.scraped import scrape

pytestmark = [pytest.mark.skipif(bool(missing()), reason=missing()), pytest.mark.timeout(1900)]
NUM_PICTURES = 6


@pytest.fixture(scope="module")
def project() -> Iterator[Services]:
    Services("build").build()
    files = ("tests/docker/encoders.yaml",)
    with services("encoders", "--scale", "encoder=2", files=files, COMPOSE_PROFILES="encoders") as project:
        wait_for(lambda: roles(project) == ["decode", "encode", "encode"])
        yield project


def roles(project: Services) -> list[str]:
    """Of the workers that the gateway has, sorted."""
    return sorted(labels["role"] for labels, _ in scrape(project.url).samples["degas_worker_info"])


def outcomes(project: Services) -> dict[str, float]:
    """What became of pictures at encoders."""
    samples = scrape(project.url).samples["degas_encoder_pictures_total"]
    return {labels["outcome"]: value for labels, value in samples}


def picture(number: int) -> str:
    """A circle somewhere, as a data URL; each number's is another."""
    drawing = Image.new("RGB", (224, 224), "white")
    ImageDraw.Draw(drawing).ellipse((10 + number, 20, 90 + number, 100), fill="red")
    file = io.BytesIO()
    drawing.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def color_of(project: Services, number: int) -> str:
    """The answer to a question about a picture."""
    asked = {"question": "What color is the circle?", "image_url": picture(number)}
    answer = ask(project.url, "/v1/query", asked, timeout_s=60)
    assert answer.status == 200, answer.body
    return str(answer.json["answer"]).strip()


def test_pictures_are_encoded_by_encoders(project: Services) -> None:
    assert [color_of(project, number) for number in range(4)] == ["red"] * 4
    assert outcomes(project) == {"asked": 4.0, "encoded": 4.0}


def test_an_encoder_that_is_killed_with_pictures_in_it_costs_no_answer(project: Services) -> None:
    """Both are held still until both have pictures; one is killed, and the other one is asked for what it had."""
    before = outcomes(project)
    doomed, other = project.containers("encoder")
    for container in (doomed, other):
        signal_worker(container, "STOP")
    with ThreadPoolExecutor(NUM_PICTURES) as pool:
        answers = [pool.submit(color_of, project, 20 + number) for number in range(NUM_PICTURES)]
        wait_for(lambda: outcomes(project)["asked"] == before["asked"] + NUM_PICTURES)
        docker("kill", "-s", "KILL", doomed)
        signal_worker(other, "CONT")
        assert [answer.result() for answer in answers] == ["red"] * NUM_PICTURES
    after = outcomes(project)
    assert after["lost"] > 0 and after["asked"] > before["asked"] + NUM_PICTURES, after
    assert after["encoded"] > before["encoded"], after


def test_without_encoders_the_worker_answers_and_new_ones_are_found(project: Services) -> None:
    project.compose("kill", "-s", "SIGKILL", "encoder")
    wait_for(lambda: roles(project) == ["decode"])
    before = outcomes(project)
    assert color_of(project, 40) == "red" and outcomes(project) == before
    started = project.up_since("gateway", "worker")
    project.up("--scale", "encoder=2")
    wait_for(lambda: roles(project) == ["decode", "encode", "encode"])
    assert color_of(project, 41) == "red" and outcomes(project)["encoded"] == before["encoded"] + 1
    assert project.up_since("gateway", "worker") == started
