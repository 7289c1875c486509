"""`degas soak` and `degas faults`: what they refuse, and what they list; the rest needs processes."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from loadtest.chaos.commands import faults, soak

app = typer.Typer()
app.command()(soak)
app.command()(faults)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["soak", "--seconds", "1"], "seconds is 0.5"),
        (["soak", "--model", "none"], "model is 'none'"),
        (["soak", "--model", ""], "model is empty"),
        (["soak", "--rate", "0"], "rate is 0"),
        (["soak", "--blow-every", "1"], "blow_every_s is 1"),
        (["faults", "none"], "'none' is no fault"),
        (["faults", "--streams", "1"], "--streams is 1"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_starts(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160", "TERM": "dumb"})
    assert result.exit_code == 2 and message in result.output


def test_faults_are_listed() -> None:
    result = CliRunner().invoke(app, ["faults", "--list"])
    assert result.exit_code == 0 and "poison: a request that kills the worker" in result.output
