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


def examine(model: str | None = None) -> int:
    """Print every finding, with a model also what it takes here; 1 if one of them keeps Degas from serving."""
    bad = 0
    for check in CHECKS if model is None else [*CHECKS, lambda: _model(model)]:
        made = check()
        for finding in [made] if isinstance(made, Finding) else made:
            bad += not finding.is_good
            print(f"{'ok ' if finding.is_good else 'BAD'}  {finding.name:<10} {finding.text}", flush=True)
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


def _operations() -> list[Finding]:
    """Which compiled operations a CPU worker will have; it serves without them, a third to a half as fast."""
    for package in ("structlog", "torch"):
        if importlib.util.find_spec(package) is None:
            advice = "pip install 'degas-serve[worker]'"
            return [Finding("operations", f"{package} is not installed", False, advice)]
    from degas.doctor_kernels import kernel_lines

    return [Finding(name, text, True, advice) for name, text, advice in kernel_lines()]


def _memory() -> Finding:
    from worker.device.memory import free_memory

    free = free_memory()
    good = free.num_bytes > 1 << 30 or not free.is_known
    return Finding(
        "memory",
        f"{free.num_bytes / (1 << 30):.1f} GiB free ({free.bound})",
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


def _model(name: str) -> list[Finding]:
    """What it takes here, loaded as a worker would load it."""
    from degas.doctor_model import model_lines

    return [Finding(*line) for line in model_lines(name)]


CHECKS: list[Callable[[], Finding | list[Finding]]] = [
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
