"""Owns the one way from checked fields to `GenerateRequest`s, for every interface. Gateway's loop.

Every interface puts its fields into `SamplingFields` and calls `check_fields`, then `make_requests`: these decide what is
refused and what reaches a worker.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace

from gateway.api.parameters import (
    DEFAULT_MAX_OBJECTS,
    TOKENS_PER_OBJECT,
    SamplingFields,
    invalid,
    samplings,
    stop_ids,
    stops,
    token_budget,
)
from gateway.api.prompts import Prompt
from gateway.api.structured import Wanted, grammar
from gateway.api.tools import ToolsAsked, check_takes_tools
from gateway.generation import Core, GenerateRequest, ServedModel
from shared.protocol import Grammar, Sampling, ThinkingBudget

_NO_TOOLS_HERE: Final = "a constrained answer cannot call tools; leave one of the two out"


@dataclass(frozen=True, slots=True)
class CheckedFields:
    """One body's common part, checked. `samplings` has one entry a choice."""

    model: ServedModel
    tenant: str
    samplings: list[Sampling]
    temperature: float | None  # as asked: a task's own default may differ from the model's
    stop: list[str]
    stop_ids: list[int]
    min_tokens: int
    priority: int
    ignore_eos: bool
    grammar: Grammar | None


@dataclass(frozen=True, slots=True)
class Length:
    """How long the answers may be: `asked` tokens, in the field `param`.

    Without `asked` the length is `default`, or the model's own if that is None, cut to what still fits.
    """

    asked: int | None
    param: str
    default: int | None = None


@dataclass(frozen=True, slots=True)
class Objects:
    """A task that answers in coordinates: detect or point, and how many objects at most; None: as many as fit."""

    task: str
    max_objects: int | None
    wants_logprobs: bool = False  # of the bins of their coordinates and sizes


async def check_fields(
    core: Core,
    model: ServedModel,
    fields: SamplingFields,
    *,
    tenant: str,
    num_logprobs: int = -1,
    num_prompt_logprobs: int = -1,
    count: int = 1,
    num_prompts: int = 1,
    wanted: Wanted | None = None,
    tools: ToolsAsked | None = None,
    more_stop_ids: Sequence[int] = (),
) -> CheckedFields:
    """Check what all bodies share, cheapest first, and that there is room. Raises `RequestError`.

    `wanted` is a constraint the body asks for in a field of its own; `tools` that must be called are one too, and other tools
    go with none; `num_logprobs` and `num_prompt_logprobs` are as in `Sampling`; `more_stop_ids`
    end an answer besides the model's own.
    """
    if tools is not None:
        check_takes_tools(model, tools)
        if wanted is not None:
            raise invalid(_NO_TOOLS_HERE, "tools")
        wanted = tools.constraint()
    card = model.card
    sampled = samplings(fields, card, num_logprobs, count)
    if num_prompt_logprobs >= 0:
        sampled = [replace(one, num_prompt_logprobs=num_prompt_logprobs) for one in sampled]
    stop = stops(fields.stop)
    for token_id in more_stop_ids:
        if not 0 <= token_id < card.vocab_size:
            raise invalid(f"token ids are between 0 and {card.vocab_size - 1}", "stop_token_ids")
    core.check_capacity(model, tenant, count * num_prompts)
    constraint = await grammar(core, fields, wanted, tenant=tenant)
    if constraint is not None and tools is not None and not tools.is_forced:
        raise invalid(_NO_TOOLS_HERE, "tools")
    return CheckedFields(
        model=model,
        tenant=tenant,
        samplings=sampled,
        temperature=fields.temperature,
        stop=stop,
        stop_ids=[*stop_ids(fields, card), *more_stop_ids],
        min_tokens=fields.min_tokens or 0,
        priority=fields.priority or 0,
        ignore_eos=bool(fields.ignore_eos),
        grammar=constraint,
    )


def make_requests(
    checked: CheckedFields,
    request_id: str,
    prompts: Sequence[Prompt],
    length: Length,
    objects: Objects | None = None,
    thinking: ThinkingBudget | None = None,
    task: str = "text",
) -> list[GenerateRequest]:
    """One `GenerateRequest` for each choice of each prompt, prompt by prompt. Raises `RequestError` naming a length.

    Several get numbered ids. With `objects` the one choice answers in coordinates: read greedily unless a temperature
    was asked for, and no id is suppressed.
    """
    alone = len(prompts) * len(checked.samplings) == 1
    made: list[GenerateRequest] = []
    for prompt in prompts:
        max_tokens, max_objects = _budget(checked, prompt, length, objects)
        for sampling in checked.samplings:
            if objects is not None:
                sampling = Sampling(
                    temperature=checked.temperature or 0.0,
                    seed=sampling.seed,
                    num_logprobs=0 if objects.wants_logprobs else -1,
                )
            made.append(
                GenerateRequest(
                    request_id=request_id if alone else f"{request_id}-{len(made)}",
                    model=checked.model,
                    prompt_ids=prompt.ids,
                    max_tokens=max_tokens,
                    sampling=sampling,
                    images=prompt.images,
                    stop=checked.stop,
                    stop_ids=checked.stop_ids,
                    task=task if objects is None else objects.task,
                    max_objects=max_objects,
                    tenant=checked.tenant,
                    priority=checked.priority,
                    grammar=checked.grammar,
                    ignore_eos=checked.ignore_eos,
                    # A constrained answer begins where its constraint does: nothing in front of it is dropped.
                    strip_start=prompt.strip_start and checked.grammar is None,
                    drop_space=prompt.drop_space and checked.grammar is None,
                    shown_ids=prompt.reading.shown_ids,
                    thinking=thinking,
                    values=prompt.values,
                )
            )
    return made


def unscored(request: GenerateRequest) -> GenerateRequest:
    """The same without its prompt's log-probabilities: a prompt that several choices share is scored once."""
    return dataclasses.replace(request, sampling=replace(request.sampling, num_prompt_logprobs=-1))


def _budget(
    checked: CheckedFields, prompt: Prompt, length: Length, objects: Objects | None
) -> tuple[int, int]:
    """Tokens and objects, at most."""
    card = checked.model.card
    room = checked.model.room(prompt.num_positions(card))
    if objects is None:
        asked = length.default if length.asked is None else length.asked
        max_tokens = token_budget(asked, card, room, length.param, checked.min_tokens)
        return (min(max_tokens, room) if length.asked is None else max_tokens), 0
    per_object = TOKENS_PER_OBJECT[objects.task]
    max_objects = objects.max_objects
    if max_objects is None:
        max_objects = max(1, min(DEFAULT_MAX_OBJECTS, (room - 1) // per_object))
    whole = max_objects * per_object + 1
    return whole if length.asked is None else min(whole, length.asked), max_objects
