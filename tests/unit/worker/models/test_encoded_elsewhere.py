"""Pictures of every kind of spec, encoded by another process than decodes: the same tokens as from pixels, in chunks too."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from shared.protocol import Encode, Submit
from tests.unit.worker.loop.simulation import EPOCH
from tests.unit.worker.models import picture_oracle as pictures
from tests.unit.worker.models.dense_oracle import load
from tests.unit.worker.models.free_oracle import qwen3_vl
from tests.unit.worker.models.picture_oracle import FAMILIES, conversation
from tests.unit.worker.step.test_torch_runner import Harness
from worker.device.cpu import CpuDevice
from worker.schedule.picture_intake import build_picture
from worker.step.picture_encoder import TorchEncoder

pytestmark = pytest.mark.slow

KINDS = {
    "crop by crop": FAMILIES["smolvlm"],
    "blocks that attend both ways": FAMILIES["gemma3"],
    "of any size, with taps": qwen3_vl,
}
NAMES = ("two", "one", "text")


def elsewhere(encoder: TorchEncoder, submit: Submit, frames: list[bytes]) -> tuple[Submit, list[bytes]]:
    """A request as it is when its last picture was encoded and the others were not."""
    if not submit.images:
        return submit, frames
    last = len(submit.images) - 1
    sheets = len(submit.images[last].sheets)
    asked = Encode(EPOCH, 1, submit.images[last])
    picture = build_picture(asked, frames[-sheets:], encoder.card)
    data = encoder.encode("", picture, lambda: None)
    changed = msgspec.structs.replace(submit, encoded=[last], encoded_as=encoder.format)
    return changed, [*frames[:-sheets], data]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_from_pixels(kind: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    with torch.inference_mode():
        KINDS[kind](tmp_path)
        model = load(tmp_path)
    served = pictures.announced(model.card, tmp_path)
    prompts = [pictures.compose(served, conversation(name)) for name in NAMES]
    submits = [pictures.submit_of(prompt, number, 12) for number, prompt in enumerate(prompts)]
    wanted = [stream.tokens for stream in Harness(model, depth=2).answer(submits)]
    encoder = TorchEncoder(model, CpuDevice(), weights="w", feature_bytes=1 << 20, step_crops=4)
    given = [elsewhere(encoder, *submit) for submit in submits]
    for mixed_tokens in (1600, 24):
        harness = Harness(model, depth=2, mixed_tokens=mixed_tokens, format=encoder.format)
        assert [stream.tokens for stream in harness.answer(given)] == wanted
        assert harness.runner.forward.embedding._features.bytes_given_total > 0
