"""Owns the model card of a Moondream checkpoint: what it can do, and its prompts as token ids. Decode thread."""

from __future__ import annotations

from pathlib import Path

from shared.protocol import ImageSpec, ModelCard, OverlappingTiles
from worker.formats.source import CheckpointError, Source
from worker.models.moondream_config import MoondreamConfig, TokenizerConfig
from worker.models.picture_plan import MAX_IMAGES

FAMILY, FAMILY_3 = "moondream", "moondream3"
LEAST_QUESTION = 32  # tokens of a question and its answer


def make_card(config: MoondreamConfig, source: Source) -> ModelCard:
    """What gateways are told. The optional `degas` object of config.json names the model.

    Raises CheckpointError when a template is not a list of ids.
    """
    file = source.settings_file
    described = source.config.get("degas") or {}
    if not isinstance(described, dict):
        raise CheckpointError("'degas' is not an object", file=file)
    vision, ids = config.vision, config.tokenizer
    templates = _flatten_templates(ids, file, once=config.text.moe is not None)
    tasks = {
        "query": "query_prefix",
        "caption": "caption_normal",
        "detect": "detect_prefix",
        "point": "point_prefix",
        "segment": "segment_prefix",
    }
    capabilities = [task for task, key in tasks.items() if key in templates]
    return ModelCard(
        model_id=str(described.get("model_id") or source.model_id),
        family=FAMILY_3 if config.text.moe else FAMILY,
        context_tokens=config.text.max_context,
        vocab_size=config.text.vocab_size,
        bos_id=ids.bos_id,
        eos_ids=[ids.eos_id],
        created=source.created,
        image=ImageSpec(
            crop_size=vision.crop_size,
            crop_tokens=vision.num_tokens,
            rule=OverlappingTiles(vision.enc_patch_size, vision.overlap_margin, vision.max_crops),
            attends="prefix",
            max_images=max_images(config),
        ),
        capabilities=(["chat"] if "query" in capabilities else []) + capabilities,
        templates=templates,
        suppress_ids=[ids.answer_id],
        description=str(described.get("description") or ""),
        coord_id=ids.coord_id,
        size_id=ids.size_id,
    )


def max_images(config: MoondreamConfig) -> int:
    """How many pictures a conversation may have: as many as leave room for a question, at least one."""
    room = config.text.max_context - 1 - LEAST_QUESTION
    return max(1, min(MAX_IMAGES, room // config.vision.num_tokens))


def _flatten_templates(ids: TokenizerConfig, file: Path, *, once: bool) -> dict[str, list[int]]:
    """The prompts' fixed parts as they follow BOS and the picture, by the names of `ModelCard.templates`. `once`: see `_opening`."""
    nested = ids.templates
    flat: dict[str, list[int]] = {}
    for task in ("caption", "query", "detect", "point", "segment"):
        for part, tokens in (nested.get(task) or {}).items():
            if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
                raise CheckpointError(f"template {task}.{part} is not a list of token ids", file=file)
            flat[f"{task}_{part}"] = list(tokens)
    opening = _opening(flat, ids.thinking_id, once=once)
    if opening is not None:
        flat["query_suffix"], flat["reasoning_suffix"], flat["reasoning_end"] = opening
        flat["reasoning_suppress"] = [ids.eos_id, ids.size_id]
        flat["reasoning_close"] = [ids.answer_id]
        flat["reasoning_cuts"] = [ids.start_ground_points_id, ids.end_ground_id]
    return flat


def _opening(
    flat: dict[str, list[int]], thinking_id: int, *, once: bool
) -> tuple[list[int], list[int], list[int]] | None:
    """What opens an answer, a thought, and the answer behind a thought; takes the parts it is made of out of `flat`. None for a
    model that answers no questions.

    Moondream 2 was trained with the question's suffix twice, so that one stands before the thought's id, and one more between
    thought and answer. Moondream 3 has it `once`; its makers' engine spells the three by themselves.
    """
    suffix, answer = flat.pop("query_suffix", None), flat.pop("query_answer_prefix", None)
    thought = flat.pop("query_reasoning_prefix", [thinking_id])
    end = flat.pop("query_post_reasoning_prefix", [])
    if answer is not None:
        return answer, thought, end
    if suffix is None:
        return None
    return (suffix, [thinking_id], []) if once else (suffix + suffix, [*suffix, thinking_id], suffix)
