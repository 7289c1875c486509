"""Owns the process that prepares pictures with transformers, for `degas bench pictures`. The command's main thread."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from loadtest.gateway.environment import ReferenceError, make_environment

PEERS: Final = ("smolvlm", "qwen2.5-vl")
"""Whose processors transformers has."""
# torch is this environment's own: torchvision goes with one version of it.
PINNED: Final = ("torchvision==0.28.0", "transformers==5.24.0")
_SCRIPT: Final = Path(__file__).with_name("picture_processor.py")


def processor_python(say: Callable[[str], None]) -> Path:
    """The Python of the processors' environment, made first where it is missing. Raises `ReferenceError`."""
    return make_environment(
        "bench-pictures",
        PINNED,
        say,
        borrows=sysconfig.get_paths()["purelib"],
        instead="give --processor-python PATH of one with torch, torchvision, transformers and pillow, or --no-processor",
    )


class Processor:
    """The running process. Raises `ReferenceError` where it fails; close it after use."""

    def __init__(self, python: str) -> None:
        self._process = subprocess.Popen(
            [python, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
        )
        try:
            self._hear()
        except ReferenceError:
            self.close()
            raise

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None and self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            last = self._process.stderr.read().strip().splitlines()[-1:]
            raise ReferenceError(
                f"transformers' processors cannot be run: {''.join(last) or 'no word from them'}"
            )
        said: dict[str, Any] = json.loads(line)
        return said

    def seconds(self, model: str, path: Path) -> float:
        """Processor time for one file. Raises `ReferenceError`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"model": model, "path": str(path)}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said last tells why
        return float(self._hear()["seconds"])

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Processor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
