"""What the tests of every picture family do with a conversation: its pictures as the device has them, and its answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gateway.api.prompts import Prompt
from tests.unit.worker.models.paged_driver import Driver
from tests.unit.worker.models.picture_oracle import submit_of
from tests.unit.worker.step.test_torch_runner import Harness
from worker.forward import ImageCrops, ImageSheet, PrefillSegment, StepTokens
from worker.models.picture_model import PictureModel
from worker.schedule.sequence import Sequence as Decoded


def images_of(prompt: Prompt) -> list[ImageCrops]:
    """A prompt's pictures as the device has them."""
    return [
        ImageCrops(
            [
                ImageSheet(
                    torch.from_numpy(
                        np.frombuffer(frame, np.uint8).reshape(sheet.height, sheet.width, 3).copy()
                    ),
                    sheet.rows,
                    sheet.cols,
                )
                for sheet, frame in zip(image.spec.sheets, image.frames, strict=True)
            ]
        )
        for image in prompt.images
    ]


def check_answers(
    model: PictureModel,
    prompts: Sequence[Prompt],
    expected: list[list[int]],
    num: int,
    mixed_tokens: int,
    unsure: Sequence[int],
) -> None:
    """`num` tokens for all prompts at once, in chunks of at most `mixed_tokens` beside decode rows, then again from the caches:
    the expected ones. `unsure`: of each prompt, tokens of whole pages that need not come from the cache the second time."""
    harness = Harness(model, depth=2, mixed_tokens=mixed_tokens)
    for again in range(2):
        streams = harness.answer(
            [submit_of(prompt, 10 * again + number, num) for number, prompt in enumerate(prompts)]
        )
        assert [stream.tokens for stream in streams] == expected
        for stream, prompt, fewer in zip(streams, prompts, unsure, strict=True):
            assert stream.finish is not None and stream.finish.prompt_tokens == prompt.num_tokens
            whole = prompt.num_tokens - 1
            assert not again or stream.finish.cached_tokens >= whole // 16 * 16 - fewer


def logits_of(model: PictureModel, seq: Decoded, features: Tensor, cuts: list[int]) -> Tensor:
    """(S, V) logits of a prompt in chunks that end at `cuts`, with the features in their places."""
    dim = 96
    driver = Driver(model)
    ids = torch.tensor(seq.tokens)
    hidden = model.embed(ids.clamp_min(0)).clone()
    hidden[ids < 0] = features[:, :dim]
    taps = torch.zeros(len(ids), features.shape[1] - dim)
    taps[ids < 0] = features[:, dim:]
    states, table = [], torch.arange(1, 500, dtype=torch.int32)
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        index = torch.arange(start, end)
        positions = index
        if seq.rotary is not None:
            positions = torch.from_numpy(seq.rotary[:, start:end].copy()).long()
        tokens = StepTokens(positions, index + 16, None, [PrefillSegment(end - start, start, 0, table)])
        if taps.shape[1]:
            tokens.taps = [(0, taps[start:end])]
        states.append(model.forward(hidden[start:end], tokens, driver.cache))
    return model.logits(torch.cat(states))
