"""Owns which prompts prefill workers compute, and how many each of them has. Gateway's loop.

The gateway only says where: the worker that has the request asks there for the pages that it lacks, and they travel between the
two. If nothing comes of that the worker computes the prompt itself, so there is nothing to try again here.
"""

from __future__ import annotations

from collections import Counter

from gateway.core.flights import Flight
from gateway.core.placement import Placement, Worker
from gateway.decisions.affinity import content_key
from shared import protocol as wire


class Prefills:
    """The choice for each request, until its first token. `outcomes` counts choices: sent, and full for lack of a place."""

    def __init__(self, placement: Placement, outcomes: Counter[str], min_tokens: int) -> None:
        """`min_tokens`: shorter prompts, or rests of prompts, are computed where they are answered."""
        self._placement = placement
        self._outcomes = outcomes
        self._min_tokens = min_tokens
        self._asked: dict[Flight, Worker] = {}

    def __len__(self) -> int:
        return len(self._asked)

    def choose(self, flight: Flight, worker: Worker) -> wire.PrefillAt | None:
        """Where the flight's worker may have its prompt computed; None: nowhere else.

        A request that was tried before goes without: what killed its worker is not given another to kill.
        """
        request, format = flight.request, worker.takes_pages
        if format is None or request.num_prompt < self._min_tokens or flight.record.num_attempts:
            return None
        if request.images or request.values or request.sampling.num_prompt_logprobs >= 0:
            return None
        if not self._placement.prefills(format):
            return None
        key = content_key(flight.tenant, (), request.prompt_ids)
        chosen = self._placement.place_prompt(format, key)
        if chosen is None:
            self._outcomes["full"] += 1
            return None
        self._outcomes["sent"] += 1
        self._asked[flight] = chosen
        chosen.num_prompts += 1
        return wire.PrefillAt(chosen.link.endpoint, self._min_tokens)

    def forget(self, flight: Flight) -> None:
        """Its first token is there, or it is on its worker no more."""
        chosen = self._asked.pop(flight, None)
        if chosen is not None:
            chosen.num_prompts -= 1
