"""Owns what the fields common to every OpenAI body come to, and the sequences made of them. Gateway's loop."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.api.parameters import SamplingFields, samplings, stop_ids, stops
from gateway.api.prompts import Prompt
from gateway.api.structured import Wanted, grammar
from gateway.core.service import Service
from gateway.generation import GenerateRequest
from shared.protocol import Grammar, ModelCard, Sampling


@dataclass(frozen=True, slots=True)
class Asking:
    """One body's common part, checked. `samplings` has one entry a choice."""

    card: ModelCard
    tenant: str
    samplings: list[Sampling]
    stop: list[str]
    stop_ids: list[int]
    priority: int
    ignore_eos: bool
    grammar: Grammar | None

    def request(
        self,
        request_id: str,
        prompt: Prompt,
        max_tokens: int,
        *,
        choice: int = 0,
        task: str = "text",
        max_objects: int = 0,
    ) -> GenerateRequest:
        """One choice's sequence."""
        return GenerateRequest(
            request_id=request_id,
            model_id=self.card.model_id,
            prompt_ids=prompt.ids,
            max_tokens=max_tokens,
            sampling=self.samplings[choice],
            images=prompt.images,
            stop=self.stop,
            stop_ids=self.stop_ids,
            task=task,
            max_objects=max_objects,
            tenant=self.tenant,
            priority=self.priority,
            grammar=self.grammar,
            ignore_eos=self.ignore_eos,
            strip_start=prompt.strip_start,
        )


async def read_common(
    core: Service,
    body: SamplingFields,
    card: ModelCard,
    *,
    tenant: str,
    num_logprobs: int,
    count: int = 1,
    num_prompts: int = 1,
    also: Wanted | None = None,
) -> Asking:
    """Check what all bodies share, cheapest first, and that there is room. Raises `RequestError`.

    `also` is a constraint the body asks for in a field of its own; `num_logprobs` is as in `Sampling`.
    """
    sampled = samplings(body, card, num_logprobs, count)
    stop = stops(body.stop)
    core.check_capacity(card.model_id, tenant, count * num_prompts)
    return Asking(
        card=card,
        tenant=tenant,
        samplings=sampled,
        stop=stop,
        stop_ids=stop_ids(body, card),
        priority=body.priority or 0,
        ignore_eos=bool(body.ignore_eos),
        grammar=await grammar(core, body, also),
    )
