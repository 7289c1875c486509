"""Order of the whole suite: tests that hold a browser's event loop open in the main thread come last."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import Phase, settings

# For `tests.mutants`, to whom a first failure is enough.
settings.register_profile("unshrunk", phases=(Phase.explicit, Phase.reuse, Phase.generate))

BROWSER = Path(__file__).parent / "browser"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # playwright's synchronous interface keeps a loop running in this thread for as long as its browser lives,
    # and no test after it could start a loop of its own.
    items.sort(key=lambda item: BROWSER in item.path.parents)
