"""Training: losses fall, a resumed run equals an uninterrupted one, finds are matched rightly. Test process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pocket.batches import BatchPlan, draw_batch
from pocket.evaluate import count_points_inside, match_boxes, overlap
from pocket.network import (
    NetworkConfig,
    RegionConfig,
    TextConfig,
    VisionConfig,
    size_value,
    stitch_weights,
)
from pocket.objective import blurred_loss
from pocket.optimizer import orthogonalise
from pocket.segments import coord_bin, size_bin
from pocket.tokenizer import TOKENIZER_CONFIG, VOCAB_SIZE, load_tokenizer
from pocket.train import WEIGHTS_FOLDER, run

TINY = NetworkConfig(
    text=TextConfig(dim=64, ff_dim=64, n_layers=1, vocab_size=VOCAB_SIZE, max_context=256, n_heads=1, n_kv_heads=1),
    vision=VisionConfig(
        enc_dim=32, enc_n_layers=1, enc_ff_dim=32, enc_n_heads=1, proj_out_dim=64, crop_size=98, max_crops=4,
        overlap_margin=1, proj_inner_dim=32,
    ),
    region=RegionConfig(dim=64, coord_feat_dim=16, size_feat_dim=16, inner_dim=16),
    tokenizer=TOKENIZER_CONFIG,
)  # fmt: skip
PLAN = BatchPlan(seed=9, num_pictures=3, num_pairs=1, num_positions=146)


def train(folder: Path, steps: int, stop_after: int | None = None) -> list[dict[str, float]]:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text((WEIGHTS_FOLDER / "tokenizer.json").read_text())
    return run(
        folder,
        folder / "out",
        steps=steps,
        seed=9,
        config=TINY,
        plan=PLAN,
        encoder_share=0.0,
        peak=3e-2,
        quiet=True,
        log_every=1,
        stop_after=stop_after,
    )


@pytest.mark.slow
def test_loss_falls_and_resuming_changes_nothing(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 6)
    assert whole[-1]["language"] < whole[0]["language"]
    first = train(tmp_path / "parts", 6, stop_after=3)
    rest = train(tmp_path / "parts", 6)
    assert [line["loss"] for line in first + rest] == [line["loss"] for line in whole]
    ours = load_file(tmp_path / "parts" / "out" / "model.safetensors")
    theirs = load_file(tmp_path / "whole" / "out" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(held, theirs[name]) for name, held in ours.items())


def test_a_batch_follows_from_its_number() -> None:
    tokenizer = load_tokenizer(WEIGHTS_FOLDER / "tokenizer.json")
    once, again = (draw_batch(3, PLAN, TINY, tokenizer) for _ in range(2))
    assert all((held == again[name]).all() for name, held in once.items())
    asked = once["tokens"] >= 0
    assert (once["segments"] != 0)[asked].all()
    assert (once["positions"] < TINY.text.max_context).all()
    # Every coordinate that is asked for is fed back as a value right after.
    rows, columns = (once["coords"] >= 0).nonzero()
    assert (once["kinds"][rows, columns + 1] == 1).all()
    assert (once["coords"][rows, columns] / 1024 == once["values"][rows, columns + 1, 0]).all()


def test_bins_hold_their_values() -> None:
    for value in (0.0, 0.25, 0.7, 0.999):
        assert abs(coord_bin(value) / 1024 - value) < 1 / 1024
    for value in (0.01, 0.2, 1.0):
        assert abs(float(size_value(torch.tensor(size_bin(value)))) / value - 1) < 0.004


def test_a_near_miss_costs_less_than_a_far_one() -> None:
    target = torch.tensor([500])
    losses = [
        float(blurred_loss(-(0.1 * (torch.arange(1024.0) - c)[None] ** 2), target, 4.0))
        for c in (500, 510, 600)
    ]
    assert losses[0] < losses[1] < losses[2]


def test_stitching_is_an_average() -> None:
    for tiling in ((1, 2), (2, 2), (2, 3), (4, 1)):
        weights = stitch_weights(tiling, 7, 1)
        assert weights.shape == (49, tiling[0] * tiling[1] * 49)
        assert torch.allclose(weights.sum(1), torch.ones(49), atol=1e-5)


def test_orthogonalised_matrices_have_even_spectra() -> None:
    made = orthogonalise(torch.randn(2, 24, 48, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(made.float())
    assert values.min() > 0.4 and values.max() < 1.4


def test_matching_of_finds() -> None:
    left, right = (0.0, 0.0, 0.2, 0.2), (0.5, 0.5, 0.9, 0.9)
    assert overlap(left, right) == 0.0
    assert match_boxes([right], [left, right]) == [0.0, 1.0]
    assert match_boxes([right, right], [right]) == [1.0]
    assert count_points_inside([(0.1, 0.1), (0.11, 0.1), (0.7, 0.7)], [left, right]) == 2


def test_a_run_begins_at_a_share_of_its_schedule(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"begin is 1; .* such as 0.65"):
        run(tmp_path, begin=1.0)
    assert not list(tmp_path.iterdir())
