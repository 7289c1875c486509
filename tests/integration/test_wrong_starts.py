"""A server that cannot start ends: exit code 2, one sentence that names the setting, nothing tried again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
LIMIT_S = 60.0
QUIET = ("--port", "0", "--grpc-port", "-1", "--device", "cpu")


def ended(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "degas", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    done = ended("serve", str(tmp_path / "no such model"), *QUIET)
    assert done.returncode == 2, done.stdout + done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("degas worker: ")]
    assert len(told) == 1 and "no such model" in told[0]
    assert "starting it again" not in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_a_context_the_model_does_not_have() -> None:
    done = ended("serve", "--context", "1000000", *QUIET)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "degas worker: context is 1000000, and " in done.stderr and "a safe value is 0" in done.stderr


@pytest.mark.parametrize("role", ["worker", "gateway"])
def test_keys_that_are_not_there(tmp_path: Path, role: str) -> None:
    flags = ["--workers", "tcp://127.0.0.1:1", "--port", "0"] if role == "gateway" else ["--device", "sim"]
    done = ended(role, "--curve-key-dir", str(tmp_path), *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "curve_key_dir" in done.stderr and "Traceback" not in done.stderr


def test_a_value_that_the_supervisor_refuses_starts_nothing() -> None:
    done = ended("serve", "--depth", "9", *QUIET)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "degas serve: depth: Input should be less than or equal to 4 (--depth is 9); a safe value is 2\n"
    )
