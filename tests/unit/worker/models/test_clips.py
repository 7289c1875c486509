"""Videos as lists of frames, in families that were trained on them, beside transformers: texts, pixels, features and logits to
1e-4, and greedy tokens through chunks, batches and both caches. See `test_pictures`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from gateway.api.prompts import Prompt
from gateway.core.catalog import AnnouncedModel
from shared.protocol import EdgeTiles, Encode
from tests.unit.worker.loop.simulation import EPOCH
from tests.unit.worker.models import clip_oracle as clips
from tests.unit.worker.models import picture_oracle as pictures
from tests.unit.worker.models.clip_oracle import CONVERSATIONS, conversation
from tests.unit.worker.models.dense_oracle import TOLERANCE, load
from tests.unit.worker.models.free_oracle import FREE, FreeOracle
from tests.unit.worker.models.paged_driver import relative_error
from tests.unit.worker.models.picture_oracle import FAMILIES, Oracle
from tests.unit.worker.models.picture_scenes import check_answers, images_of, logits_of
from tests.unit.worker.step.test_torch_runner import Harness
from worker.device.cpu import CpuDevice
from worker.models.free_tower import FreeTower
from worker.models.picture_model import PictureModel
from worker.schedule.intake import build_sequence
from worker.schedule.picture_intake import build_picture
from worker.schedule.refusal import Refusal
from worker.step.picture_encoder import TorchEncoder

pytestmark = pytest.mark.slow
NUM = 16
MAKERS: dict[str, Callable[[Path], Oracle]] = {
    "smolvlm": FAMILIES["smolvlm"],
    "internvl": FAMILIES["internvl"],
    "qwen3_vl": FREE["qwen3_vl"],
    "qwen2_5_vl": FREE["qwen2_5_vl"],
}


@dataclass
class Pair:
    """A model of ours and of theirs."""

    family: str
    model: PictureModel
    served: AnnouncedModel
    oracle: Oracle
    folder: Path

    def expected(self, name: str) -> pictures.Expected:
        return clips.expected(self.family, self.oracle, conversation(name))


@pytest.fixture(scope="module", params=MAKERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder: Path = tmp_path_factory.mktemp(request.param)
    torch.set_num_threads(1)
    with torch.inference_mode():
        oracle = MAKERS[request.param](folder)
        model = load(folder)
    assert isinstance(model, PictureModel)
    return Pair(request.param, model, pictures.announced(model.card, folder), oracle, folder)


def whole_ids(pair: Pair, prompt: Prompt) -> list[int]:
    """The prompt with an id at each position of a picture or frame, as transformers has it."""
    ids, at = [], 0
    video_id = pair.oracle.video_id if isinstance(pair.oracle, FreeOracle) else pair.oracle.image_id
    for image in prompt.images:
        for place, num in image.spec.runs:
            ids += [
                *prompt.ids[at:place],
                *[video_id if image.spec.num_frames else pair.oracle.image_id] * num,
            ]
            at = place
    return ids + prompt.ids[at:]


@pytest.mark.parametrize("name", CONVERSATIONS)
@torch.inference_mode()
def test_pixels_ids_features_and_logits(pair: Pair, name: str) -> None:
    model, turns = pair.model, conversation(name)
    expected, prompt = pair.expected(name), clips.compose(pair.served, turns)
    assert whole_ids(pair, prompt) == expected.ids
    images = images_of(prompt)
    tower = model.encoder
    if isinstance(tower, FreeTower):
        assert expected.pixels is not None
        at = 0
        for image, prepared in zip(images, prompt.images, strict=True):
            if prepared.spec.num_frames:
                (sheet,) = image.sheets
                ours = tower.pixels(sheet.pixels.unflatten(0, (sheet.rows, -1)))
                if sheet.rows == 1:  # shown twice
                    ours = ours.unflatten(1, (3, 1, -1)).expand(-1, -1, 2, -1).flatten(1)
                assert (ours - expected.pixels[at : at + len(ours)]).abs().max() < 1e-5
                at += len(ours)
        assert at == len(expected.pixels)
    features = torch.cat(model.encode_images(images))
    assert relative_error(features, clips.features(pair.oracle, expected, turns)) < TOLERANCE
    submit, frames = pictures.submit_of(prompt, 1, 8)
    seq = build_sequence(b"", submit, frames, model.card, 0.0)
    theirs = pair.oracle.logits(expected)
    for cuts in ([], [7, 24, 25]):
        assert relative_error(logits_of(model, seq, features, cuts), theirs) < TOLERANCE


def test_greedy_tokens_in_batches_chunks_and_from_caches(pair: Pair) -> None:
    prompts = [clips.compose(pair.served, conversation(name)) for name in CONVERSATIONS]
    expected = [pair.oracle.greedy(pair.expected(name), NUM) for name in CONVERSATIONS]
    assert len({tuple(tokens) for tokens in expected}) == len(CONVERSATIONS)
    for mixed_tokens in (1600, 24):
        check_answers(pair.model, prompts, expected, NUM, mixed_tokens, [16] * len(prompts))


def test_the_same_frames_at_other_times_are_another_prompt(pair: Pair) -> None:
    """Features are found again, pages from the first frame whose time differs on are not."""
    quick = clips.film(4, 61, 40, 20, 2.0)
    answers, harness = [], Harness(pair.model, depth=2)
    for number, fps in enumerate((2.0, 0.3)):
        turns: list[clips.FilmTurn] = [("user", [clips.Film(quick.frames, fps), "What happens?"])]
        expected = clips.expected(pair.family, pair.oracle, turns)
        (stream,) = harness.answer([pictures.submit_of(clips.compose(pair.served, turns), number, NUM)])
        assert stream.tokens == pair.oracle.greedy(expected, NUM)
        answers.append(stream)
    has_times = pair.family != "internvl"
    assert not has_times or harness.runner.forward.embedding._features.num_hits >= 2
    assert (answers[0].tokens != answers[1].tokens) == has_times


@pytest.fixture(scope="module")
def smolvlm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smolvlm")
    FAMILIES["smolvlm"](folder)
    return folder


@pytest.mark.parametrize(
    ("file", "says", "edge", "fps", "most"),
    [
        ("", {}, 128, 1.0, 64),
        (
            "video_preprocessor_config.json",
            {"video_sampling": {"fps": 3, "max_frames": 5, "video_size": {"longest_edge": 96}}},
            96,
            3.0,
            5,
        ),
        ("processor_config.json", {"size": {"longest_edge": 64}, "num_frames": 9, "fps": 2}, 64, 2.0, 9),
        ("video_preprocessor_config.json", {"do_normalize": False}, 0, 0, 0),
        ("video_preprocessor_config.json", {"image_mean": [0.4] * 3}, 0, 0, 0),
        ("video_preprocessor_config.json", {"max_image_size": {"longest_edge": 64}}, 0, 0, 0),
    ],
    ids=str,
)
def test_where_a_folder_says_how_frames_are_prepared(
    smolvlm_folder: Path, tmp_path: Path, file: str, says: dict[str, Any], edge: int, fps: float, most: int
) -> None:
    """A folder whose frames are prepared as nobody does here has its pictures nevertheless."""
    shutil.copytree(smolvlm_folder, tmp_path, dirs_exist_ok=True)
    said = {"max_image_size": {"longest_edge": 32}, **says}
    if file.startswith("processor"):
        stills = json.loads((tmp_path / "preprocessor_config.json").read_text())
        said = {"image_processor": stills, "video_processor": said}
    if file:
        (tmp_path / file).write_text(json.dumps(said))
    image = load(tmp_path).card.image
    assert image is not None
    if not edge:
        assert image.clip is None
    else:
        assert image.clip is not None and isinstance(image.clip.rule, EdgeTiles)
        assert (image.clip.rule.longest_edge, image.clip.fps, image.clip.max_frames) == (edge, fps, most)


RELEASED = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == 'image' %}"
    "{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def test_a_template_that_passes_over_videos_and_users_who_write_placeholders(
    pair: Pair, tmp_path: Path
) -> None:
    """In the place of each video stands what the family has there, whatever its template and its users write."""
    assert pair.served.card.image is not None and pair.served.card.image.clip is not None
    typed = pair.served.card.image.clip.layout.placeholder or "<video>"
    turns: list[clips.FilmTurn] = [("user", [f"{typed} is", clips.film(2, 20, 20, 1), f"no {typed}"])]
    prompt = clips.compose(pair.served, turns)
    text = pair.served.decode(prompt.ids, keep_special=True)
    assert f"{typed} is" in text and f"no {typed}" in text
    if pair.family == "smolvlm":
        (tmp_path / "chat_template.jinja").write_text(RELEASED)
        (tmp_path / "tokenizer.json").write_bytes(Path(pair.folder, "tokenizer.json").read_bytes())
        released = pictures.announced(pair.model.card, tmp_path)
        for name in CONVERSATIONS:
            ids = clips.compose(released, conversation(name)).ids
            assert ids == clips.compose(pair.served, conversation(name)).ids


def test_frames_are_encoded_elsewhere_as_here(pair: Pair) -> None:
    prompt = clips.compose(pair.served, conversation("odd"))
    encoder = TorchEncoder(pair.model, CpuDevice(), weights="w", feature_bytes=1 << 20, step_crops=4)
    submit, frames = pictures.submit_of(prompt, 1, NUM)
    wanted = Harness(pair.model, depth=2).answer([(submit, frames)])[0].tokens
    data = [
        encoder.encode("", build_picture(Encode(EPOCH, 1, image), [frame], encoder.card), lambda: None)
        for image, frame in zip(submit.images, frames, strict=True)
    ]
    given = msgspec.structs.replace(submit, encoded=list(range(len(data))), encoded_as=encoder.format)
    harness = Harness(pair.model, depth=2, mixed_tokens=24, format=encoder.format)
    assert harness.answer([(given, data)])[0].tokens == wanted


def test_intake_refuses_what_the_gateway_cannot_have_made(pair: Pair) -> None:
    card = pair.model.card
    assert card.image is not None and card.image.clip is not None
    submit, frames = pictures.submit_of(clips.compose(pair.served, conversation("odd")), 1, 8)
    last = submit.images[-1]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"num_frames": card.image.clip.group + 1}, "a group has 1 to"),
        ({"num_frames": 0, "moment": 1}, "a group has 1 to"),
        ({"moment": -1}, "a moment that this model has no time for"),
    ]
    if card.image.clip.steps_per_second:
        cases += [({"moment": 1 << 30}, "positions apart"), ({"runs": [(0, last.runs[0][1])]}, "in order")]
        cases += [({"moment": 2040}, "max_tokens may be at most|shorter time")]
    else:
        cases += [({"is_continued": True}, "no time for")]
    if card.image.clip.group > 1:
        cases += [({"num_frames": 2}, "one below the other")]
    for changes, words in cases:
        images = [*submit.images[:-1], msgspec.structs.replace(last, **changes)]
        with pytest.raises(Refusal, match=words):
            build_sequence(b"", msgspec.structs.replace(submit, images=images), frames, card, 0.0)
    many = msgspec.structs.replace(submit, images=submit.images * 70)
    with pytest.raises(Refusal, match="frames; at most"):
        build_sequence(b"", many, frames * 70, card, 0.0)
