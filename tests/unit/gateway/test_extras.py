"""An extra that is not installed is told apart from a module of ours that is missing."""

from __future__ import annotations

import importlib

import pytest

from gateway.__main__ import Gateway
from gateway.config import ConfigError, load


@pytest.mark.parametrize(
    ("missing", "raised"),
    [
        ("grpc", ConfigError),
        ("smg_grpc_proto.generated", ConfigError),
        ("gateway.api.x", ModuleNotFoundError),
    ],
)
async def test_a_fault_is_not_taken_for_an_extra_left_out(
    monkeypatch: pytest.MonkeyPatch, missing: str, raised: type[Exception]
) -> None:
    def import_module(name: str) -> object:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    gateway = Gateway(load({"port": 0, "grpc_port": 0}))
    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(raised):
        await gateway._start_grpc()
    await gateway.service.stop()
