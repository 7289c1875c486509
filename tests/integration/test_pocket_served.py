"""The embedded model behind a real gateway and a real worker, asked by the official clients."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import moondream
import openai
import pytest
from openai.types.chat import ChatCompletionContentPartParam, ChatCompletionMessageParam
from PIL import Image, ImageDraw

from tests.integration.stack import POCKET, Stack, stack

pytestmark = pytest.mark.slow

RED_CIRCLE = (40, 60, 120, 140)
BLUE_SQUARE = (180, 170, 260, 250)


@pytest.fixture(scope="module")
def served() -> Iterator[Stack]:
    with stack(POCKET) as running:
        yield running


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    image = Image.new("RGB", (300, 300), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse(RED_CIRCLE, fill=(215, 40, 40))
    draw.rectangle(BLUE_SQUARE, fill=(40, 80, 215))
    return image


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def overlap(box: dict[str, float], truth: tuple[int, int, int, int]) -> float:
    """Intersection over union of a box in fractions and one in pixels of a 300-pixel picture."""
    x0, y0, x1, y1 = (v / 300 for v in truth)
    width = max(0.0, min(box["x_max"], x1) - max(box["x_min"], x0))
    height = max(0.0, min(box["y_max"], y1) - max(box["y_min"], y0))
    both = width * height
    area = (box["x_max"] - box["x_min"]) * (box["y_max"] - box["y_min"]) + (x1 - x0) * (y1 - y0) - both
    return both / area


def test_moondream_client_gets_true_answers(served: Stack, picture: Image.Image) -> None:
    model = moondream.vl(endpoint=f"{served.url}/v1")
    assert model.query(picture, "What color is the circle?")["answer"] == "red"
    assert model.query(picture, "What shape is blue?")["answer"] == "square"
    assert model.query(picture, "How many shapes are there?")["answer"] == "2"
    assert model.query(picture, "Is there a star?")["answer"] == "no"
    caption = model.caption(picture, length="short")["caption"]
    assert "red circle" in caption and "blue square" in caption
    (box,) = model.detect(picture, "red circle")["objects"]
    assert overlap(box, RED_CIRCLE) > 0.6
    (point,) = model.point(picture, "blue square")["points"]
    assert BLUE_SQUARE[0] < point["x"] * 300 < BLUE_SQUARE[2]
    assert BLUE_SQUARE[1] < point["y"] * 300 < BLUE_SQUARE[3]
    assert model.detect(picture, "green star")["objects"] == []
    streamed = model.query(picture, "What color is the square?", stream=True)["answer"]
    assert "".join(streamed) == "blue"


def test_openai_client_streams_and_counts(served: Stack, picture: Image.Image) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused")
    model = client.models.list().data[0].id
    content: list[ChatCompletionContentPartParam] = [
        {"type": "image_url", "image_url": {"url": data_url(picture)}},
        {"type": "text", "text": "What color is the circle?"},
    ]
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "red"
    assert chunks[-2].choices[0].finish_reason == "stop"
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens >= 1 and usage.prompt_tokens > 49


def test_two_pictures_and_follow_ups_are_answered(served: Stack, picture: Image.Image) -> None:
    """A conversation as clients hold it: each turn brings what was said before, as the server said it."""
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused")
    circles = Image.new("RGB", (300, 300), "white")
    draw = ImageDraw.Draw(circles)
    draw.ellipse((30, 170, 110, 250), fill=(40, 160, 60))
    draw.ellipse((190, 50, 270, 130), fill=(22, 22, 24))

    def converse(*turns: str, show: list[Image.Image], system: str = "") -> list[str | None]:
        messages: list[ChatCompletionMessageParam] = [{"role": "system", "content": system}] if system else []
        shown: list[ChatCompletionContentPartParam] = [
            {"type": "image_url", "image_url": {"url": data_url(image)}} for image in show
        ]
        said = []
        for text in turns:
            messages.append({"role": "user", "content": [*shown, {"type": "text", "text": text}]})
            shown = []
            answer = client.chat.completions.create(model="pocket", messages=messages, temperature=0)
            said.append(answer.choices[0].message.content)
            messages.append({"role": "assistant", "content": said[-1]})
        return said

    assert converse("Which picture has a blue square?", "Where is it?", show=[circles, picture]) == [
        "the second", "bottom right",
    ]  # fmt: skip
    assert converse("Which picture has a blue square?", show=[picture, circles]) == ["the first"]
    said = converse("What is in the second picture?", show=[picture, circles])
    assert said == ["a green circle and a black circle"]
    asked = ("How many shapes are there?", "and how many are red?", "What shape is it?")
    assert converse(*asked, show=[picture]) == ["2", "1", "circle"]
    told = "You are a helpful assistant."
    assert converse("How many shapes are there?", show=[picture], system=told) == ["2"]


def test_answers_do_not_depend_on_company(served: Stack, picture: Image.Image) -> None:
    """A mixed crowd of requests, greedy and seeded, gets what each gets alone (I8, over the whole path)."""
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused")
    moon = moondream.vl(endpoint=f"{served.url}/v1")
    questions = [
        "What color is the circle?",
        "Where is the square?",
        "How many shapes are there?",
        "Describe it",
    ]

    def ask(number: int) -> object:
        if number % 6 == 4:
            return moon.detect(picture, "square")["objects"]
        if number % 6 == 5:
            return moon.point(picture, "circle")["points"]
        content: list[ChatCompletionContentPartParam] = [
            {"type": "image_url", "image_url": {"url": data_url(picture)}},
            {"type": "text", "text": questions[number % 6]},
        ]
        answer = client.chat.completions.create(
            model="pocket",
            messages=[{"role": "user", "content": content}],
            temperature=1.5 if number % 2 else 0.0,
            seed=number,
            max_tokens=24,
        )
        return answer.choices[0].message.content

    alone = [ask(number) for number in range(18)]
    with ThreadPoolExecutor(18) as crowd:
        together = list(crowd.map(ask, range(18)))
    assert together == alone
