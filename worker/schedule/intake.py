"""Owns checking a `Submit` and turning it into a `Sequence`. Pure; decode thread.

The gateway has checked the same bounds; a worker trusts no gateway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Sequence_

from shared.errors import ErrorCode
from shared.pictures import check_bounds
from shared.protocol import FeatureFormat, ImageSpec, ModelCard, Submit, unpack_i32
from worker.constraints.automaton import TokenAutomaton, spatial_tables
from worker.constraints.constraint import Constraint
from worker.constraints.reasoning import reasoning_tables
from worker.constraints.thought_budget import ThoughtBudget
from worker.schedule.picture_intake import check_continued, check_encoded, check_picture, picture_of
from worker.schedule.refusal import Refusal
from worker.schedule.rotary_places import prompt_places
from worker.schedule.sequence import IMAGE_TOKEN, Block, Picture, Run, Sequence, Value

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
    format: FeatureFormat | None = None,
) -> Sequence:
    """Expand and check one submission. Raises `Refusal` naming the field and a safe value.

    `format` is that of encoded pictures which this worker takes; None: it takes none.
    """
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
    check_encoded(message, format)
    tokens, pictures = _expand(prompt, message, frames, card.image)
    values = _values(message, prompt, len(tokens), card)
    if pictures and message.sampling.num_prompt_logprobs >= 0:
        text = "log-probabilities of a prompt with pictures are not computed"
        raise Refusal(ErrorCode.UNSUPPORTED, text, "num_prompt_logprobs")
    rotary, rotary_shift = None, 0
    if pictures and card.image is not None and card.image.position_axes > 1:
        check_continued(pictures, card.context_tokens)
        rotary, rotary_shift = prompt_places(len(tokens), pictures)
        if len(tokens) + rotary_shift + message.max_tokens > card.context_tokens and rotary_shift > 0:
            room = card.context_tokens - len(tokens) - rotary_shift
            text = (
                f"a video's time reaches position {len(tokens) + rotary_shift} of {card.context_tokens}, and the answer goes on there: "
                + (f"max_tokens may be at most {room}" if room > 0 else "send frames of a shorter time")
            )
            raise Refusal(ErrorCode.CONTEXT_LENGTH_EXCEEDED, text, "max_tokens")
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
        blocks=blocks_of(card.image, pictures),
        rotary=rotary,
        rotary_shift=rotary_shift,
        task=message.task,
        values=values,
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
    prompt: list[int], message: Submit, frames: list[bytes], spec: ImageSpec | None
) -> tuple[list[int], list[Picture]]:
    """The prompt with the pictures' positions, and the pictures."""
    images, encoded = message.images, frozenset(message.encoded)
    if not images:
        return prompt, []
    if spec is None:
        raise Refusal(ErrorCode.UNSUPPORTED, "this model reads text only", "image")
    fault = check_bounds(spec, images)
    if fault:
        raise Refusal(ErrorCode.UNSUPPORTED, fault, "image")
    counts = [1 if number in encoded else len(image.sheets) for number, image in enumerate(images)]
    if len(frames) != sum(counts):
        raise Refusal(
            ErrorCode.INVALID_REQUEST, f"{len(images)} pictures came with {len(frames)} frames", "image"
        )
    tokens: list[int] = []
    pictures: list[Picture] = []
    at = 0
    for number, image in enumerate(images):
        own, frames = frames[: counts[number]], frames[counts[number] :]
        is_encoded = number in encoded
        check_picture(spec, image, own, message.encoded_as if is_encoded else None)
        runs: list[Run] = []
        offset = 0
        for place, num in image.runs:
            if num < 1 or not at <= place <= len(prompt):
                text = f"a picture's runs lie in {at} … {len(prompt)}, in order, with a position each"
                raise Refusal(ErrorCode.INVALID_REQUEST, text, "image")
            tokens += prompt[at:place]
            runs.append(Run(len(tokens), num, offset))
            tokens += [IMAGE_TOKEN] * num
            at, offset = place, offset + num
        pictures.append(picture_of(spec, image, tuple(runs), own, is_encoded=is_encoded))
    return tokens + prompt[at:], pictures


def _values(message: Submit, prompt: list[int], num_tokens: int, card: ModelCard) -> dict[int, Value]:
    """The values that stand in the prompt, as `Sequence.values` has them: by position, counted from the prompt's end."""
    found: dict[int, Value] = {}
    for given in message.values:
        fault = ""
        if not {"detect", "point"} & set(card.capabilities):
            fault = f"model {card.model_id} reads no coordinates"
        elif not 0 <= given.index < len(prompt):
            fault = f"values stand at indexes 0 … {len(prompt) - 1}"
        elif len(given.values) != {card.coord_id: 1, card.size_id: 2}.get(prompt[given.index], 0):
            fault = "a coordinate's id has one value, a size's two, and no other id has any"
        elif not all(math.isfinite(value) and 0.0 <= value <= 1.0 for value in given.values):
            fault = "values lie in 0 … 1"
        if fault:
            raise Refusal(ErrorCode.INVALID_REQUEST, fault, "values")
        pictured = sum(num for image in message.images for at, num in image.runs if at <= given.index)
        found[given.index + pictured - num_tokens] = (given.values[0], given.values[-1])
    return found


def blocks_of(spec: ImageSpec | None, pictures: Sequence_[Picture]) -> list[Block]:
    """The positions that attend to each other both ways: each run's, or the prompt's beginning up to a first picture."""
    if spec is None or spec.attends == "causal":
        return []
    blocks = [(run.position, run.position + run.num_tokens) for picture in pictures for run in picture.runs]
    if spec.attends == "prefix" and blocks and blocks[0][0] <= 1:
        blocks[0] = (0, blocks[0][1])
    return blocks


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
    if message.task == "reason":
        return _reasoning(card)
    if message.task == "segment" and message.task in card.capabilities:
        return None  # the box and the path come as the model was trained to say them
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


def _reasoning(card: ModelCard) -> TokenAutomaton:
    closing = card.templates.get("reasoning_close")
    if not closing:
        raise Refusal(ErrorCode.UNSUPPORTED, f"model {card.model_id} does not reason first", "task")
    tables = reasoning_tables(
        end_id=card.eos_ids[0],
        banned_ids=tuple(card.templates.get("reasoning_suppress", ())),
        closing_id=closing[0],
        opener=tuple(card.templates.get("reasoning_end", ())),
        vocab_size=card.vocab_size,
    )
    return TokenAutomaton(tables)
