"""constraints.txt and pyproject.toml agree: every dependency has a tested version, and its range admits it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
TESTED = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in LINES}


def test_every_dependency_has_a_tested_version_that_its_range_admits() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]
    for requirement in map(Requirement, asked):
        version = TESTED.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in constraints.txt: make constraints"
        assert version in requirement.specifier, (
            f"constraints.txt has {version}, pyproject.toml asks for {requirement}"
        )


def test_lines_are_plain_versions_in_order() -> None:
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in LINES)
    assert sorted(LINES) == LINES and len(TESTED) == len(LINES)
