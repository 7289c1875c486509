"""Owns each server of `degas bench serve`: its commands, and its processes as one thing. The parent's main thread."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from loadtest.peers.catalog import (
    CONTEXT_TOKENS,
    DEGAS,
    LLAMA_CPP,
    MODEL_ID,
    TRANSFORMERS,
    VLLM,
    Pythons,
    not_given,
)
from loadtest.peers.process import PeerError, environment, last_words, start, stop
from loadtest.peers.waiting import ProcessEnded, Watched, wait_ready

TRANSFORMERS_SERVE: Final = "transformers serve"
CONTINUOUS_SERVE: Final = "transformers serve (cb)"
LLAMA_CPP_SERVE: Final = "llama_cpp.server"
LLAMA_SERVER: Final = "llama-server"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server finds the weights, what it listens on, and how much of the machine it may use."""

    folder: Path  # the checkpoint
    gguf: str  # the same for llama.cpp, "" where there is none
    scratch: Path  # a folder of its own
    port: int
    threads: int
    max_in_flight: int


@dataclass(frozen=True, slots=True)
class Server:
    """One server: its commands in order of starting, each with variables of its own."""

    name: str
    python: str
    commands: Callable[[Place], list[tuple[list[str], dict[str, str]]]]
    ready_path: str
    can_pause: bool = True
    needs_gguf: bool = False
    model_is_path: bool = False  # the model's name is the checkpoint's folder

    def model(self, place: Place) -> str:
        """What requests call the model."""
        return str(place.folder) if self.model_is_path else MODEL_ID


def _degas(place: Place) -> list[tuple[list[str], dict[str, str]]]:
    endpoint = f"ipc://{place.scratch}/worker.sock"
    rows = max(32, place.max_in_flight)
    worker = [
        *(
            sys.executable,
            "-m",
            "degas.rooms",
            "worker",
            "--endpoint",
            endpoint,
            "--device",
            "cpu",
            "--log-level",
            "warning",
        ),
        *("--model", str(place.folder), "--dtype", "bfloat16", "--threads", str(place.threads)),
        *("--max-rows", str(rows), "--mixed-tokens", str(rows + 1024), "--step-tokens", str(rows + 2048)),
    ]
    settings = {
        "DEGAS_GATEWAY_WORKERS": endpoint,
        "DEGAS_GATEWAY_PORT": str(place.port),
        "DEGAS_GATEWAY_LOG_LEVEL": "warning",
    }
    return [(worker, {}), ([sys.executable, "-m", "degas.rooms", "gateway"], settings)]


def _transformers(python: str, *flags: str) -> Callable[[Place], list[tuple[list[str], dict[str, str]]]]:
    def commands(place: Place) -> list[tuple[list[str], dict[str, str]]]:
        command = [
            *(python, "-m", "transformers.cli.transformers", "serve", str(place.folder), *flags),
            *("--host", "127.0.0.1", "--port", str(place.port), "--device", "cpu", "--dtype", "bfloat16"),
            *("--log-level", "error"),
        ]
        return [(command, {})]

    return commands


def _vllm(python: str) -> Callable[[Place], list[tuple[list[str], dict[str, str]]]]:
    def commands(place: Place) -> list[tuple[list[str], dict[str, str]]]:
        command = [
            *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(place.folder)),
            *("--served-model-name", MODEL_ID, "--host", "127.0.0.1", "--port", str(place.port)),
            *("--dtype", "bfloat16", "--max-model-len", str(CONTEXT_TOKENS)),
        ]
        return [(command, {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"})]

    return commands


def _llama_cpp(python: str) -> Callable[[Place], list[tuple[list[str], dict[str, str]]]]:
    def commands(place: Place) -> list[tuple[list[str], dict[str, str]]]:
        threads = str(place.threads)
        command = [
            *(python, "-m", "llama_cpp.server", "--model", place.gguf, "--model_alias", MODEL_ID),
            *("--host", "127.0.0.1", "--port", str(place.port), "--n_ctx", str(CONTEXT_TOKENS)),
            *("--n_threads", threads, "--n_threads_batch", threads, "--interrupt_requests", "False"),
        ]
        return [(command, {})]

    return commands


def _llama_server(program: str) -> Callable[[Place], list[tuple[list[str], dict[str, str]]]]:
    def commands(place: Place) -> list[tuple[list[str], dict[str, str]]]:
        threads, slots = str(place.threads), place.max_in_flight
        command = [
            *(program, "--model", place.gguf, "--alias", MODEL_ID, "--host", "127.0.0.1"),
            *("--port", str(place.port), "--threads", threads, "--threads-batch", threads),
            *("--parallel", str(slots), "--ctx-size", str(slots * 256), "--no-webui"),
        ]
        return [(command, {})]

    return commands


def known_servers(pythons: Pythons, llama_server: str = "") -> tuple[list[Server], list[str]]:
    """Degas and every server that can be started, in the table's order; and a line for each one left out."""
    servers, left_out = [Server(DEGAS, sys.executable, _degas, "/readyz", can_pause=False)], []
    if pythons.transformers:
        python = pythons.transformers
        servers += [
            Server(TRANSFORMERS_SERVE, python, _transformers(python), "/health", model_is_path=True),
            Server(
                CONTINUOUS_SERVE,
                python,
                # By default continuous batching takes 60 % of the free memory on a CPU; 128 pages of 256 tokens suffice.
                _transformers(python, "--continuous-batching", "--cb-num-blocks", "128"),
                "/health",
                model_is_path=True,
            ),
        ]
    else:
        left_out.append(not_given(TRANSFORMERS))
    if pythons.vllm:
        servers.append(Server(VLLM, pythons.vllm, _vllm(pythons.vllm), "/health"))
    else:
        left_out.append(not_given(VLLM))
    if pythons.llama_cpp:
        python = pythons.llama_cpp
        servers.append(Server(LLAMA_CPP_SERVE, python, _llama_cpp(python), "/v1/models", needs_gguf=True))
    else:
        left_out.append(not_given(LLAMA_CPP))
    if llama_server and pythons.llama_cpp:
        python = pythons.llama_cpp
        servers.append(Server(LLAMA_SERVER, python, _llama_server(llama_server), "/health", needs_gguf=True))
    elif llama_server:
        left_out.append(
            f"{LLAMA_SERVER}: not compared: GGUF is written with gguf, give --llama-cpp-python too"
        )
    return servers, left_out


class RunningServer:
    """A server that is up: its address, its CPU time, and its end."""

    def __init__(self, server: Server, place: Place, cores: list[int], ready_timeout_s: float) -> None:
        """Start it and wait until it is ready. Raises PeerError in one line, with nothing left running."""
        self.server = server
        self.url = f"http://127.0.0.1:{place.port}"
        self.model = server.model(place)
        self._children: list[subprocess.Popen[bytes]] = []
        self._log = place.scratch / "server.log"
        try:
            variables = environment(server.python, place.threads, place.scratch / "foreign")
            for command, settings in server.commands(place):
                self._children.append(
                    start(command, {**variables, **settings}, self._log, cores, piped=False)
                )
            self._wait_ready(ready_timeout_s)
        except BaseException:  # SIGTERM and Ctrl-C among them
            self.stop()
            raise

    def _wait_ready(self, timeout_s: float) -> None:
        name, path = self.server.name, self.server.ready_path
        try:
            watched = [Watched(name, child, self._log) for child in self._children]
            wait_ready(self.url, watched, path=path, timeout_s=timeout_s)
        except ProcessEnded:
            raise PeerError(f"{name} ended: {last_words(self._log)}") from None
        except TimeoutError:
            raise PeerError(f"{name} was not ready within {timeout_s:g} s: {last_words(self._log)}") from None

    def cpu_s(self) -> float:
        """CPU seconds of its processes and their children so far; 0.0 where there is no /proc."""
        return sum(group_cpu_s(child.pid) for child in self._children)

    def signal(self, number: int) -> None:
        """To all its processes."""
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)

    def stop(self) -> None:
        """End every process; safe to call again."""
        for child in reversed(self._children):
            if child.returncode is None:
                stop(child)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def group_cpu_s(group_id: int) -> float:
    """CPU seconds of every process in a group, of ended children too; 0.0 where there is no /proc."""
    ticks = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(fields[2]) == group_id:
            ticks += sum(int(field) for field in fields[11:15])  # utime stime cutime cstime
    return ticks / os.sysconf("SC_CLK_TCK")
