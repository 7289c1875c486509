"""The order in which files are dealt out: what is named as long exists."""

from __future__ import annotations

import pytest

from tests.conftest import LONGEST


@pytest.mark.parametrize("name", LONGEST)
def test_every_long_file_exists(pytestconfig: pytest.Config, name: str) -> None:
    assert (pytestconfig.rootpath / name).is_file()
