"""The whole suite: how its files are spread over processes, and what every process of it has in common."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Generator

import pytest
from hypothesis import Phase, settings

from tests.keys import MARK

# One thread of computation a process: `make test` runs as many processes as it may use cores. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Files that take far longer than a second for each of their slow tests: how many more seconds of one core, roughly.
# Only the order depends on it. `pytest --durations=0` shows what has changed.
LONGEST = {
    "tests/browser/test_chat.py": 20,
    "tests/browser/test_pictures.py": 10,
    "tests/browser/test_smollm2.py": 20,
    "tests/fault/test_chaos.py": 14,
    "tests/fault/test_faults.py": 8,
    "tests/fault/test_scaling.py": 7,
    "tests/fault/test_soak.py": 16,
    "tests/fault/test_worker_faults.py": 10,
    "tests/integration/test_compose.py": 8,
    "tests/integration/test_gateways.py": 8,
    "tests/integration/test_moondream3_served.py": 8,
    "tests/integration/test_peers.py": 12,
    "tests/integration/test_picture_models.py": 9,
    "tests/integration/test_stages.py": 7,
    "tests/integration/test_text_model.py": 22,
    "tests/unit/pocket/test_training.py": 12,
    "tests/unit/wire/test_state_machine.py": 10,
    "tests/unit/worker/kernels/test_attention.py": 10,
    "tests/unit/worker/kernels/test_choices.py": 6,
    "tests/unit/worker/kernels/test_chunk_graphs.py": 10,
    "tests/unit/worker/kernels/test_compiles.py": 25,
    "tests/unit/worker/kernels/test_fused_forward.py": 18,
    "tests/unit/worker/kernels/test_quantised_linear.py": 6,
    "tests/unit/worker/kernels/test_sample.py": 8,
    "tests/unit/worker/loop/test_state_machine.py": 9,
    "tests/unit/worker/models/test_families.py": 12,
    "tests/unit/worker/native/test_native.py": 15,
    "tests/unit/worker/step/test_captured_steps.py": 20,
}

# For `tests.mutants`, to whom a first failure is enough.
settings.register_profile("unshrunk", phases=(Phase.explicit, Phase.reuse, Phase.generate))


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """What is imported and collected, 700,000 objects for the whole suite, stays to the end: nobody looks through it for garbage.
    That took a quarter of the time of collecting, and time of every test."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In several processes: the longest files first, so that no process is left alone with one at the end."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        seconds = Counter(item.path for item in items if item.get_closest_marker("slow"))
        seconds.update({config.rootpath / name: seconds_of_file for name, seconds_of_file in LONGEST.items()})
        items.sort(key=lambda item: -seconds[item.path])


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
