"""Owns `degas bench first-picture`: time to the first token of a question about a picture, beside transformers. Main thread.

Random weights of SmolVLM-256M's shape (or a tiny one, for a smoke run), one process, the same compute threads, turn about.
Each turn has a picture that neither side has seen; Degas is then asked about it once more, when features and pages are kept.
"""

from __future__ import annotations

import hashlib
import io
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gateway.confined.image_process import Job, prepare
from gateway.confined.pictures.decode import start
from loadtest.peers.degas_peer import DegasSide
from loadtest.tables import Figures
from shared.pictures import num_tokens
from shared.protocol import ImageInput, ImageSpec

SHAPES: dict[str, dict[str, Any]] = {
    "smolvlm-256m": {
        "text": {
            "vocab_size": 49280,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rope_theta": 100000.0,
        },
        "vision": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
        "scale_factor": 4,
        "longest_edge": 2048,
        "side": 512,
        "text_tokens": 77,
    },
    "tiny": {
        "text": {
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
        },
        "vision": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        "scale_factor": 2,
        "longest_edge": 64,
        "side": 48,
        "text_tokens": 9,
    },
}
IMAGE_ID, BEFORE = 3, 5  # the picture's place: behind so many ids


@dataclass(frozen=True, slots=True)
class FirstPicture:
    """Medians over all turns, milliseconds; `ratio` the median of a turn's two first tokens, preparing included."""

    shape: str
    dtype: str
    threads: int
    crops: int
    tokens: int  # of the prompt
    prepare_ms: float
    first_ms: float
    again_ms: float  # the same picture, another question
    their_prepare_ms: float
    their_first_ms: float
    ratio: float
    again_gain: float
    same_token: float  # share of turns in which both chose the same

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            name: round(value, 3) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


def write_model(folder: Path, shape: str, dtype: torch.dtype) -> Any:
    """A random checkpoint with its picture processor's settings; transformers' model of it. Raises ValueError."""
    import transformers

    if shape not in SHAPES:
        raise ValueError(f"{shape} is none of {', '.join(SHAPES)}")
    sizes = SHAPES[shape]
    torch.manual_seed(5)
    config = transformers.SmolVLMConfig(
        text_config={"model_type": "llama", "tie_word_embeddings": True, **sizes["text"]},
        vision_config=sizes["vision"],
        scale_factor=sizes["scale_factor"],
        image_token_id=IMAGE_ID,
    )
    model = transformers.SmolVLMForConditionalGeneration(config).to(dtype).eval()
    model.save_pretrained(folder)
    side = sizes["vision"]["image_size"]
    settings = {
        "size": {"longest_edge": sizes["longest_edge"]},
        "max_image_size": {"longest_edge": side},
        "do_image_splitting": True,
        "resample": 1,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def measure(shape: str, dtype: torch.dtype, threads: int, rounds: int) -> FirstPicture:
    """Both sides in turn, `rounds` times after a turn that warms up. Raises ValueError for a shape that it does not know."""
    sizes = SHAPES.get(shape) or {}
    with tempfile.TemporaryDirectory(prefix="degas-bench-") as name, torch.inference_mode():
        theirs = write_model(Path(name), shape, dtype)
        ours = DegasSide(Path(name), dtype, 1, 2048, 2048, threads=threads)
    processor = _processor(sizes)
    spec = ours.model.card.image
    assert spec is not None
    start()
    turns = []
    for turn in range(rounds + 1):
        rng = np.random.default_rng(turn)
        data = _photograph(rng, sizes["side"])
        ids = rng.integers(8, sizes["text"]["vocab_size"], (2, sizes["text_tokens"])).tolist()
        ids[1][:BEFORE] = ids[0][:BEFORE]
        turns.append(_turn(ours, theirs, processor, spec, data, ids, threads))
    turns = turns[1:]

    def middle(key: str) -> float:
        return 1e3 * statistics.median(turn[key] for turn in turns)

    return FirstPicture(
        shape,
        str(dtype).removeprefix("torch."),
        threads,
        int(turns[0]["crops"]),
        int(turns[0]["tokens"]),
        middle("prepare"),
        middle("first"),
        middle("again"),
        middle("their_prepare"),
        middle("their_first"),
        statistics.median(
            (one["their_prepare"] + one["their_first"]) / (one["prepare"] + one["first"]) for one in turns
        ),
        statistics.median(one["first"] / one["again"] for one in turns),
        statistics.mean(one["same"] for one in turns),
    )


def _turn(
    ours: DegasSide,
    theirs: Any,
    processor: Any,
    spec: ImageSpec,
    data: bytes,
    ids: list[list[int]],
    threads: int,
) -> dict[str, float]:
    """Seconds of each part."""
    begin = time.perf_counter()
    answer, frames = prepare(data, Job(spec, 1 << 30, 1))
    prepared = time.perf_counter()
    count = num_tokens(spec, answer.sheets)
    image = ImageInput(answer.sheets, [(BEFORE, count)], hashlib.sha256(b"".join(frames)).digest())
    ours.use_threads()
    token, first_s = ours.first_token(ids[0], [image], frames)
    _, again_s = ours.first_token(ids[1], [image], frames)
    torch.set_num_threads(threads)
    their_begin = time.perf_counter()
    made = processor([[Image.open(io.BytesIO(data)).convert("RGB")]], return_tensors="pt")
    their_prepared = time.perf_counter()
    whole = torch.tensor([[*ids[0][:BEFORE], *[IMAGE_ID] * count, *ids[0][BEFORE:]]])
    with torch.inference_mode():
        out = theirs.generate(
            whole,
            attention_mask=torch.ones_like(whole),
            pixel_values=made["pixel_values"].to(theirs.dtype),
            pixel_attention_mask=made["pixel_attention_mask"],
            do_sample=False,
            max_new_tokens=1,
            pad_token_id=0,
        )
    return {
        "prepare": prepared - begin,
        "first": first_s,
        "again": again_s,
        "their_prepare": their_prepared - their_begin,
        "their_first": time.perf_counter() - their_prepared,
        "crops": sum(sheet.rows * sheet.cols for sheet in answer.sheets),
        "tokens": whole.shape[1],
        "same": float(int(out[0, -1]) == token),
    }


def _processor(sizes: dict[str, Any]) -> Any:
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    return SmolVLMImageProcessorPil(
        size={"longest_edge": sizes["longest_edge"]},
        max_image_size={"longest_edge": sizes["vision"]["image_size"]},
    )


def _photograph(rng: np.random.Generator, side: int) -> bytes:
    """A PNG with coarse and fine detail, another each time."""
    image = Image.new("RGB", (side, side), "grey")
    for across in (4, 24):
        layer = rng.integers(0, 256, (across, across, 3), dtype=np.uint8)
        image = Image.blend(image, Image.fromarray(layer).resize((side, side), Image.Resampling.BICUBIC), 0.5)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def first_picture_table(done: FirstPicture) -> Figures:
    """Both sides, and the second question."""
    title = f"first token, {done.shape}, {done.dtype}, {done.crops} crops, {done.tokens} tokens, threads: {done.threads}"
    table = Figures(
        title,
        ("", "prepare ms", "first token ms", "second question ms"),
        caption=f"transformers takes {done.ratio:.2f}× as long; the second question is {done.again_gain:.1f}× quicker",
        left=("",),
    )
    table.add("degas", f"{done.prepare_ms:.0f}", f"{done.first_ms:.0f}", f"{done.again_ms:.0f}")
    table.add("transformers", f"{done.their_prepare_ms:.0f}", f"{done.their_first_ms:.0f}", "")
    return table
