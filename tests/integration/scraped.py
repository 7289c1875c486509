"""A Prometheus text answer as a scraper reads it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from tests.http_client import ask

_SUFFIXES = {"counter": [""], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}


@dataclass
class Scraped:
    """Samples by name, each with its labels, and each family's type."""

    samples: dict[str, list[tuple[dict[str, str], float]]] = field(default_factory=lambda: defaultdict(list))
    types: dict[str, str] = field(default_factory=dict)
    names: set[str] = field(
        default_factory=set
    )  # that a sample has or may have: those of families still empty too

    def value(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels. Raises KeyError where there are none."""
        found = [value for own, value in self.samples.get(name, []) if labels.items() <= own.items()]
        if not found:
            raise KeyError(name)
        return sum(found)

    def labels(self, name: str) -> set[str]:
        """The labels that all of a metric's samples have."""
        return set.intersection(*(set(own) for own, _ in self.samples[name]))


def scrape(url: str) -> Scraped:
    """Ask for `/metrics`; what is no valid exposition raises ValueError."""
    answer = ask(url, "/metrics")
    assert answer.status == 200, answer.body
    found = Scraped()
    for family in text_string_to_metric_families(answer.body.decode()):
        name = family.name + ("_total" if family.type == "counter" else "")
        found.types[name] = family.type
        found.names.update(name + suffix for suffix in _SUFFIXES[family.type])
        for sample in family.samples:
            assert sample.name in found.names or sample.name.endswith("_created"), sample.name
            found.samples[sample.name].append((sample.labels, sample.value))
    return found
