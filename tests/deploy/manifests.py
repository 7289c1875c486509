"""The example manifests as objects, and what names Degas' metrics in deploy/."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
FILES: Final = sorted((DEPLOY / "kubernetes").glob("*.yaml"))

_METRIC: Final = re.compile(r"\b(?:degas_|vllm:)[a-z0-9_:]+")
_SELECTOR: Final = re.compile(r"\b((?:degas_|vllm:)[a-z0-9_:]+)\{([^{}]*)\}")
_LABEL: Final = re.compile(r"([a-z_]+)\s*(?:=~|!=|=|!~)")


@dataclass(frozen=True)
class Object:
    """One object of one file."""

    file: str
    fields: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.fields["kind"])

    @property
    def name(self) -> str:
        return str(self.fields["metadata"]["name"])

    @property
    def spec(self) -> Any:
        return self.fields["spec"]

    @property
    def pod(self) -> Any:
        """A Deployment's pods."""
        return self.spec["template"]["spec"]

    @property
    def labels(self) -> dict[str, str]:
        """Of a Deployment's pods."""
        return dict(self.spec["template"]["metadata"]["labels"])

    @property
    def containers(self) -> list[Any]:
        """All of a Deployment's pods, sidecars first."""
        return [*self.pod.get("initContainers", []), *self.pod["containers"]]

    def __str__(self) -> str:
        return f"{self.file}-{self.kind}-{self.name}"


@functools.cache
def objects() -> list[Object]:
    """All objects of all files."""
    return [
        Object(path.name, fields)
        for path in FILES
        for fields in yaml.safe_load_all(path.read_text())
        if fields
    ]


def of_kind(kind: str) -> list[Object]:
    """Those of one kind."""
    return [one for one in objects() if one.kind == kind]


def deployments() -> list[Object]:
    """What runs pods."""
    return of_kind("Deployment")


def expressions() -> Iterator[tuple[str, str]]:
    """Every PromQL expression of deploy/, each with where it stands."""
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            yield f"rules.yml {rule.get('record', rule.get('alert'))}", rule["expr"]
    board = json.loads((DEPLOY / "grafana" / "degas.json").read_text())
    for panel in _panels(board["panels"]):
        for target in panel.get("targets", []):
            yield f"degas.json {panel['title']}", target["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield f"degas.json variable {variable['name']}", _text(variable["query"])
    for one in of_kind("ScaledObject"):
        for trigger in one.spec["triggers"]:
            yield str(one), trigger["metadata"]["query"]
    for one in of_kind("ConfigMap"):
        for rule in yaml.safe_load(one.fields["data"]["config.yaml"])["externalRules"]:
            yield str(one), rule["seriesQuery"]
            yield str(one), rule["metricsQuery"].replace("<<.LabelMatchers>>", 'namespace="degas"')


def metrics_in(text: str) -> set[str]:
    """Names of our metrics and recorded rules in an expression or a sentence."""
    return set(_METRIC.findall(text))


def selected_labels(expression: str) -> Iterator[tuple[str, str]]:
    """Each metric with each label that an expression selects by."""
    for name, inside in _SELECTOR.findall(expression):
        for label in _LABEL.findall(inside):
            yield name, label


def _panels(panels: list[Any]) -> Iterator[Any]:
    for panel in panels:
        yield panel
        yield from _panels(panel.get("panels", []))


def _text(query: Any) -> str:
    return str(query["query"] if isinstance(query, dict) else query)
