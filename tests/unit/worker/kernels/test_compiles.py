"""Every kernel compiles for the GPU it is written for, though none is here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_compiles_for_hopper() -> None:
    """As the models are served; in fp32 too, and in variants that do not serve: `tests/soak/soak_compiles.py`."""
    check_compiles()


def check_compiles(*flags: str) -> None:
    """In a process of its own: this one has told Triton to interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.worker.kernels.compile_all", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=880,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) >= 30
    kernels = Path(ROOT / "worker" / "kernels").glob("*.py")
    launched = {
        name for path in kernels for name in re.findall(r"^    (?:\w+ = )?(_\w+)\[", path.read_text(), re.M)
    }
    assert launched <= {line[0] for line in lines}, "a kernel that is launched is not in the list"
