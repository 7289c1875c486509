"""Owns Gemma 3 with pictures (4B and up): SigLIP, averaged squares, one product, and blocks that attend both ways. Decode thread."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.pictures import max_crops
from shared.protocol import ImageLayout, ImageSpec, OneCrop, PanAndScan
from worker.formats.json_files import read_object
from worker.formats.source import Source, Target
from worker.models.families.gemma import read_gemma3
from worker.models.layers import RmsNorm
from worker.models.linear import PackedLinear, Take
from worker.models.picture_model import PictureParts, Project, picture_family, section, text_settings
from worker.models.picture_plan import MAX_IMAGES, Preprocessor, read_preprocessor
from worker.models.settings import Settings
from worker.models.vision_tower import Tower, TowerConfig, read_tower, take_siglip, tokens_of

# What the classes of transformers have where a folder says nothing, as released folders mostly do.
_TEXT: dict[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}
_VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
}
_PROCESSOR: dict[str, Any] = {
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def rename(stored: str) -> Target | None:
    """The decoder's tensors under its own names, from the hub's spelling and from transformers' newer one."""
    name = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", stored)
    name = name.replace("model.lm_head.", "lm_head.")
    return Target(
        re.sub(r"^(model\.)?(vision_tower\.)(vision_model\.)?", "vision.", name).replace(
            "model.multi_", "multi_"
        )
    )


def read(settings: Settings, source: Source) -> PictureParts:
    """See `PictureParts`. Raises CheckpointError."""
    text = text_settings(settings, _TEXT)
    processor = read_preprocessor(source, _PROCESSOR)
    vision = section(settings, "vision_config", _VISION)
    if vision.flag("vision_use_head"):
        raise vision.fault("'vision_use_head' of the vision tower is not supported")
    tower = read_tower(vision, processor.mean, processor.std)
    processor.check_side("size", tower.crop_size)
    side = round(settings.size("mm_tokens_per_image", 256) ** 0.5)
    factor = tower.grid // side
    if side < 2 or side * factor != tower.grid:
        raise settings.fault(f"'mm_tokens_per_image' does not divide {tower.grid} × {tower.grid} patches")
    spec = ImageSpec(
        tower.crop_size,
        tokens_of(settings, tower, factor),
        _rule(processor),
        processor.resample,
        _layout(source),
        attends="block",
        max_images=MAX_IMAGES,
    )
    sizes = read_gemma3(text)
    return PictureParts(text, sizes, spec, rename, partial(_build, tower, factor, sizes.dim, max_crops(spec)))


def _rule(processor: Preprocessor) -> OneCrop | PanAndScan:
    settings = processor.settings
    if not settings.flag("do_pan_and_scan"):
        return OneCrop()
    return PanAndScan(
        settings.size("pan_and_scan_min_crop_size"),
        settings.size("pan_and_scan_max_num_crops"),
        settings.above_0("pan_and_scan_min_ratio_to_activate"),
    )


def _layout(source: Source) -> ImageLayout:
    named = read_object(source.path / "tokenizer_config.json")
    begin = str(named.get("boi_token") or "<start_of_image>")
    end = str(named.get("eoi_token") or "<end_of_image>")
    run = str(named.get("image_token") or "<image_soft_token>")
    block = f"\n\n{begin}{run}{end}\n\n"
    return ImageLayout(
        placeholder=begin,
        run=run,
        whole=block,
        overview=f"Here is the original image {block} and here are some crops to help you see better ",
        tile=block,
        tile_gap=" ",
    )


def _build(config: TowerConfig, factor: int, dim: int, most: int, take: Take) -> tuple[Tower, Project]:
    table = take("vision.embeddings.position_embedding.weight", config.num_patches, config.dim)
    tower = take_siglip(take, "vision", config, most, table)
    name = "multi_modal_projector"
    # Kept in fp32: 1 + w has more digits than bf16 does.
    weight = take(f"{name}.mm_soft_emb_norm.weight", config.dim, dtype=torch.float32) + 1.0
    norm = RmsNorm(weight, config.eps)
    product = PackedLinear(take(f"{name}.mm_input_projection_weight", config.dim, dim).t().contiguous())

    def project(features: Tensor) -> Tensor:
        sheet = features.transpose(1, 2).unflatten(2, (config.grid, config.grid))
        pooled = F.avg_pool2d(sheet, factor).flatten(2).transpose(1, 2)
        return product(norm(pooled))

    return tower, project


GEMMA3_PICTURES = picture_family(
    "gemma3", "Gemma 3 4B and larger (pictures)", "Gemma3ForConditionalGeneration", read
)
