"""API keys for tests. Each holds `MARK`, which no output may hold: `tests.conftest` looks at what every test wrote."""

from __future__ import annotations

from typing import Final

MARK: Final = "hush-hush"


def key(name: str) -> str:
    """A key of its own."""
    return f"{MARK}-{name}"


KEY: Final = key("correct-1")
OTHER_KEY: Final = key("correct-2")
WRONG_KEY: Final = key("wrong-1")
ANY_KEY: Final = key("any")
"""What clients send to a server that wants none."""
