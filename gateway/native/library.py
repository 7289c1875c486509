"""Owns compiling `burst.c`, once, and finding the library again. A thread of its own while the gateway starts.

Without a C compiler, or on another system than Linux, the gateway writes its tokens in Python. `python -m
gateway.native.library` compiles beside the source, for images, which hold no compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Final

import structlog

SOURCE: Final = Path(__file__).with_name("burst.c")
COMPILERS: Final = ("cc", "gcc", "clang")
# No flags for this very processor: the loop copies bytes and calls the kernel.
FLAGS: Final = ("-std=gnu11", "-O2", "-fPIC", "-shared")
_COMPILE_S: Final = 60.0

log = structlog.get_logger("gateway.native")


_loaded: ctypes.CDLL | None = None


def loaded() -> ctypes.CDLL | None:
    """The library, once `load` has found it."""
    return _loaded


def load() -> None:
    """Find or compile the library. Where it cannot be had the log says why. Compiling takes about half a second."""
    global _loaded
    if _loaded is None:
        _loaded = _find()


def _find() -> ctypes.CDLL | None:
    if sys.platform != "linux" or sys.byteorder != "little":
        return None
    for library in (SOURCE.with_name(_name()), Path.home() / ".cache" / "degas" / _name()):
        try:
            if library.exists() and _is_ours(library):
                return ctypes.CDLL(str(library))
        except OSError as error:
            log.warning("burst_absent", reason=str(error)[-300:])
            return None
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        log.info("burst_absent", reason="no C compiler; tokens are written by Python")
        return None
    try:
        folder = Path.home() / ".cache" / "degas"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        library = folder / _name()
        compile_to(compiler, library)
        return ctypes.CDLL(str(library)) if _is_ours(library) else None
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        log.info("burst_absent", reason=str(error)[-300:])
        return None


def compile_to(compiler: str, library: Path) -> None:
    """Raises RuntimeError with the compiler's last words, OSError and subprocess.SubprocessError."""
    part = library.with_suffix(f".{os.getpid()}")
    done = subprocess.run(
        [compiler, *FLAGS, str(SOURCE), "-o", str(part)], capture_output=True, text=True, timeout=_COMPILE_S
    )
    if done.returncode:
        raise RuntimeError(f"{compiler} failed: {done.stderr.strip()[-300:]}")
    part.replace(library)  # at once: another gateway may be looking for it


def _name() -> str:
    digest = hashlib.sha256(SOURCE.read_bytes() + repr(FLAGS).encode()).hexdigest()[:16]
    return f"burst-{platform.machine()}-{digest}.so"


def _is_ours(library: Path) -> bool:
    """Whether nobody but this user or root could have put it there."""
    for path in (library, library.parent):
        status = path.stat()
        if status.st_uid not in (0, os.getuid()) or status.st_mode & stat.S_IWOTH:
            log.warning("burst_absent", reason=f"{path} can be written by others")
            return False
    return True


if __name__ == "__main__":
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        sys.exit("a C compiler is needed: one of " + ", ".join(COMPILERS))
    made = SOURCE.with_name(_name())
    compile_to(found, made)
    log.info("burst_built", library=str(made))
