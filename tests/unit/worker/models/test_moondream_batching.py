"""However a prompt is chunked, resumed or batched, a sequence comes out as it does alone (I8, I10)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.two_sheets import image_crops
from tests.unit.worker.models.paged_driver import Driver, Row, quiet, relative_error, same
from tests.unit.worker.models.small_checkpoint import SECTIONS, write_checkpoint
from worker.formats.folder import Folder
from worker.forward import ImageCrops
from worker.models.moondream import Moondream
from worker.models.moondream_load import load

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["fp32", "bf16", "grouped"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Moondream:
    sections = copy.deepcopy(SECTIONS)
    if request.param == "grouped":
        sections["text"] |= {"n_heads": 4, "n_kv_heads": 2}
    folder = write_checkpoint(tmp_path_factory.mktemp("small"), sections=sections)
    dtype = torch.bfloat16 if request.param == "bf16" else torch.float32
    return load(Folder(folder), torch.device("cpu"), dtype, quiet)


def tolerance(model: Moondream) -> float:
    return TOLERANCE if model.dtype == torch.float32 else 2e-2


def inputs(model: Moondream, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return model.embed(torch.randint(10, 96, (count,), generator=generator))


def picture(seed: int, tiles_h: int, tiles_w: int) -> ImageCrops:
    generator = torch.Generator().manual_seed(seed)
    shape = (tiles_h * 42 + 28, tiles_w * 42 + 28, 3)
    canvas = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    small = torch.randint(0, 256, (70, 70, 3), dtype=torch.uint8, generator=generator)
    one_tile = tiles_h == tiles_w == 1
    return image_crops(canvas if one_tile else small, canvas, tiles_h, tiles_w)


@pytest.mark.parametrize("cuts", [[1] * 37, [5, 16, 16], [36, 1], [20, 17]])
def test_chunked_text_prompt_equals_whole(small: Moondream, cuts: list[int]) -> None:
    prompt = inputs(small, 37, seed=1)
    _, whole = Driver(small).prefill(prompt, 0)
    driver, row = Driver(small), Row()
    parts = [driver.step([], [(row, chunk, 0)]) for chunk in prompt.split(cuts)]
    assert relative_error(torch.cat(parts), whole) < tolerance(small)


def test_chunked_image_prompt_equals_whole(small: Moondream) -> None:
    """The prefix must stay whole; what follows it may be cut anywhere."""
    prefix = small.prefix_tokens
    prompt = inputs(small, prefix + 20, seed=2)
    _, whole = Driver(small).prefill(prompt, prefix)
    driver, row = Driver(small), Row()
    parts = [driver.step([], [(row, chunk, prefix)]) for chunk in prompt.split([prefix + 3, 9, 8])]
    assert relative_error(torch.cat(parts), whole) < tolerance(small)


@pytest.mark.parametrize("cached", [25, 16, 4, 1])
def test_resumed_prefix_equals_whole(small: Moondream, cached: int) -> None:
    """With the prefix's K and V cached, its last positions are computed again over the cached ones."""
    prefix = small.prefix_tokens
    prompt = inputs(small, prefix + 8, seed=3)
    driver = Driver(small)
    row, whole = driver.prefill(prompt, prefix)
    resumed = driver.step([], [(row, prompt[cached:], prefix)], start=cached)
    assert relative_error(resumed, whole[cached:]) < tolerance(small)


def test_a_cut_prefix_is_refused(small: Moondream) -> None:
    prefix = small.prefix_tokens
    with pytest.raises(ValueError, match="cuts a prefix"):
        Driver(small).prefill(inputs(small, prefix - 1, seed=4), prefix)


def test_batched_rows_equal_single_rows_bit_for_bit(small: Moondream) -> None:
    """Decode in a batch with padding and longer neighbours gives each row the very bits it gets alone."""
    lengths = [3, 40, 17, 64, 31, 1, 100]
    together, apart = Driver(small, kv_dtype=small.kv_dtype), Driver(small, kv_dtype=small.kv_dtype)
    batch = [together.prefill(inputs(small, n, seed=n), 0)[0] for n in lengths]
    alone = [apart.prefill(inputs(small, n, seed=n), 0)[0] for n in lengths]
    for step in range(4):
        fed = [inputs(small, 1, seed=1000 + 10 * step + i) for i in range(len(lengths))]
        rows = together.step(list(zip(batch, fed, strict=True)), padding=step)
        assert rows.shape[0] == len(lengths)
        logits = small.logits(rows)
        for index, row in enumerate(alone):
            single = apart.step([(row, fed[index])])
            assert same(rows[index : index + 1], single, tolerance(small))
            assert same(logits[index : index + 1], small.logits(single), tolerance(small))


def test_decode_rows_and_chunks_share_a_step(small: Moondream) -> None:
    prefix = small.prefix_tokens
    mixed, apart = Driver(small), Driver(small)
    prompts = [inputs(small, n, seed=n) for n in (9, 30)]
    chunk_a, chunk_b = inputs(small, prefix + 4, seed=50), inputs(small, 13, seed=51)
    fed = [inputs(small, 1, seed=60 + i) for i in range(2)]
    decode = [(mixed.prefill(prompt, 0)[0], word) for prompt, word in zip(prompts, fed, strict=True)]
    out = mixed.step(decode, [(Row(), chunk_a, prefix), (Row(), chunk_b, 0)], padding=2)
    expected = [
        *(apart.step([(apart.prefill(p, 0)[0], w)]) for p, w in zip(prompts, fed, strict=True)),
        apart.prefill(chunk_a, prefix)[1],
        apart.prefill(chunk_b, 0)[1],
    ]
    assert relative_error(out, torch.cat(expected)) < tolerance(small)


def test_one_row_of_nan_leaves_the_others_and_its_pages_harmless(small: Moondream) -> None:
    """I10: NaN reaches its own row's output, not its neighbours, nor the next owner of its pages."""
    driver, clean = Driver(small), Driver(small)
    prompt = inputs(small, 20, seed=5)
    victim, _ = driver.prefill(prompt, 0)
    neighbour, _ = driver.prefill(prompt, 0)
    expected_row, _ = clean.prefill(prompt, 0)
    word = inputs(small, 1, seed=6)
    out = driver.step([(victim, torch.full_like(word, float("nan"))), (neighbour, word)])
    expected = clean.step([(expected_row, word)])
    assert out[0].isnan().any()
    assert relative_error(out[1:], expected) < tolerance(small)
    heir = Row(pages=victim.pages)
    again = driver.step([], [(heir, prompt, 0)])
    after = driver.step([(heir, word)])
    assert not again.isnan().any()
    assert relative_error(after, expected) < tolerance(small)


def test_pictures_of_one_batch_equal_single_pictures(small: Moondream) -> None:
    pictures = [picture(1, 1, 1), picture(2, 2, 2), picture(3, 1, 3), picture(4, 3, 1), picture(5, 1, 1)]
    together = small.encode_images(pictures)
    for image, found in zip(pictures, together, strict=True):
        assert found.shape == (25, 128)
        (single,) = small.encode_images([image])
        assert same(found, single, tolerance(small))
    assert small.encode_images([]) == []


def test_a_canvas_of_another_size_is_refused(small: Moondream) -> None:
    image = picture(1, 2, 2)
    image.sheets[1].cols = 1
    with pytest.raises(ValueError, match="sheet"):
        small.encode_images([image])


def test_values_replace_words_only_in_spatial_rows(small: Moondream) -> None:
    card = small.card
    ids = torch.tensor([card.coord_id, card.size_id, card.coord_id, 20, card.size_id])
    values = torch.rand(5, 2)
    spatial = torch.tensor([True, True, False, True, False])
    found = small.embed_next(ids, values, spatial)
    words = small.embed(ids)
    assert torch.equal(found[2:], words[2:])
    assert same(found[:1], small.region.encode_coordinate(values[:1, :1], small.dtype), tolerance(small))
    assert same(found[1:2], small.region.encode_size(values[1:2], small.dtype), tolerance(small))
    assert torch.equal(small.embed_next(ids, values, torch.zeros(5, dtype=torch.bool)), words)


def test_decoded_values_have_a_column_for_each_kind(small: Moondream) -> None:
    card = small.card
    hidden = torch.randn(4, 128).to(small.dtype)
    ids = torch.tensor([card.coord_id, card.size_id, 20, card.coord_id])
    values = small.decode_values(hidden, ids)
    assert values.dtype == torch.float32 and values.shape == (4, 2)
    assert values[2].tolist() == [0.0, 0.0] and values[[0, 3], 1].tolist() == [0.0, 0.0]
    assert torch.equal(values[[0, 3], :1], small.region.decode_coordinate(hidden[[0, 3]]))
    assert torch.equal(values[1:2], small.region.decode_size(hidden[1:2]))
    assert not small.decode_values(hidden, torch.full((4,), 20)).any()
