"""What tokens cost, by model and tenant, of what workers say; and what stays unsaid where one of them has no price."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from gateway.access import Access
from gateway.config import GatewayConfig
from gateway.core.costs import Account, Ledger, model_costs
from gateway.generation import Usage
from shared.protocol import HISTOGRAM_BUCKETS_S, Beat


@dataclass
class Link:
    beat: Beat | None


def link(tokens: float, row_s: float, **values: float) -> Link:
    counts = [0.0] * (len(HISTOGRAM_BUCKETS_S) + 1)
    histograms = {"prefill_time": [*counts, row_s / 4], "decode_time": [*counts, row_s * 3 / 4]}
    metrics = {"generation_tokens_total": tokens, **values}
    return Link(Beat(1, 1, 0, 0, 0, 0, metrics=metrics, histograms=histograms))


def test_a_models_workers_add_up() -> None:
    found = model_costs(
        [("a", link(100, 10, cost_total=2.0)), ("a", link(300, 30, cost_total=2.0)), ("b", link(7, 1))]
    )
    assert found["a"].tokens_per_currency == pytest.approx(100.0)
    assert found["b"].tokens_per_currency is None and found["b"].joules_per_token is None


def test_a_part_of_the_cost_does_not_pass_for_the_whole() -> None:
    found = model_costs([("a", link(100, 10, cost_total=2.0, energy_joules_total=5.0)), ("a", link(100, 10))])
    assert found["a"].tokens_per_currency is None and found["a"].joules_per_token is None
    assert model_costs([("a", Link(None))]) == {}


def test_tenants_pay_for_the_time_their_rows_were_held() -> None:
    costs = model_costs([("a", link(1000, 100.0, cost_total=1.0))])["a"]
    chatty, reader = Account(0, 900, 50.0), Account(9000, 100, 50.0)
    assert costs.tokens_per_currency_of(chatty) == pytest.approx(1800.0)
    assert costs.tokens_per_currency_of(reader) == pytest.approx(200.0)
    assert costs.tokens_per_currency_of(Account()) is None
    # All of them together are the model's.
    assert costs.tokens_per_currency_of(Account(0, 1000, 100.0)) == pytest.approx(
        costs.tokens_per_currency or 0
    )


def test_the_ledger_adds_and_keys_have_numbers_for_names() -> None:
    ledger = Ledger()
    for _ in range(2):
        ledger.on_end("a", "t", Usage(prompt_tokens=3, completion_tokens=5, prefill_s=0.5, decode_s=1.0))
    assert ledger.accounts[("a", "t")] == Account(6, 10, 3.0)
    access = Access(GatewayConfig(api_keys=("secret-one-1234", "secret-two-1234")))
    assert sorted(access.tenant_names.values()) == ["key-1", "key-2"]
    owner = access.owner("secret-two-1234")
    assert owner is not None and access.tenant_names[owner.tenant] == "key-2"
