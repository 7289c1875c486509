"""Owns compiling C++ for this very machine, once, and finding the result again. Decode thread, while a model loads.

Without a compiler, or with one that fails, the callers' torch path runs. `python -m worker.native.build` compiles for
every kind of this machine's architecture beside the source, or for those it is given, for images, which hold no compiler
(docs/architecture.md, "Devices"). It needs nothing of the rooms but this file and what it compiles.
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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import structlog

COMPILERS = ("c++", "g++", "clang++")
# A product and a sum become one fused operation wherever that is possible: GCC's habit with gnu++17, clang must be told.
FLAGS = ("-std=gnu++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", "-fPIC", "-pthread")
UNIT_FLAGS = {"rounding": ("-ffp-contract=off",), "table_rows": ("-ffp-contract=off",)}
"""Of the units whose numbers equal torch's to the last bit, each operation rounded by itself."""
COMPILE_S = 300.0
BUILD_S = 3600.0  # for an image: on whatever machine, emulated perhaps, and nobody waits for a first token
# The other units beside it are compiled at the same time.
SOURCE = Path(__file__).with_name("exports.cpp")

_V3 = frozenset(("avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "abm"))
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_ARM_V82 = frozenset(("asimd", "fphp", "asimdhp", "asimdrdm", "asimddp", "atomics", "crc32"))
Kinds = dict[str, tuple[tuple[str, ...], frozenset[str]]]
X86_KINDS: Kinds = {
    "amx": (
        ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16"),
        _V4 | {"avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16"},
    ),
    "avx512bf16": (
        ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"),
        _V4 | {"avx512_bf16", "avx512_vnni"},
    ),
    "avx512vnni": (("-march=x86-64-v4", "-mavx512vnni"), _V4 | {"avx512_vnni"}),
    "avx512": (("-march=x86-64-v4",), _V4),
    "avxvnni": (("-march=x86-64-v3", "-mavxvnni"), _V3 | {"avx_vnni"}),
    "avx2": (("-march=x86-64-v3",), _V3),
}
ARM_KINDS: Kinds = {
    "armv82": (("-march=armv8.2-a+dotprod+fp16",), _ARM_V82),
    "armv8": (("-march=armv8-a",), frozenset(("asimd",))),
}
KINDS = {"x86_64": X86_KINDS, "aarch64": ARM_KINDS, "arm64": ARM_KINDS}.get(platform.machine(), {})
"""Kinds of this machine's processors, the best first: the compiler's flags, and the processor flags that Linux must list."""

log = structlog.get_logger("worker.native")
_allowed = True


def forbid() -> None:
    """Compile and load nothing from now on, because the setting `native` is off. Call before any model loads."""
    global _allowed
    _allowed = False


def compiled(source: Path, folder: Path | None = None) -> ctypes.CDLL | None:
    """The library built from `source`; None if it cannot be built or loaded, with the reason in the log.

    `folder` keeps libraries from start to start; None for the user's cache. Compiling takes some 13 seconds of
    processor time on up to three cores, finding it again a millisecond.
    """
    if not _allowed:
        return None
    found = prebuilt(source)
    if found is not None:
        return found
    compiler = find_compiler()
    if compiler is None or sys.platform == "win32":
        log.info("native_absent", reason="no C++ compiler; decoding uses torch alone")
        return None
    try:
        folder = private_folder(folder or Path.home() / ".cache" / "degas")
        if folder is None:  # compile anew at every start
            folder = Path(tempfile.mkdtemp(prefix="degas-native-"))
        library = folder / _name(source, _key(compiler))
        if not library.exists():
            log.info("native_compile", source=source.name, note="once; later starts find it in the cache")
            _compile_here(compiler, source, library)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        log.warning("native_absent", reason=str(error)[-500:])
        return None


def build_kinds(folder: Path, wanted: tuple[str, ...] = ()) -> list[Path]:
    """Compile for the wanted kinds of processor, by default all, into `folder`. Raises RuntimeError where that cannot be done."""
    compiler = find_compiler()
    if compiler is None or not KINDS:
        raise RuntimeError("libraries for other machines need a C++ compiler on an x86-64 or 64-bit Arm one")
    if unknown := set(wanted) - set(KINDS):
        raise RuntimeError(
            f"{', '.join(sorted(unknown))}: not among this machine's kinds, {', '.join(KINDS)}"
        )
    made = []
    for kind in wanted or KINDS:
        library = folder / _name(SOURCE, kind)
        _compile(compiler, SOURCE, library, KINDS[kind][0], BUILD_S)
        made.append(library)
    return made


def prebuilt(source: Path, folder: Path | None = None) -> ctypes.CDLL | None:
    """The best library of this very source that `build_kinds` left in `folder`, by default beside it, and that this
    processor runs."""
    flags = processor_flags()
    for kind, (_, needed) in KINDS.items():
        library = (folder or source.parent) / _name(source, kind)
        if needed <= flags and library.exists():
            try:
                return ctypes.CDLL(str(library))
            except OSError as error:
                log.warning("native_absent", reason=str(error)[-500:])
    return None


def kept_library(source: Path) -> Path | None:
    """The library that an earlier start compiled from this very source for this processor, in the user's cache."""
    compiler = find_compiler()
    if compiler is None:
        return None
    library = Path.home() / ".cache" / "degas" / _name(source, _key(compiler))
    return library if library.exists() else None


def processor_flags() -> frozenset[str]:
    """The flags that Linux lists for the first processor ("Features" on Arm); empty on other systems."""
    lines = [line for line in _processor().splitlines() if line.startswith(("flags", "Features"))]
    return frozenset(lines[0].partition(":")[2].split() if lines else ())


def find_compiler() -> str | None:
    """The C++ compiler that would be used, if there is one."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def _units(source: Path) -> list[Path]:
    """All that is compiled into one library: the source, and those beside it."""
    return sorted(source.parent.glob("*.cpp"))


def _name(source: Path, made_for: str) -> str:
    """The library's name, which changes with the source, its headers and the flags."""
    digest = hashlib.sha256(repr((FLAGS, UNIT_FLAGS)).encode())
    for read in (*_units(source), *sorted(source.parent.glob("*.h"))):
        digest.update(read.read_bytes())
    return f"{source.stem}-{made_for}-{digest.hexdigest()[:16]}.so"


def _key(compiler: str) -> str:
    """A key for this machine's processor and this compiler."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=10, check=True).stdout
    return hashlib.sha256(version + compiler.encode() + _processor().encode()).hexdigest()[:16]


def _processor() -> str:
    """The processor's properties that `-march=native` uses, because machines with different processors may share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {_mac_model()}"
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.startswith(kept))


def _mac_model() -> str:
    """A Mac's processor by name, such as Apple M2; empty on other systems. `platform` tells no Apple chip from another."""
    if platform.system() != "Darwin":
        return ""
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()


def private_folder(folder: Path) -> Path | None:
    """The folder, made if need be; None without a home, or in one that is not writable. Raises RuntimeError when others
    could put a library there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RuntimeError(f"{folder} must belong to this user and be writable by nobody else")
    return folder


def flags_here() -> list[tuple[str, ...]]:
    """The compiler's flags for this machine's processor, in the order in which they are tried.

    For Arm compilers read `-march` as an architecture, and `-mcpu=native` is what names the processor: older clangs do not
    know it, or not the processor. Then the best of `KINDS`, and at last the compiler's default, which is an M1 for Apple's.
    """
    if platform.machine() not in ("aarch64", "arm64"):
        return [("-march=native",)]
    flags = processor_flags()
    best = next((kind for kind, needed in KINDS.values() if needed <= flags), ())
    return list(dict.fromkeys((("-mcpu=native",), best, ())))


def _compile_here(compiler: str, source: Path, library: Path) -> None:
    """Raises RuntimeError with the compiler's last words if no flags suit it."""
    *first, last = flags_here()
    for flags in first:
        try:
            _compile(compiler, source, library, flags)
        except RuntimeError as error:
            log.info("native_flags", refused=" ".join(flags), reason=str(error)[-200:])
        else:
            return
    _compile(compiler, source, library, last)


def _compile(
    compiler: str, source: Path, library: Path, flags: tuple[str, ...], timeout_s: float = COMPILE_S
) -> None:
    """Raises RuntimeError with the compiler's last words."""
    part = library.with_suffix(f".{os.getpid()}")
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder) / f"{unit.stem}.o" for unit in _units(source)]
        commands = [
            [compiler, *FLAGS, *flags, *UNIT_FLAGS.get(unit.stem, ()), "-c", str(unit), "-o", str(made)]
            for unit, made in zip(_units(source), objects, strict=True)
        ]
        with ThreadPoolExecutor(len(commands)) as side_by_side:
            list(side_by_side.map(partial(_run, timeout_s=timeout_s), commands))
        _run([compiler, *FLAGS, *map(str, objects), "-shared", "-o", str(part)], timeout_s)
    part.replace(library)  # at once: another worker may be looking for it


def _run(command: list[str], timeout_s: float) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()[-400:]}")


if __name__ == "__main__":
    for made in build_kinds(SOURCE.parent, tuple(sys.argv[1:])):
        log.info("native_built", library=str(made))
