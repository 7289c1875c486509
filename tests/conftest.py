"""The whole suite: how its files are spread over processes, and what every process of it has in common."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator

import pytest
from hypothesis import Phase, settings

from tests.keys import MARK

# One thread of computation a process: `make test` runs as many processes as it may use cores. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# For `tests.mutants`, to whom a first failure is enough.
settings.register_profile("unshrunk", phases=(Phase.explicit, Phase.reuse, Phase.generate))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In several processes: files with many slow tests first, so that no process is left alone with one at the end."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail every test during which an API key was written: to stdout, to stderr or to any logger."""
    report = yield
    for title, text in report.sections:
        if MARK in text and report.passed:
            line = next(line for line in text.splitlines() if MARK in line)
            report.outcome = "failed"
            report.longrepr = f"a key was written ({title}): {line[:300]}"
    return report
