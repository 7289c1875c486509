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
    gateways: int = 1  # processes that share the ports
    own_port: int | None = None  # of the first gateway, the others' follow; None or 0: free ones
    own_ports: tuple[int, ...] = ()  # one for each gateway; empty: there is one gateway, on `port`
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

    @property
    def log_json(self) -> bool:
        """Whether a child was told to write JSON lines: the supervisor then does too."""
        told = (one.get("LOG_JSON", "") for one in (self.worker_settings, self.gateway_settings))
        return any(text.lower() in ("true", "1", "on", "yes") for text in told)

    def worker_environment(self, endpoint: str | None, model: str | None = None) -> dict[str, str]:
        """The worker's: ours without the gateway's settings (its API keys among them), and its own. `model`: where the
        model was found that its settings name."""
        environment = _inherited(GATEWAY_PREFIX)
        environment[WORKER_PREFIX + "REPORT_STARTUP"] = "1"
        if endpoint is not None:
            environment[WORKER_PREFIX + "ENDPOINT"] = endpoint
        environment |= {WORKER_PREFIX + name.upper(): value for name, value in self.worker_settings.items()}
        return environment if model is None else environment | {WORKER_PREFIX + "MODEL": model}

    def gateway_environment(self, endpoint: str | None, number: int = 0) -> dict[str, str]:
        """A gateway's: ours without the worker's settings, and its own. `number`: which of them, from 0."""
        environment = _inherited(WORKER_PREFIX)
        environment[GATEWAY_PREFIX + "HOST"] = self.host
        environment[GATEWAY_PREFIX + "PORT"] = str(self.port)
        environment[GATEWAY_PREFIX + "DRAIN_DEADLINE_S"] = str(self.drain_s)
        environment[GATEWAY_PREFIX + "GRPC_PORT"] = "none" if self.grpc_port is None else str(self.grpc_port)
        if endpoint is not None:
            environment[GATEWAY_PREFIX + "WORKERS"] = endpoint
        environment |= {GATEWAY_PREFIX + name.upper(): value for name, value in self.gateway_settings.items()}
        if self.own_ports:
            environment[GATEWAY_PREFIX + "OWN_PORT"] = str(self.own_ports[number])
            environment[GATEWAY_PREFIX + "GATEWAYS"] = str(self.gateways)
        admin_host, _, admin_port = environment.get(GATEWAY_PREFIX + "ADMIN_LISTEN", "").rpartition(":")
        if admin_port.isdecimal() and int(admin_port):  # the operator asks one gateway at a time
            environment[GATEWAY_PREFIX + "ADMIN_LISTEN"] = f"{admin_host}:{int(admin_port) + number}"
        return environment


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


def claim_own_ports(options: ServeOptions) -> tuple[int, ...]:
    """A port for each of several gateways, where it answers for itself; none where there is one gateway and none is asked.

    `options` has the ports that are shared. Raises `OptionsError` naming the option.
    """
    if options.gateways == 1 and options.own_port is None:
        return ()
    taken = {options.port, options.grpc_port}
    ports: list[int] = []
    while len(ports) < options.gateways:
        wanted = options.own_port + len(ports) if options.own_port else 0
        port = claim_port(options.host, wanted, "--own-port")
        if wanted and port in taken:
            raise OptionsError(
                f"--own-port and the {options.gateways - 1} that follow it meet --port or --grpc-port at {port}"
            )
        if port not in taken:
            taken.add(port)
            ports.append(port)
    return tuple(ports)
