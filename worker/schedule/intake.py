"""Owns checking a `Submit` and turning it into a `Sequence`. Pure; decode thread.

The gateway has checked the same bounds; a worker trusts no gateway.
"""

from __future__ import annotations

import math

from shared.errors import ErrorCode
from shared.protocol import ImageInput, ImageSpec, ModelCard, Submit, unpack_i32
from worker.constraints.automaton import TokenAutomaton, spatial_tables
from worker.constraints.constraint import Constraint
from worker.constraints.thought_budget import ThoughtBudget
from worker.schedule.refusal import Refusal
from worker.schedule.sequence import IMAGE_TOKEN, Picture, Sequence

MAX_STOP_IDS = 64
MAX_LOGPROBS = 20
MAX_OBJECTS = 150
MAX_MARK_IDS = 32
DEFAULT_OBJECTS = 50


def build_sequence(
    gateway: bytes,
    message: Submit,
    frames: list[bytes],
    card: ModelCard,
    now_s: float,
    compiled: Constraint | None = None,
) -> Sequence:
    """Expand and check one submission. Raises `Refusal` naming the field and a safe value."""
    try:
        prompt = unpack_i32(message.prompt).tolist()
    except ValueError:
        raise Refusal(ErrorCode.INVALID_REQUEST, "prompt is not packed int32", "prompt") from None
    if not prompt:
        raise Refusal(ErrorCode.INVALID_REQUEST, "the prompt is empty; send at least one token", "prompt")
    if min(prompt) < 0 or max(prompt) >= card.vocab_size:
        raise Refusal(ErrorCode.INVALID_REQUEST, f"token ids lie in 0 … {card.vocab_size - 1}", "prompt")
    if not 1 <= message.max_tokens <= card.context_tokens:
        raise Refusal(
            ErrorCode.INVALID_REQUEST, f"max_tokens lies in 1 … {card.context_tokens}", "max_tokens"
        )
    _check_sampling(message, card)
    tokens, pictures = _expand(prompt, message.images, frames, card.image)
    if pictures and message.sampling.num_prompt_logprobs >= 0:
        text = "log-probabilities of a prompt with pictures are not computed"
        raise Refusal(ErrorCode.UNSUPPORTED, text, "num_prompt_logprobs")
    prefix = 0
    if pictures and pictures[0].position <= 1:
        prefix = pictures[0].position + pictures[0].num_tokens
    return Sequence(
        gateway=gateway,
        sequence_id=message.sequence_id,
        request_id=message.request_id,
        tokens=tokens,
        num_prompt=len(tokens),
        max_tokens=message.max_tokens,
        sampling=message.sampling,
        stop_ids=frozenset(message.stop_ids)
        | (frozenset() if message.ignore_eos else frozenset(card.eos_ids)),
        arrived_s=now_s,
        pictures=pictures,
        prefix_tokens=prefix,
        task=message.task,
        constraint=_constraint(message, card, compiled) or _thought_budget(message, card),
        tenant=message.tenant,
        priority=message.priority,
        deadline_s=now_s + message.deadline_s if message.deadline_s > 0 else 0.0,
    )


def _check_sampling(message: Submit, card: ModelCard) -> None:
    s = message.sampling
    checks = (
        ("temperature", s.temperature, 0.0, 100.0),
        ("top_p", s.top_p, 0.0, 1.0),
        ("min_p", s.min_p, 0.0, 1.0),
        ("top_k", s.top_k, 0, 1 << 30),
        ("presence_penalty", s.presence_penalty, -2.0, 2.0),
        ("frequency_penalty", s.frequency_penalty, -2.0, 2.0),
        ("repetition_penalty", s.repetition_penalty, 0.01, 100.0),
        ("num_logprobs", s.num_logprobs, -1, MAX_LOGPROBS),
        ("num_prompt_logprobs", s.num_prompt_logprobs, -1, MAX_LOGPROBS),
        ("min_tokens", s.min_tokens, 0, message.max_tokens),
        ("max_objects", message.max_objects, 0, MAX_OBJECTS),
        ("deadline_s", message.deadline_s, 0.0, 86400.0),
    )
    for name, value, low, high in checks:
        if not (math.isfinite(value) and low <= value <= high):
            raise Refusal(ErrorCode.INVALID_REQUEST, f"{name} is {value}; it lies in {low} … {high}", name)
    ids = (*s.logit_bias, *s.suppress_ids, *message.stop_ids)
    if any(not 0 <= token_id < card.vocab_size for token_id in ids):
        raise Refusal(ErrorCode.INVALID_REQUEST, f"token ids lie in 0 … {card.vocab_size - 1}", "logit_bias")
    if any(not math.isfinite(value) for value in s.logit_bias.values()):
        raise Refusal(ErrorCode.INVALID_REQUEST, "logit_bias values are finite numbers", "logit_bias")
    if len(message.stop_ids) > MAX_STOP_IDS:
        raise Refusal(ErrorCode.INVALID_REQUEST, f"at most {MAX_STOP_IDS} stop ids", "stop_ids")


def _expand(
    prompt: list[int], images: list[ImageInput], frames: list[bytes], spec: ImageSpec | None
) -> tuple[list[int], list[Picture]]:
    if not images:
        return prompt, []
    if spec is None:
        raise Refusal(ErrorCode.UNSUPPORTED, "this model reads text only", "image")
    if len(images) > 1:
        raise Refusal(ErrorCode.UNSUPPORTED, "one picture per request is supported", "image")
    if len(frames) != 2 * len(images):
        raise Refusal(
            ErrorCode.INVALID_REQUEST, f"{len(images)} pictures came with {len(frames)} frames", "image"
        )
    image = images[0]
    margin = 2 * spec.margin_patches * spec.patch_size
    window = spec.crop_size - margin
    if not (image.tiles_h >= 1 and image.tiles_w >= 1 and image.tiles_h * image.tiles_w <= spec.max_crops):
        raise Refusal(
            ErrorCode.INVALID_REQUEST,
            f"tiles {image.tiles_h}×{image.tiles_w} exceed {spec.max_crops}",
            "image",
        )
    height, width = image.tiles_h * window + margin, image.tiles_w * window + margin
    if (image.canvas_height, image.canvas_width) != (height, width):
        raise Refusal(ErrorCode.INVALID_REQUEST, f"the canvas must be {height}×{width} pixels", "image")
    if len(frames[0]) != spec.crop_size**2 * 3 or len(frames[1]) != height * width * 3:
        raise Refusal(ErrorCode.INVALID_REQUEST, "a picture's frame has the wrong size", "image")
    if not 0 <= image.position <= len(prompt):
        raise Refusal(ErrorCode.INVALID_REQUEST, f"the picture's position lies in 0 … {len(prompt)}", "image")
    at = image.position
    tokens = prompt[:at] + [IMAGE_TOKEN] * spec.num_tokens + prompt[at:]
    picture = Picture(
        at, spec.num_tokens, image.tiles_h, image.tiles_w, height, width, image.digest, frames[0], frames[1]
    )
    return tokens, [picture]


def _thought_budget(message: Submit, card: ModelCard) -> ThoughtBudget | None:
    asked = message.thinking
    if asked is None:
        return None
    if message.grammar is not None or message.task != "text":
        raise Refusal(ErrorCode.INVALID_REQUEST, "a constrained answer has no thought", "thinking")
    ids = (*asked.opens, *asked.closes)
    if not asked.closes or len(ids) > MAX_MARK_IDS or any(not 0 <= i < card.vocab_size for i in ids):
        text = f"marks have 1 to {MAX_MARK_IDS} ids in 0 … {card.vocab_size - 1} together"
        raise Refusal(ErrorCode.INVALID_REQUEST, text, "thinking")
    if asked.budget < 0:
        raise Refusal(ErrorCode.INVALID_REQUEST, f"a budget of {asked.budget}; at least 0", "thinking")
    return ThoughtBudget(asked.budget, asked.opens, asked.closes)


def _constraint(message: Submit, card: ModelCard, compiled: Constraint | None) -> Constraint | None:
    if message.grammar is not None:
        if message.task != "text":
            raise Refusal(
                ErrorCode.INVALID_REQUEST, f"{message.task} has a form of its own", "response_format"
            )
        if message.sampling.min_tokens:
            # A complete grammar allows only an end, which min_tokens forbids, so no token could be chosen.
            raise Refusal(
                ErrorCode.INVALID_REQUEST, "min_tokens does not go with structured output", "min_tokens"
            )
        if compiled is None:
            raise Refusal(
                ErrorCode.UNSUPPORTED, "structured output is not available on this worker", "response_format"
            )
        return compiled
    if message.task == "text":
        return None
    if message.task not in ("detect", "point") or message.task not in card.capabilities:
        raise Refusal(
            ErrorCode.UNSUPPORTED, f"task {message.task!r} is not one of {card.capabilities}", "task"
        )
    tables = spatial_tables(
        coord_id=card.coord_id,
        size_id=card.size_id,
        end_id=card.eos_ids[0],
        with_size=message.task == "detect",
        max_objects=message.max_objects or DEFAULT_OBJECTS,
        vocab_size=card.vocab_size,
    )
    return TokenAutomaton(tables)
