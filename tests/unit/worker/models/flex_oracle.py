"""Owns tiny random LFM2-VL checkpoints beside transformers' own model, and a second, plain preparation of their pictures.

transformers' processor wants torchvision, which is no dependency here. What it does to a picture is written down once more; where
torchvision can be imported, a test holds that against the processor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from tests.unit.worker.models.free_oracle import FreeOracle
from tests.unit.worker.models.picture_oracle import TEXT, make_tokenizer, stir

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for item in m.content %}{% if item.type == 'image' or 'image_url' in item %}<image>{% else %}{{ item.text }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ["<|im_start|>", "<|im_end|>", "<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"]
PATCH, MERGE, TILE = 4, 2, 64
PROCESSOR: dict[str, Any] = {
    "image_processor_type": "Lfm2VlImageProcessorFast",
    "do_image_splitting": True,
    "downsample_factor": MERGE,
    "encoder_patch_size": PATCH,
    "image_mean": [0.5, 0.4, 0.6],
    "image_std": [0.5, 0.5, 0.4],
    "max_image_tokens": 16,
    "max_pixels_tolerance": 2.0,
    "max_tiles": 6,
    "min_image_tokens": 4,
    "min_tiles": 2,
    "resample": 2,
    "size": {"height": TILE, "width": TILE},
    "tile_size": TILE,
    "use_thumbnail": True,
}


def in_units(length: int, unit: int) -> int:
    return round(length / unit) * unit


def free_size(width: int, height: int, said: dict[str, Any]) -> tuple[int, int]:
    """(width, height) of a crop that keeps the picture's proportions."""
    unit = said["encoder_patch_size"] * said["downsample_factor"]
    least, most = said["min_image_tokens"] * unit**2, said["max_image_tokens"] * unit**2
    wide, high = max(unit, in_units(width, unit)), max(unit, in_units(height, unit))
    if wide * high > most:
        by = math.sqrt(width * height / most)
        wide, high = (max(unit, math.floor(side / by / unit) * unit) for side in (width, height))
    if wide * high < least:
        by = math.sqrt(least / (height * width))
        return math.ceil(width * by / unit) * unit, math.ceil(height * by / unit) * unit
    return wide, high


def grid_of(width: int, height: int, said: dict[str, Any]) -> tuple[int, int]:
    """(columns, rows) of the tiles of a picture; (1, 1) of one that is not cut."""
    patch, unit = said["encoder_patch_size"], said["encoder_patch_size"] * said["downsample_factor"]
    area = max(patch, in_units(width, unit)) * max(patch, in_units(height, unit))
    is_large = area > said["max_image_tokens"] * unit**2 * said["max_pixels_tolerance"]
    if not said["do_image_splitting"] or not is_large:
        return 1, 1
    least, most = said["min_tiles"], said["max_tiles"]
    grids = [
        (cols, rows)
        for num in range(least, most + 1)
        for cols in range(1, num + 1)
        for rows in range(1, num + 1)
        if least <= cols * rows <= most
    ]
    best, best_off = (1, 1), math.inf
    for grid in sorted(set(grids), key=lambda grid: grid[0] * grid[1]):
        off = abs(width / height - grid[0] / grid[1])
        if off < best_off or (
            off == best_off and width * height > said["tile_size"] ** 2 * grid[0] * grid[1] / 2
        ):
            best, best_off = grid, off
    return best


def crops_of(image: Image.Image, said: dict[str, Any]) -> tuple[tuple[int, int], tuple[int, int], list[Any]]:
    """The grid, the (width, height) of the crop of the whole, and all crops as uint8 arrays."""
    grid, whole = grid_of(*image.size, said), free_size(*image.size, said)
    tile, crops = said["tile_size"], []
    if grid != (1, 1):
        canvas = np.asarray(image.resize((grid[0] * tile, grid[1] * tile), Image.Resampling.BILINEAR))
        crops = [
            canvas[row * tile : (row + 1) * tile, col * tile : (col + 1) * tile]
            for row in range(grid[1])
            for col in range(grid[0])
        ]
    if grid == (1, 1) or said["use_thumbnail"]:
        crops.append(np.asarray(image.resize(whole, Image.Resampling.BILINEAR)))
    return grid, whole, crops


def patches_of(crop: Any, said: dict[str, Any]) -> Tensor:
    """(patches, P·P·3) normalised, row by row, channel last."""
    patch = said["encoder_patch_size"]
    pixels = (
        torch.from_numpy(np.array(crop)).float() / 255 - torch.tensor(said["image_mean"])
    ) / torch.tensor(said["image_std"])
    high, wide = pixels.shape[0] // patch, pixels.shape[1] // patch
    return pixels.view(high, patch, wide, patch, 3).transpose(1, 2).reshape(high * wide, -1)


def batch_of(images: Sequence[Image.Image], said: dict[str, Any]) -> dict[str, Tensor]:
    """The model's inputs: all crops of all pictures, padded to the most patches that one may have."""
    patch = said["encoder_patch_size"]
    most = said["max_image_tokens"] * said["downsample_factor"] ** 2
    if said["do_image_splitting"]:
        most = max(most, (said["tile_size"] // patch) ** 2)
    values, masks, shapes = [], [], []
    for image in images:
        for crop in crops_of(image, said)[2]:
            own = patches_of(crop, said)
            values.append(torch.nn.functional.pad(own, (0, 0, 0, most - len(own))))
            masks.append((torch.arange(most) < len(own)).int())
            shapes.append([crop.shape[0] // patch, crop.shape[1] // patch])
    return {
        "pixel_values": torch.stack(values),
        "pixel_attention_mask": torch.stack(masks),
        "spatial_shapes": torch.tensor(shapes),
    }


def text_of(image: Image.Image, said: dict[str, Any]) -> str:
    """What stands for a picture, by transformers' own code."""
    from transformers.models.lfm2_vl.processing_lfm2_vl import Lfm2VlProcessor

    names = dict(zip(("image", "image_start", "image_end", "image_thumbnail"), MARKS[2:], strict=True))
    fake = SimpleNamespace(**{f"{name}_token": mark for name, mark in names.items()})
    grid, whole, _ = crops_of(image, said)
    unit = said["encoder_patch_size"] * said["downsample_factor"]
    tokens = whole[0] // unit * (whole[1] // unit)
    made: str = Lfm2VlProcessor._build_image_tokens(
        fake, grid[1], grid[0], (said["tile_size"] // unit) ** 2, tokens, said["use_thumbnail"], True
    )
    return made


class FlexOracle(FreeOracle):
    """As `FreeOracle`, with positions of one axis."""

    def _types(self, ids: Tensor) -> dict[str, Tensor]:
        return {}


def lfm2_vl(folder: Path, text: dict[str, Any] | None = None, **changes: Any) -> FlexOracle:
    processing = {name: changes.pop(name, value) for name, value in PROCESSOR.items()}
    tiles = [f"<|img_row_{row}_col_{col}|>" for row in range(1, 7) for col in range(1, 7)]
    tokenizer = make_tokenizer(folder, [*MARKS, *tiles])
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(21)
    config = transformers.Lfm2VlConfig(
        text_config={
            "vocab_size": len(tokenizer),
            **TEXT,
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
            **(text or {}),
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": PATCH,
            "num_patches": 36,
            "vision_use_head": False,
        },
        image_token_id=image_id,
        downsample_factor=MERGE,
        projector_hidden_size=40,
        **changes,
    )
    model = stir(transformers.Lfm2VlForConditionalGeneration(config))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processing))
    (folder / "chat_template.jinja").write_text(TEMPLATE)

    def process(prompt: str, images: list[Image.Image]) -> tuple[str, dict[str, Any]]:
        pieces = prompt.split("<image>")
        for number, image in enumerate(images):
            pieces[number] += text_of(image, processing)
        return "".join(pieces), batch_of(images, processing)

    return FlexOracle(model, tokenizer, TEMPLATE, image_id, process)


FLEX: dict[str, Callable[[Path], FlexOracle]] = {
    "lfm2_vl": lfm2_vl,
    "lfm2_vl no thumbnail": lambda folder: lfm2_vl(folder, use_thumbnail=False),
    "lfm2_vl one crop": lambda folder: lfm2_vl(
        folder, do_image_splitting=False, projector_use_layernorm=False, projector_bias=False
    ),
    "lfm2_vl whole beyond tiles": lambda folder: lfm2_vl(folder, max_image_tokens=70, min_image_tokens=9),
}
