"""Owns compiling C++ for this very machine, once, and finding the result again. Decode thread, while a model loads.

Nobody needs a compiler: without one, or with one that fails, the callers' torch path runs. What was compiled is
kept in a folder that only this user may write to, under a name that changes with the source, the flags, the
compiler and the processor.
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
import tempfile
from pathlib import Path

import structlog

COMPILERS = ("c++", "g++", "clang++")
# gnu++17, not c++17: only then are products and sums contracted to fused ones.
FLAGS = ("-std=gnu++17", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")
COMPILE_S = 120.0

log = structlog.get_logger("worker.native")
_allowed = True


def forbid() -> None:
    """From now on nothing is compiled or loaded: the setting `native` is off. Call before any model loads."""
    global _allowed
    _allowed = False


def compiled(source: Path, folder: Path | None = None) -> ctypes.CDLL | None:
    """The library built of `source`; None where that is not to be had, with the reason in the log.

    `folder` keeps libraries from start to start; None for the user's cache. Compiling takes 2 to 3 seconds of
    processor time, finding it again a millisecond.
    """
    if not _allowed:
        return None
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None or sys.platform == "win32":
        log.info("native_absent", reason="no C++ compiler; decoding uses torch alone")
        return None
    try:
        folder = _private(folder or Path.home() / ".cache" / "degas")
        library = folder / f"{source.stem}-{_key(source, compiler)}.so"
        if not library.exists():
            _compile(compiler, source, library)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        log.warning("native_absent", reason=str(error)[-500:])
        return None


def _key(source: Path, compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=10, check=True).stdout
    digest = hashlib.sha256(version + _processor().encode())
    for read in (source, *sorted(source.parent.glob("*.h"))):
        digest.update(read.read_bytes())
    digest.update(repr((FLAGS, compiler)).encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` looks at: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.startswith(kept))


def _private(folder: Path) -> Path:
    """The folder, made if need be. Raises RuntimeError when others could put a library there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:  # no home, or one that cannot be written: compile anew at every start
        return Path(tempfile.mkdtemp(prefix="degas-native-"))
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RuntimeError(f"{folder} must belong to this user and be writable by nobody else")
    return folder


def _compile(compiler: str, source: Path, library: Path) -> None:
    """Raises RuntimeError with the compiler's last words."""
    part = library.with_suffix(f".{os.getpid()}")
    command = [compiler, *FLAGS, str(source), "-o", str(part)]
    log.info("native_compile", source=source.name, note="once; later starts find it in the cache")
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S)
    if done.returncode:
        part.unlink(missing_ok=True)
        raise RuntimeError(f"{Path(compiler).name} failed: {done.stderr.strip()[-400:]}")
    part.replace(library)  # at once: another worker may be looking for it
