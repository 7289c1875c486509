"""Owns the reference stack's environment: made once in the user's cache, versions pinned. The command's main thread."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

PINNED: Final = (
    "fastapi==0.165.0",
    "uvicorn[standard]==0.54.0",
    "pydantic==2.14.4",
    "starlette==1.10.0",
    "uvloop==0.23.0",
    "httptools==0.9.0",
    "websockets==17.4",
    "pyzmq==27.3.0",
    "msgspec==0.22.0",
    "jinja2==3.1.6",
    "tokenizers==0.23.3",
)
_MAKE_TIMEOUT_S: Final = 600.0


class ReferenceError(RuntimeError):
    """The reference stack cannot be run, in one line."""


def cache_folder() -> Path:
    """Where environments are kept: `degas` in XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "degas"


def reference_python(say: Callable[[str], None]) -> Path:
    """The Python of the reference's environment, made first where it is missing. Raises `ReferenceError`."""
    return make_environment(
        "bench-gateway",
        PINNED,
        say,
        instead="give --reference-python PATH of one with fastapi, uvicorn[standard], pydantic, pyzmq, msgspec, jinja2 and "
        "tokenizers, or --no-reference",
    )


def make_environment(
    name: str, pinned: Sequence[str], say: Callable[[str], None], *, instead: str, borrows: str = ""
) -> Path:
    """The Python of an environment with these packages. `borrows`: a folder whose packages it sees as well; `pinned` are then
    installed without their dependencies. Raises `ReferenceError`, which ends with `instead`."""
    key = hashlib.sha256("\n".join((sys.version, borrows, *pinned)).encode()).hexdigest()[:12]
    folder = cache_folder() / f"{name}-{key}"
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    say(f"making the reference's environment in {folder}: {', '.join(pinned[:3])}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [*install, *(["--no-deps"] if borrows else []), *pinned],
    ):
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_MAKE_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ReferenceError(f"{' '.join(command[:3])}: {error}") from None
        if done.returncode:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise ReferenceError(f"the reference's environment cannot be made: {''.join(last)}; {instead}")
    if borrows:
        for site in folder.glob("lib/python*/site-packages"):
            (site / "borrowed.pth").write_text(borrows + "\n")
    (folder / "complete").touch()
    return python
