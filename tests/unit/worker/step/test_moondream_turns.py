"""Conversations with several turns and pictures, through the engine, against a plain second implementation."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shared.protocol import ImageInput, PromptValue, Sampling, Submit, pack_i32
from tests.two_sheets import image_input
from tests.unit.worker.loop.simulation import EPOCH, Stream
from tests.unit.worker.models.moondream3_oracle import PlainText3
from tests.unit.worker.models.moondream_oracle import PlainText, Span
from tests.unit.worker.models.small_checkpoint import write_checkpoint
from tests.unit.worker.models.small_checkpoint3 import write_checkpoint_3
from tests.unit.worker.step.test_torch_runner import Harness, load
from worker.models.moondream import Moondream
from worker.models.moondream3 import Moondream3
from worker.models.picture_plan import MAX_IMAGES
from worker.schedule.intake import build_sequence
from worker.schedule.refusal import Refusal

NUM, SIDE, TOKENS = 25, 70, 20  # positions and pixels of a picture, tokens of an answer
Picture = tuple[ImageInput, list[bytes]]
Plain = PlainText | PlainText3


@pytest.fixture(scope="module", params=["second", "third"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    write = write_checkpoint if request.param == "second" else write_checkpoint_3
    return write(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Moondream:
    loaded = load(folder)
    assert isinstance(loaded, Moondream)
    return loaded


@pytest.fixture(scope="module")
def plain(folder: Path, model: Moondream) -> Plain:
    if isinstance(model, Moondream3):
        return PlainText3(load_file(folder / "model.safetensors"), model.config.text)
    return PlainText(folder, model.config.text)


def picture(seed: int, place: int) -> Picture:
    frame = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8).tobytes()
    return image_input(place, NUM, SIDE, b"picture %d" % seed), [frame, frame]


def conversation(number: int, ids: list[int], pictures: list[Picture], max_tokens: int = TOKENS) -> tuple[Submit, list[bytes]]:  # fmt: skip
    submit = Submit(
        epoch=EPOCH,
        sequence_id=number,
        request_id=str(number),
        prompt=pack_i32(ids),
        max_tokens=max_tokens,
        images=[image for image, _ in pictures],
        ignore_eos=True,
        sampling=Sampling(num_logprobs=0),
    )
    return submit, [frame for _, frames in pictures for frame in frames]


def words(count: int, seed: int) -> list[int]:
    return [int(one) for one in np.random.default_rng(seed).integers(10, 96, count)]


def two_pictures_first(number: int = 1) -> tuple[Submit, list[bytes]]:
    ids = [0, *words(30, 1)]
    return conversation(number, ids, [picture(1, 1), picture(2, 1), picture(3, 20)])


def text_first(number: int = 2) -> tuple[Submit, list[bytes]]:
    return conversation(number, [0, *words(40, 2)], [picture(2, 12), picture(2, 30)])


def whole(submit: Submit, frames: list[bytes], model: Moondream, plain: Plain) -> tuple[Tensor, list[Span]]:
    """The prompt's input embeddings, and its blocks as the facts have them: BOS belongs to a picture right behind it."""
    seq = build_sequence(b"", submit, frames, model.card, 0.0)
    inputs, blocks = plain.words([max(token, 0) for token in seq.tokens]), []
    with torch.inference_mode():
        for image in seq.pictures:
            (features,) = model.encode_images([_crops(image.frames[0])])
            inputs[image.position : image.end] = features.clone()
            blocks.append((0 if image.position == 1 else image.position, image.end))
    for given in submit.values:
        # Every picture of these prompts stands before them.
        place = given.index + NUM * len(submit.images)
        kind = "size" if len(given.values) == 2 else "coord"
        inputs[place] = plain.fourier(torch.tensor([given.values]), kind)[0]
    return inputs, blocks


def _crops(frame: bytes):  # type: ignore[no-untyped-def]
    from tests.two_sheets import image_crops

    pixels = torch.from_numpy(np.frombuffer(frame, np.uint8).copy().reshape(SIDE, SIDE, 3))
    return image_crops(pixels, pixels, 1, 1)


def check(stream: Stream, model: Moondream, plain: Plain, frames: list[bytes]) -> None:
    """Greedy tokens and their log-probabilities, each from the whole sequence run anew."""
    submit = stream.submit
    inputs, blocks = whole(submit, frames, model, plain)
    tokens: list[int] = []
    logprobs = []
    for _ in range(submit.max_tokens):
        logits = plain.logits(plain.hidden(inputs, blocks)[-1:])[0]
        scores = logits.log_softmax(-1)
        logits[model.card.suppress_ids] = -torch.inf
        tokens.append(int(logits.argmax()))
        logprobs.append(float(scores[tokens[-1]]))
        inputs = torch.cat([inputs, plain.words(tokens[-1:])])
    assert stream.tokens == tokens
    assert stream.logprobs == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("mixed_tokens", [1600, 32])
def test_tokens_equal_the_plain_implementations(model: Moondream, plain: Plain, mixed_tokens: int) -> None:
    """Alone and together, in chunks beside decoding rows, and once more from the caches."""
    submits = [two_pictures_first(), text_first()]
    harness = Harness(model, depth=2, mixed_tokens=mixed_tokens)
    beside = conversation(9, [0, *words(3, 9)], [], max_tokens=60)
    streams = harness.begin([beside])
    for _ in range(4):
        harness.engine.tick()
    again = [(msgspec.structs.replace(one, sequence_id=10 + i), f) for i, (one, f) in enumerate(submits)]
    for asked, num_cached in ((submits, 0), (again, 48)):
        for stream, (_, frames) in zip(harness.answer(asked), asked, strict=True):
            check(stream, model, plain, frames)
            assert stream.finish is not None and stream.finish.cached_tokens >= num_cached
    assert streams[0].finish is not None


def test_a_follow_up_reuses_the_turns_before_it(model: Moondream, plain: Plain) -> None:
    harness = Harness(model, depth=1)
    first, frames = two_pictures_first()
    (stream,) = harness.answer([(first, frames)])
    ids = [0, *words(30, 1), *stream.tokens, *words(9, 4)]
    pictures = [picture(1, 1), picture(2, 1), picture(3, 20)]
    follow_up = conversation(5, ids, pictures)
    (found,) = harness.answer([follow_up])
    check(found, model, plain, follow_up[1])
    assert found.finish is not None and found.finish.cached_tokens >= 96
    # Another picture in a place of its own shares what stands before it, and no more.
    other = conversation(6, ids, [picture(1, 1), picture(4, 1), picture(3, 20)])
    (found,) = harness.answer([other])
    check(found, model, plain, other[1])
    assert found.finish is not None and 0 < found.finish.cached_tokens <= 1 + NUM


def test_bounds_are_announced_and_kept(model: Moondream) -> None:
    spec = model.card.image
    context = model.card.context_tokens
    assert spec is not None and spec.max_images == min(MAX_IMAGES, (context - 1 - 32) // NUM)
    too_many = conversation(1, [0, 20], [picture(1, 1)] * (spec.max_images + 1))
    harness = Harness(model, depth=1)
    (stream,) = harness.begin([too_many])
    while harness.engine.tick() or not harness.inbox.empty():
        pass
    assert stream.rejected is not None and f"at most {spec.max_images}" in stream.rejected.message


def test_boxes_bring_the_log_probabilities_of_their_bins(model: Moondream, plain: Plain) -> None:
    submit, frames = conversation(1, [0, *words(6, 5)], [picture(1, 1)], max_tokens=7)
    found_only = Sampling(num_logprobs=0, logit_bias={0: -50.0})  # no end before two boxes
    asked = msgspec.structs.replace(submit, task="detect", max_objects=2, sampling=found_only)
    silent = msgspec.structs.replace(found_only, num_logprobs=-1)
    unasked = msgspec.structs.replace(asked, sequence_id=2, sampling=silent)
    text = conversation(3, [0, *words(6, 6)], [])
    found, other, _ = Harness(model, depth=2).answer([(asked, frames), (unasked, frames), text])
    assert found.values == other.values and not any(other.value_logprobs) and not found.logprobs
    inputs, blocks = whole(asked, frames, model, plain)
    for token, values, scores in zip(found.tokens, found.values, found.value_logprobs, strict=True):
        hidden = plain.hidden(inputs, blocks)[-1:]
        is_size = token == model.card.size_id
        bins = plain.region("size_decoder" if is_size else "coord_decoder", hidden).view(1 + is_size, -1)
        wanted = bins.log_softmax(-1).max(-1).values.tolist()
        assert scores[: len(wanted)] == pytest.approx(wanted, abs=1e-4)
        own = torch.tensor([values[: 1 + is_size]])
        inputs = torch.cat([inputs, plain.fourier(own, "size" if is_size else "coord")])
    assert len(found.values) == 6


def test_places_in_the_prompt_are_embedded_by_value(model: Moondream, plain: Plain) -> None:
    """In chunks, and from a cache that tells other places apart though their ids are the same."""
    card = model.card
    ids = [0, *words(4, 7), *[card.coord_id] * 4, card.size_id, *words(40, 8)]
    submit, frames = conversation(1, ids, [picture(1, 1)])
    places = [[0.25], [0.5], [0.75], [0.125], [0.5, 0.25]]
    values = [PromptValue(5 + i, one) for i, one in enumerate(places)]
    asked = msgspec.structs.replace(submit, values=values)
    moved = [PromptValue(5, [0.875]), *values[1:]]
    other = msgspec.structs.replace(submit, sequence_id=2, values=moved)
    again = msgspec.structs.replace(asked, sequence_id=3)
    harness = Harness(model, depth=1, mixed_tokens=32)
    streams = [harness.answer([(one, frames)])[0] for one in (asked, other, again)]
    assert len({tuple(stream.logprobs) for stream in streams[:2]}) == 2
    for stream in streams:
        check(stream, model, plain, frames)
    cached = [stream.finish.cached_tokens for stream in streams if stream.finish is not None]
    assert cached[1] <= 1 + NUM < 48 <= cached[2]


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (PromptValue(99, [0.5]), "indexes 0"),
        (PromptValue(1, [0.5]), "no other id has any"),
        (PromptValue(2, [0.5, 0.5]), "a coordinate's id has one value"),
        (PromptValue(2, [float("nan")]), "0 … 1"),
    ],
)
def test_values_without_a_place_are_refused(model: Moondream, value: PromptValue, fault: str) -> None:
    submit, frames = conversation(1, [0, 20, model.card.coord_id], [])
    with pytest.raises(Refusal, match=fault) as caught:
        build_sequence(b"", msgspec.structs.replace(submit, values=[value]), frames, model.card, 0.0)
    assert caught.value.param == "values"


@pytest.mark.parametrize("automata", [True, False])
def test_a_thought_points_closes_and_is_answered(model: Moondream, plain: Plain, automata: bool) -> None:
    """Coordinates of a thought are fed back by value; what may come when is as Moondream's code has it."""
    card = model.card
    ids = [0, *words(6, 5), *card.templates["reasoning_suffix"]]
    submit, frames = conversation(1, ids, [picture(1, 1)], max_tokens=24)
    bias = {card.coord_id: 5.5, card.templates["reasoning_close"][0]: 4.5}
    asked = msgspec.structs.replace(submit, task="reason", sampling=Sampling(logit_bias=bias))
    text = conversation(
        2, [0, *words(6, 6)], [picture(2, 1)]
    )  # a row beside it, which never says the closing id
    found, beside = Harness(model, depth=2, automata=automata).answer([(asked, frames), text])
    check(beside, model, plain, text[1])
    inputs, blocks = whole(asked, frames, model, plain)
    state, seen = "thought", set()
    for token, values in zip(found.tokens, found.values, strict=True):
        hidden = plain.hidden(inputs, blocks)[-1:]
        logits = plain.logits(hidden)[0]
        for token_id, value in bias.items():
            logits[token_id] += value
        if state == "opener":
            assert token == 3
            state = "answer"
        else:
            logits[[0, card.size_id] if state == "thought" else [3]] = -torch.inf
            assert token == int(logits.argmax())
            if token == 3:
                state = "opener" if card.templates["reasoning_end"] else "answer"
        seen.add((state, token == card.coord_id))
        if token == card.coord_id:
            coordinate = plain.region("coord_decoder", hidden).argmax() / 64
            assert values[0] == float(coordinate)
            inputs = torch.cat([inputs, plain.fourier(coordinate.view(1, 1), "coord")])
        else:
            inputs = torch.cat([inputs, plain.words([token])])
    opened = {("opener", False)} if card.templates["reasoning_end"] else set()
    assert {("thought", True), ("answer", False)} | opened <= seen


def test_an_outline_is_a_box_and_free_text(model: Moondream, plain: Plain) -> None:
    """Only of the third generation; coordinates are fed back by value, beside rows of text, and no form is forced."""
    submit, frames = conversation(1, [0, *words(6, 5)], [picture(1, 1)], max_tokens=24)
    card = model.card
    bias = {card.coord_id: 2.5, card.size_id: 1.5}
    asked = msgspec.structs.replace(submit, task="segment", sampling=Sampling(logit_bias=bias))
    if "segment" not in card.capabilities:
        with pytest.raises(Refusal, match="'segment' is not one of"):
            build_sequence(b"", asked, frames, card, 0.0)
        return
    text = conversation(2, [0, *words(6, 6)], [picture(2, 1)])
    found, beside = Harness(model, depth=2).answer([(asked, frames), text])
    check(beside, model, plain, text[1])
    inputs, blocks = whole(asked, frames, model, plain)
    for token, values in zip(found.tokens, found.values, strict=True):
        hidden = plain.hidden(inputs, blocks)[-1:]
        logits = plain.logits(hidden)[0]
        for token_id, value in bias.items():
            logits[token_id] += value
        assert token == int(logits.argmax())
        if token not in (card.coord_id, card.size_id):
            inputs = torch.cat([inputs, plain.words([token])])
            continue
        is_size = token == card.size_id
        bins = (
            plain.region("size_decoder" if is_size else "coord_decoder", hidden)
            .view(1 + is_size, -1)
            .argmax(-1)
        )
        wanted = 2 ** (bins / 63 * 10 - 10) if is_size else bins / 64
        torch.testing.assert_close(torch.tensor(values[: 1 + is_size]), wanted)
        inputs = torch.cat([inputs, plain.fourier(wanted[None], "size" if is_size else "coord")])
    assert {card.coord_id, card.size_id} < set(found.tokens)
