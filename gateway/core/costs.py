"""Owns who used how much, and what that cost: tokens and row time by model and tenant, prices by the workers. Gateway's loop.

A worker tells what its device has cost since it started, idle time included. A model's tokens per currency unit are
those of its workers over their cost. A tenant's share of the cost is its share of the seconds that requests held a row
(prefill and decode), so that a tenant of long prompts pays for them; a worker's cost of such a second is its cost over
all the seconds it gave, whichever gateway they came through.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from gateway.generation import Usage
from shared.protocol import Beat


@dataclass(slots=True)
class Account:
    """What one tenant's requests to one model have used at this gateway."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    row_s: float = 0.0


class Ledger:
    """An account for each model and tenant; both are bounded sets, of served models and configured keys."""

    def __init__(self) -> None:
        self.accounts: dict[tuple[str, str], Account] = {}

    def on_end(self, model_id: str, tenant: str, usage: Usage) -> None:
        """A request ended."""
        account = self.accounts.get((model_id, tenant))
        if account is None:
            account = self.accounts[model_id, tenant] = Account()
        account.prompt_tokens += usage.prompt_tokens
        account.generated_tokens += usage.completion_tokens
        account.row_s += usage.prefill_s + usage.decode_s


@dataclass(slots=True)
class ModelCosts:
    """What a model's workers say together, since they started."""

    generated_tokens: float = 0.0
    row_s: float = 0.0
    cost: float | None = None  # None: some worker has no price
    joules: float | None = None

    @property
    def tokens_per_currency(self) -> float | None:
        """Generated tokens for one unit of the currency that prices are in."""
        return self.generated_tokens / self.cost if self.cost else None

    @property
    def joules_per_token(self) -> float | None:
        """Energy of the devices for each generated token, idle time included."""
        return (
            self.joules / self.generated_tokens if self.joules is not None and self.generated_tokens else None
        )

    def tokens_per_currency_of(self, account: Account) -> float | None:
        """The same for a tenant, whose part of the cost is that of its rows' time."""
        if not self.cost or not self.row_s or not account.row_s:
            return None
        return account.generated_tokens / (account.row_s * self.cost / self.row_s)


class _Link(Protocol):
    @property
    def beat(self) -> Beat | None: ...


def model_costs(links: Iterable[tuple[str, _Link]]) -> dict[str, ModelCosts]:
    """Costs by model of `(model id, link)` pairs. A figure that one of a model's workers lacks is None: a part of the cost
    must not pass for the whole."""
    found: dict[str, ModelCosts] = {}
    for model_id, link in links:
        beat = link.beat
        if beat is None:
            continue
        values = beat.metrics
        row_s = sum(_sums(beat, ("prefill_time", "decode_time")))
        cost, joules = values.get("cost_total"), values.get("energy_joules_total")
        one = found.get(model_id)
        if one is None:
            found[model_id] = ModelCosts(values.get("generation_tokens_total", 0.0), row_s, cost, joules)
            continue
        one.generated_tokens += values.get("generation_tokens_total", 0.0)
        one.row_s += row_s
        one.cost = None if one.cost is None or cost is None else one.cost + cost
        one.joules = None if one.joules is None or joules is None else one.joules + joules
    return found


def _sums(beat: Beat, names: Iterable[str]) -> Iterator[float]:
    for name in names:
        numbers = beat.histograms.get(name)
        if numbers:
            yield numbers[-1]
