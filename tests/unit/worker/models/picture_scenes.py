"""What the tests of every picture family do with a conversation: its pictures as the device has them, and its answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gateway.api.prompts import Prompt
from tests.unit.worker.models.picture_oracle import submit_of
from tests.unit.worker.step.test_torch_runner import Harness
from worker.forward import ImageCrops, ImageSheet
from worker.models.picture_model import PictureModel


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
