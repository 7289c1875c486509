"""Owns `degas doctor`: what this machine offers, and what is missing. Main thread; starts nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `advice` is set when something should be done."""

    name: str
    text: str
    is_good: bool = True
    advice: str = ""


def examine() -> int:
    """Print every finding; 1 if one of them keeps Degas from serving."""
    bad = 0
    for check in CHECKS:
        finding = check()
        bad += not finding.is_good
        print(f"{'ok ' if finding.is_good else 'BAD'}  {finding.name:<10} {finding.text}")
        if finding.advice:
            print(f"                {finding.advice}")
    return 1 if bad else 0


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    return Finding(
        "python", platform.python_version(), good, "" if good else "Degas needs Python 3.11 or newer"
    )


def _package(name: str, extra: str) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(name, "not installed", False, f"pip install 'degas-serve[{extra}]'")
    try:
        return Finding(name, importlib.metadata.version({"zmq": "pyzmq"}.get(name, name)))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "installed")


def _device() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("device", "torch is not installed", False, "pip install 'degas-serve[worker]'")
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Finding("device", f"{properties.name}, {properties.total_memory >> 30} GiB")
    if shutil.which("nvidia-smi"):
        return Finding(
            "device",
            "cpu, though nvidia-smi is here",
            True,
            f"torch {torch.__version__} sees no GPU: is it a CUDA build?",
        )
    return Finding("device", f"cpu, {os.cpu_count()} cores (the embedded model is made for that)")


def _operations() -> Finding:
    """Whether a CPU worker will have its compiled operations; it serves without them, a third to a half as fast."""
    if importlib.util.find_spec("structlog") is None:
        return Finding(
            "operations", "the worker is not installed", False, "pip install 'degas-serve[worker]'"
        )
    from worker.native.build import SOURCE, find_compiler, kept, prebuilt
    from worker.native.library import instruction_set

    found = prebuilt(SOURCE)
    if found is not None:
        return Finding("operations", f"compiled ones are installed: {instruction_set(found)}")
    compiler = find_compiler()
    if compiler is not None:
        found = kept(SOURCE)
        if found is not None:
            return Finding("operations", f"compiled for this processor: {instruction_set(found)}")
        return Finding(
            "operations", f"{compiler} compiles them for this processor at a CPU worker's first start"
        )
    return Finding(
        "operations",
        "no C++ compiler: on a CPU, torch alone, a third to a half as fast",
        True,
        "install g++ or clang, if models run on this CPU",
    )


def _memory() -> Finding:
    free_gib = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    good = free_gib > 1.0
    return Finding(
        "memory",
        f"{free_gib:.1f} GiB free",
        good,
        "" if good else "worker and gateway together need about 1 GiB",
    )


def _port() -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", 8080))
        except OSError:
            return Finding("port", "8080 is taken", True, "degas serve --port 0 picks a free one")
    return Finding("port", "8080 is free")


CHECKS: list[Callable[[], Finding]] = [
    _python,
    lambda: _package("torch", "worker"),
    lambda: _package("zmq", "gateway"),
    lambda: _package("aiohttp", "gateway"),
    lambda: _package("uvloop", "gateway"),
    lambda: _package("grpc", "gateway"),
    _device,
    _operations,
    _memory,
    _port,
]
