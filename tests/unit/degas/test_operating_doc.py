"""docs/operating.md names every setting, every error code and only metrics that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import GatewayConfig
from shared.errors import ErrorCode
from worker.config import WorkerConfig

DOC = (Path(__file__).parents[3] / "docs" / "operating.md").read_text()
NOT_FOR_PEOPLE = {"beat_fd", "report_startup"}


@pytest.mark.parametrize("config", [GatewayConfig, WorkerConfig])
def test_every_setting_is_listed(config: type[GatewayConfig] | type[WorkerConfig]) -> None:
    missing = [
        name for name in config.model_fields if f"| `{name}` |" not in DOC and name not in NOT_FOR_PEOPLE
    ]
    assert not missing


def test_every_error_code_is_explained() -> None:
    table = DOC.split("## At 3 a.m.")[1]
    assert not [code.value for code in ErrorCode if f"`{code.value}`" not in table]
