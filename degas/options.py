"""Owns what `degas serve` is told, and turns it into the children's commands and environments."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from degas.restarts import RestartLimits
from shared.settings import FILE_VARIABLE

WORKER_PREFIX: Final = "DEGAS_WORKER_"
GATEWAY_PREFIX: Final = "DEGAS_GATEWAY_"
SERVE_PREFIX: Final = "DEGAS_SERVE_"
BEAT_VARIABLE: Final = "DEGAS_WORKER_BEAT_FD"


class OptionsError(Exception):
    """`degas serve` cannot start like this; the message says what would work."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Everything the supervisor needs to know. Settings of a child: its variables without their prefix."""

    host: str = "127.0.0.1"
    port: int = 8080  # 0 picks a free one
    grpc_port: int | None = 8081
    roles: tuple[str, ...] = ("worker", "gateway")
    worker_settings: Mapping[str, str] = field(default_factory=dict)
    gateway_settings: Mapping[str, str] = field(default_factory=dict)
    worker_command: tuple[str, ...] = (sys.executable, "-m", "degas.rooms", "worker")
    fetch_command: tuple[str, ...] = ()  # brings the worker's model onto this machine; empty: it is here
    gateway_command: tuple[str, ...] = (sys.executable, "-m", "degas.rooms", "gateway")
    preload: bool = True  # fork workers from a process that has loaded their libraries
    drain_s: float = 25.0  # how long streams may go on after SIGTERM
    drain_notice_s: float = (
        0.0  # for how long before that the gateway serves on while it says that it is not ready
    )
    worker_grace_s: float = 10.0
    start_timeout_s: float = 900.0
    gateway_silence_s: float = 20.0
    restarts: RestartLimits = field(default_factory=RestartLimits)
    status_file: Path | None = None
    runtime_parent: Path | None = None
    report: bool = False  # print DEGAS-READY with the address when all is up

    def worker_environment(self, endpoint: str | None, model: str | None = None) -> dict[str, str]:
        """The worker's: ours without the gateway's settings (its API keys among them), and its own. `model`: where the
        model was found that its settings name."""
        environment = _inherited(GATEWAY_PREFIX)
        environment[WORKER_PREFIX + "REPORT_STARTUP"] = "1"
        if endpoint is not None:
            environment[WORKER_PREFIX + "ENDPOINT"] = endpoint
        environment |= {WORKER_PREFIX + name.upper(): value for name, value in self.worker_settings.items()}
        return environment if model is None else environment | {WORKER_PREFIX + "MODEL": model}

    def gateway_environment(self, endpoint: str | None) -> dict[str, str]:
        """The gateway's: ours without the worker's settings, and its own."""
        environment = _inherited(WORKER_PREFIX)
        environment[GATEWAY_PREFIX + "HOST"] = self.host
        environment[GATEWAY_PREFIX + "PORT"] = str(self.port)
        environment[GATEWAY_PREFIX + "DRAIN_DEADLINE_S"] = str(self.drain_s)
        environment[GATEWAY_PREFIX + "GRPC_PORT"] = "none" if self.grpc_port is None else str(self.grpc_port)
        if endpoint is not None:
            environment[GATEWAY_PREFIX + "WORKERS"] = endpoint
        return environment | {
            GATEWAY_PREFIX + name.upper(): value for name, value in self.gateway_settings.items()
        }


def _inherited(foreign: str) -> dict[str, str]:
    """Our variables without the other child's, the supervisor's own, and DEGAS_CONFIG, whose file has been read already."""
    gone = (foreign, SERVE_PREFIX, FILE_VARIABLE)
    return {name: value for name, value in os.environ.items() if not name.startswith(gone)}


def claim_port(host: str, port: int, option: str) -> int:
    """The port if it is free, or a free one for 0. Raises `OptionsError` naming the option."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OptionsError(
                f"cannot listen on {host}:{port}: {error.strerror}; is another server running? "
                f"Choose another port with {option} (0 picks a free one)"
            ) from None
        return int(probe.getsockname()[1])
