"""Owns the compiled step's libraries for other instruction sets, kept between runs like the product's own."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from worker.native import build

PLAIN = ("-march=x86-64", "-O1")
"""Flags for a machine that has x86-64's own instructions only, where torch multiplies: only what it computes counts."""


def other_kinds() -> list[str]:
    """The instruction sets that are tested besides all that this machine has: AVX2, which most have; by request, every one."""
    flags = build.processor_flags()
    runs = [kind for kind, (_, needed) in build.KINDS.items() if needed <= flags]
    return runs if os.environ.get("DEGAS_TEST_EVERY_KIND") else [kind for kind in runs if kind == "avx2"]


def library_of(kind: str) -> ctypes.CDLL | None:
    """The library for a kind of `build.KINDS`, or "sse"; None without a compiler. Compiled in 15 s, once a machine."""
    library = _kept(kind, PLAIN if kind == "sse" else build.KINDS[kind][0])
    return None if library is None else ctypes.CDLL(str(library))


def compiles(kind: str) -> bool:
    """Whether there is a library for a kind of `build.KINDS` that this machine need not run. Optimised less than an image's."""
    return _kept(kind, (*build.KINDS[kind][0], "-O1")) is not None


def _kept(kind: str, flags: tuple[str, ...]) -> Path | None:
    compiler = build.find_compiler()
    if compiler is None:
        return None
    folder = build.private_folder(Path.home() / ".cache" / "degas-tests")
    assert folder is not None
    level = "O1-" if "-O1" in flags else ""
    library = folder / build._name(build.SOURCE, f"{kind}-{level}{build._key(compiler)}")
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "COMPILE_S", 590.0)  # on a busy machine; a test has ten minutes
            build._compile(compiler, build.SOURCE, made, flags)
        made.replace(library)
    return library
