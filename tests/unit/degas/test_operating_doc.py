"""docs/operating.md has every setting as the code has it, a file that parses, and every error code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from degas.config_view import as_markdown
from degas.settings import ALL, resolve
from shared.errors import ErrorCode
from shared.settings import Section

DOC = (Path(__file__).parents[3] / "docs" / "operating.md").read_text()


@pytest.mark.parametrize("section", ALL)
def test_every_setting_is_listed_as_the_code_has_it(section: Section[Any]) -> None:
    table = as_markdown(section)
    heading = f"`[{section.name}]`, `{section.prefix}…`"
    assert f"{heading}\n\n{table}" in DOC, f"`python -m degas.config_view` prints the table below {heading}"


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
