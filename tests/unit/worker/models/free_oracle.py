"""Owns tiny random checkpoints of families whose pictures have any size, beside transformers' own processors and models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

from tests.unit.worker.models.picture_oracle import TEXT, Expected, Oracle, Turn, make_tokenizer, stir

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for item in m.content %}{% if item.type == 'image' or 'image_url' in item %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif item.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ item.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
PATCH = 4


@dataclass(frozen=True, slots=True)
class FreeOracle(Oracle):
    """A folder's model in transformers, whose pixels are patches (N, C·frames·P·P) and whose positions have three axes."""

    @property
    def video_id(self) -> int:
        """Stands at each position of a video."""
        return int(self.tokenizer.convert_tokens_to_ids("<|video_pad|>"))

    def expected(self, turns: Sequence[Turn]) -> Expected:
        """See `Oracle`: pixels stay as the processor has them."""
        messages = [
            {
                "role": role,
                "content": [
                    {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                    for part in parts
                ],
            }
            for role, parts in turns
        ]
        images = [part for _, parts in turns for part in parts if not isinstance(part, str)]
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
        inputs: dict[str, Any] = {}
        if images:
            text, inputs = self.process(text, images)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return Expected(ids, inputs.get("pixel_values"), inputs)

    def features(self, inputs: dict[str, Any]) -> Tensor:
        """(positions, (1 + taps) · D) of all pictures of a conversation, in order."""
        found = self.model.get_image_features(**inputs, return_dict=True)
        taps = getattr(found, "deepstack_features", None) or []
        parts = [found.pooler_output, *taps]
        return torch.cat(
            [part if isinstance(part, Tensor) else torch.cat(list(part)) for part in parts], dim=1
        )

    def _types(self, ids: Tensor) -> dict[str, Tensor]:
        self.model.model.rope_deltas = None  # which it keeps from one call to the next
        return {"mm_token_type_ids": (ids == self.image_id).int() + 2 * (ids == self.video_id).int()}


def _oracle(
    folder: Path, kind: str, text: dict[str, Any], vision: dict[str, Any], **processing: Any
) -> FreeOracle:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = make_tokenizer(folder, MARKS)
    ids = [tokenizer.convert_tokens_to_ids(mark) for mark in MARKS]
    processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH, size={"shortest_edge": 256, "longest_edge": 4096}, **processing
    )
    torch.manual_seed(14)
    config = getattr(transformers, f"{kind}Config")(
        text_config={"vocab_size": len(tokenizer), **TEXT, "head_dim": 16, **text},
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": PATCH,
            "out_hidden_size": TEXT["hidden_size"],
            **vision,
        },
        image_token_id=ids[4],
        video_token_id=ids[5],
        vision_start_token_id=ids[2],
        vision_end_token_id=ids[3],
    )
    model = stir(getattr(transformers, f"{kind}ForConditionalGeneration")(config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "visual" in name:
                weight.uniform_(0.5, 1.5) if "norm" in name and "weight" in name else weight.normal_(std=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)

    def process(text: str, images: list[Image.Image]) -> tuple[str, dict[str, Any]]:
        made = processor(images, return_tensors="pt")
        pieces = text.split(MARKS[4])
        for number, grid in enumerate(made["image_grid_thw"]):
            pieces[number] += MARKS[4] * int(grid.prod() // 4)
        return "".join(pieces), {name: made[name] for name in ("pixel_values", "image_grid_thw")}

    return FreeOracle(model, tokenizer, TEMPLATE, ids[4], process)


def _rope(**settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **settings}}


def qwen3_vl(folder: Path) -> FreeOracle:
    return _oracle(
        folder,
        "Qwen3VL",
        _rope(mrope_section=[4, 2, 2], mrope_interleaved=True),
        {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def qwen25_vl(folder: Path) -> FreeOracle:
    return _oracle(
        folder,
        "Qwen2_5_VL",
        _rope(mrope_section=[2, 3, 3]),
        {"window_size": 3 * 2 * PATCH, "fullatt_block_indexes": [1]},
    )


def _older(folder: Path, make: Callable[[Path], FreeOracle], kind: str) -> FreeOracle:
    """A folder as the hub has it: its config.json's spelling, and the processor's bounds under their older names."""
    oracle = make(folder)
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["torch_dtype"] = text.pop("dtype", "float32")
    config["torch_dtype"] = config.pop("dtype", "float32")
    config["vision_config"]["model_type"] = kind
    config["vision_config"].pop("rope_parameters", None)
    if kind == "qwen2_5_vl":
        text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        text.pop("layer_types", None)
        text["sliding_window"] = 32768
        del config["text_config"]
        config = {**text, **config, "model_type": kind}
    else:
        text["rope_scaling"] = rope
    (folder / "config.json").write_text(json.dumps(config))
    prepares = folder / "preprocessor_config.json"
    values = json.loads(prepares.read_text())
    size = values.pop("size")
    values |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    prepares.write_text(json.dumps(values))
    return oracle


FREE: dict[str, Callable[[Path], FreeOracle]] = {
    "qwen3_vl": qwen3_vl,
    "qwen2_5_vl": qwen25_vl,
    "qwen3_vl older": lambda folder: _older(folder, qwen3_vl, "qwen3_vl"),
    "qwen2_5_vl older": lambda folder: _older(folder, qwen25_vl, "qwen2_5_vl"),
}
