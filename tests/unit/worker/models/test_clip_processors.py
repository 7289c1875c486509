"""The second implementation that `test_clips` holds frames to, beside transformers' video processors, where torchvision is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.clips import in_words
from tests.unit.worker.models import clip_oracle as clips
from tests.unit.worker.models.free_oracle import FREE, PATCH
from tests.unit.worker.models.picture_oracle import FAMILIES, Oracle

pytestmark = pytest.mark.slow
FILMS = (
    clips.film(3, 61, 40, 20, 2.0),
    clips.film(4, 40, 61, 30, 0.3),
    clips.film(5, 150, 33, 50, 1.0),
    clips.film(2, 300, 301, 60, 24.0),
)


def smolvlm(tokenizer: Any) -> Any:
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.smolvlm import processing_smolvlm
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    processing_smolvlm.num2words = in_words
    tokenizer.image_token = "<image>"
    video = SmolVLMVideoProcessor(size={"longest_edge": 128}, max_image_size={"longest_edge": 32})
    stills = Idefics3ImageProcessorPil()
    return processing_smolvlm.SmolVLMProcessor(stills, tokenizer, video, image_seq_len=4)


def internvl(tokenizer: Any) -> Any:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.internvl.processing_internvl import InternVLProcessor
    from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

    marks = {
        "start_image": "<img>",
        "end_image": "</img>",
        "context_image": "<IMG_CONTEXT>",
        "video": "<video>",
    }
    for name, text in marks.items():
        setattr(tokenizer, f"{name}_token", text)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(text))
    video = InternVLVideoProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    return InternVLProcessor(GotOcr2ImageProcessorPil(), tokenizer, video, image_seq_length=4)


def qwen3_vl(tokenizer: Any) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    size = {"shortest_edge": 256, "longest_edge": 4096}
    video = Qwen3VLVideoProcessor(patch_size=PATCH, size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return Qwen3VLProcessor(Qwen2VLImageProcessorPil(patch_size=PATCH), tokenizer, video)


def qwen25_vl(tokenizer: Any) -> Any:
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    size = {"shortest_edge": 256, "longest_edge": 4096}
    video = Qwen2VLVideoProcessor(patch_size=PATCH, size=size)
    return Qwen2_5_VLProcessor(Qwen2VLImageProcessorPil(patch_size=PATCH), tokenizer, video)


KINDS: dict[str, tuple[Callable[[Path], Oracle], Callable[[Any], Any]]] = {
    "smolvlm": (FAMILIES["smolvlm"], smolvlm),
    "internvl": (FAMILIES["internvl"], internvl),
    "qwen3_vl": (FREE["qwen3_vl"], qwen3_vl),
    "qwen2_5_vl": (FREE["qwen2_5_vl"], qwen25_vl),
}


@pytest.mark.parametrize("family", KINDS)
def test_ids_are_equal_and_pixels_within_a_level(family: str, tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="transformers' video processors want torchvision")
    make, processor_of = KINDS[family]
    oracle = make(tmp_path)
    processor = processor_of(oracle.tokenizer)
    for one in FILMS:
        turns: list[clips.FilmTurn] = [("user", [one, "What?"])]
        ours = clips.expected(family, oracle, turns)
        num = len(one.frames)
        facts = {"total_num_frames": num, "fps": one.fps, "frames_indices": list(range(num))}
        theirs = processor(
            text=[clips.rendered(oracle, turns)],
            videos=[np.stack([np.asarray(frame) for frame in one.frames])],
            video_metadata=[facts],
            do_sample_frames=False,
            return_tensors="pt",
            add_special_tokens=False,
        )
        begin, end = "<|vision_start|>", "<|vision_end|>"
        text = oracle.tokenizer.decode(theirs["input_ids"][0])
        if family == "qwen3_vl":  # which leaves the template's marks around all of it, see docs/models.md
            assert f"{begin}<" in text and end + end in text
            text = text.replace(f"{begin}<", "<", 1).replace(end + end, end, 1)
        assert text == oracle.tokenizer.decode(ours.ids)
        pixels = theirs["pixel_values_videos" if "pixel_values_videos" in theirs else "pixel_values"]
        assert ours.pixels is not None
        # Pillow and torchvision round otherwise by a level of 255.
        level = 1.1 / 255 / min(processor.video_processor.image_std)
        assert (pixels.reshape(ours.pixels.shape) - ours.pixels).abs().max() < level
        if "second_per_grid_ts" in ours.inputs:
            found = [float(value) for value in theirs["second_per_grid_ts"]]
            assert found == pytest.approx(ours.inputs["second_per_grid_ts"])
