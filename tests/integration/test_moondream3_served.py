"""A tiny Moondream 3.1, as it is released (two files, experts in FP8), behind a real gateway and worker: every task of the official
client, and a stream says what the whole answer does."""

from __future__ import annotations

from collections.abc import Iterator

import moondream
import pytest
from PIL import Image

from tests.fake_worker import CARD, VOCAB_SIZE, byte_tokenizer
from tests.integration.stack import Stack, stack
from tests.unit.worker.models.picture_oracle import scene
from tests.unit.worker.models.small_checkpoint3 import (
    SECTIONS_3,
    older_layout_3,
    random_tensors_3,
    write_checkpoint_3,
)

pytestmark = pytest.mark.slow

SAID = CARD.templates
TEMPLATES = {
    "caption": {length: SAID[f"caption_{length}"] for length in ("short", "normal", "long")},
    "query": {"prefix": SAID["query_prefix"], "suffix": [3]},
    **{task: {"prefix": SAID[f"{task}_prefix"], "suffix": [3]} for task in ("detect", "point", "segment")},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("moondream3.1")
    text = SECTIONS_3["text"] | {"vocab_size": VOCAB_SIZE}
    sections = SECTIONS_3 | {"text": text, "tokenizer": {"templates": TEMPLATES}}
    tensors = random_tensors_3(sections)
    bias = tensors["model.text.lm_head.bias"]
    bias[CARD.coord_id] += 3.0
    bias[CARD.size_id] += 2.0
    write_checkpoint_3(folder, older_layout_3(tensors, fp8=True, joined=True), sections, architectures=None)
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    with stack(["--device", "cpu", "--dtype", "float32", "--model", str(folder)]) as running:
        yield running


def test_every_task_of_the_official_client(served: Stack) -> None:
    model, picture = moondream.vl(endpoint=f"{served.url}/v1"), scene(150, 90, 1)
    settings = {"max_tokens": 24, "temperature": 0}
    places = [[0.25, 0.5], [0.1, 0.2, 0.6, 0.8]]

    def whole_and_streamed(picture: Image.Image | None) -> None:
        whole = model.query(picture, "what?", reasoning=False, settings=settings)["answer"]
        streamed = model.query(picture, "what?", reasoning=False, stream=True, settings=settings)["answer"]
        assert isinstance(whole, str) and "".join(streamed) == whole

    whole_and_streamed(picture)
    whole_and_streamed(None)
    thought = model.query(picture, "why?", reasoning=True, spatial_refs=places, settings=settings)
    assert set(thought["reasoning"]) == {"text", "grounding"}
    caption = model.caption(picture, length="short", settings=settings)["caption"]
    assert caption == "".join(
        model.caption(picture, length="short", stream=True, settings=settings)["caption"]
    )
    for box in model.detect(picture, "dot", settings={"max_objects": 3})["objects"]:
        assert 0 <= box["x_min"] <= box["x_max"] <= 1 and 0 <= box["y_min"] <= box["y_max"] <= 1
    points = model.point(picture, "dot", spatial_refs=places, settings={"max_objects": 3})["points"]
    assert len(points) <= 3 and all(set(point) == {"x", "y"} for point in points)


def test_an_outline_whole_and_streamed(served: Stack) -> None:
    model, picture = moondream.vl(endpoint=f"{served.url}/v1"), scene(90, 150, 2)
    settings = {"max_tokens": 48, "temperature": 0}
    whole = model.segment(picture, "dot", settings=settings)
    *parts, last = model.segment(picture, "dot", stream=True, settings=settings)
    assert last == {"path": whole["path"], "bbox": whole.get("bbox"), "completed": True}
    assert "".join(part.get("chunk", "") for part in parts) == whole["path"]
    boxes = [part["bbox"] for part in parts if "bbox" in part]
    assert boxes == [whole["bbox"]], "so many coordinates and sizes have a box among them"
