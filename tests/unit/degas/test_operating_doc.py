"""docs/operating.md has every setting as the code has it, a file that parses, and every error code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from degas.config_view import as_markdown, with_tables
from degas.settings import ALL, resolve
from shared.errors import ErrorCode
from shared.settings import Section

DOC = (Path(__file__).parents[3] / "docs" / "operating.md").read_text()
UPDATE = "run: python -m degas.config_view docs/operating.md"


@pytest.mark.parametrize("section", ALL)
def test_every_setting_is_listed(section: Section[Any]) -> None:
    assert f"`[{section.name}]`, `{section.prefix}…`\n\n{as_markdown(section)}\n" in DOC, UPDATE


def test_the_tables_are_as_the_code_has_them() -> None:
    assert with_tables(DOC) == DOC, UPDATE


def test_the_file_shown_is_one_that_serves(tmp_path: Path) -> None:
    shown = re.findall(r"```toml\n(.*?)```", DOC, re.DOTALL)
    assert shown
    for number, text in enumerate(shown):
        path = tmp_path / f"{number}.toml"
        path.write_text(text)
        effective = resolve({}, {}, path)
        for name, table in tomllib.loads(text).items():
            assert set(table) <= set(effective[name].found)


def test_every_error_code_is_explained() -> None:
    table = DOC.split("## At 3 a.m.")[1]
    assert not [code.value for code in ErrorCode if f"`{code.value}`" not in table]
