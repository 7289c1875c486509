"""Owns the settings of `degas serve`: its own, and both processes' with where each came from. Main thread."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from degas.options import ServeOptions
from gateway.config import GATEWAY_SETTINGS, GatewayConfig
from shared.settings import ConfigError, Given, Section, read_file
from worker.config import WORKER_SETTINGS
from worker.formats.locate import hub_name

GRPC_PORT: Final = (
    8081  # where `degas serve` listens unless told otherwise; a gateway alone has no gRPC by default
)
WORKER_GRACE_S: Final = 10.0
BUILT_IN: Final = "default of degas serve"

OWN_SOCKET: Final = {"worker": "endpoint", "gateway": "workers"}
"""Settings that connect worker and gateway: when `degas serve` runs both, it sets them itself."""


class ServeConfig(BaseModel):
    """What concerns the supervisor alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    only: Literal["worker", "gateway"] | None = Field(
        None, description="run this one alone under supervision, as containers do"
    )
    start_timeout_s: float = Field(900.0, gt=0, description="a worker that loads for longer is replaced")
    gateway_silence_s: float = Field(
        20.0, gt=0, description="a gateway that answers nothing for so long is replaced"
    )
    worker_grace_s: float | None = Field(
        None, ge=0, description="how long a worker may take to end; none: 10, or 25 where it runs alone"
    )
    status_file: str | None = Field(None, description="kept up to date for `python -m degas.health file`")
    preload: bool = Field(
        True,
        description="keep the worker's libraries loaded in a process of their own (some 20 MB beside what the worker shares with it), from which a worker that died "
        "is replaced seconds sooner. Linux only",
    )
    report: bool = Field(False, description="print a DEGAS-READY line with the address once all is up")


SERVE_SETTINGS: Final = Section("serve", ServeConfig, groups={"only": "supervision"})
ALL: Final[tuple[Section[Any], ...]] = (SERVE_SETTINGS, WORKER_SETTINGS, GATEWAY_SETTINGS)


@dataclass(frozen=True, slots=True)
class Effective:
    """One section as it will be used: its configuration, and which values were given, and where."""

    section: Section[Any]
    config: Any
    found: Mapping[str, Given]


def resolve(
    flags: Mapping[str, object], environment: Mapping[str, str], file_path: Path | None = None
) -> dict[str, Effective]:
    """Settings of every process, by its name; those that `only` leaves out are not looked at.

    A flag belongs to every section that has a setting of its name. Raises `ConfigError`.
    """
    file = read_file(file_path, environment)

    def gather(section: Section[Any]) -> dict[str, Given]:
        own = {name: value for name, value in flags.items() if name in section.settings}
        return section.gather(own, environment, file)

    serve = gather(SERVE_SETTINGS)
    only = SERVE_SETTINGS.parse(serve).only
    found = {"serve": serve} | {
        section.name: gather(section) for section in ALL[1:] if only in (None, section.name)
    }
    for name, value in flags.items():
        if value is not None and not any(name in one.settings for one in ALL if one.name in found):
            raise ConfigError(
                f"--{name.replace('_', '-')} concerns what --only {only} leaves out; take one of them away"
            )
    if "gateway" in found:
        found["gateway"].setdefault("grpc_port", Given(GRPC_PORT, BUILT_IN))
    if only is None:
        for name, setting in OWN_SOCKET.items():
            if (given := found[name].get(setting)) is not None:
                raise ConfigError(
                    f"{given.origin} sets {setting}, but degas serve joins its gateway and worker by a socket of its "
                    f"own; take it out, or run them apart: degas worker, degas gateway"
                )
    parsed = {
        section.name: Effective(section, section.parse(found[section.name]), found[section.name])
        for section in ALL
        if section.name in found
    }
    role = parsed["worker"].config.role
    if only is None and role in ("encode", "prefill"):
        who = "encoders" if role == "encode" else "prefill workers"
        raise ConfigError(
            f"role is {role}, but the worker of degas serve serves requests; start {who} apart (degas worker --role {role}, "
            f"or degas serve --only worker --role {role}); a safe value here is all"
        )
    return parsed


def serve_options(effective: Mapping[str, Effective]) -> ServeOptions:
    """What the supervisor needs: its own settings, and each child's as the child's variables say them."""
    serve: ServeConfig = effective["serve"].config
    roles = (serve.only,) if serve.only is not None else ("worker", "gateway")
    gateway: GatewayConfig = effective["gateway"].config if "gateway" in effective else GatewayConfig()
    alone_s = gateway.drain_deadline_s if serve.only == "worker" else WORKER_GRACE_S
    return ServeOptions(
        host=gateway.host,
        port=gateway.port,
        grpc_port=gateway.grpc_port,
        roles=roles,
        gateways=gateway.gateways,
        own_port=gateway.own_port,
        worker_settings=_texts(effective, "worker"),
        fetch_command=_fetch_command(effective["worker"].config.model) if "worker" in effective else (),
        # The supervisor claims the ports, and says them itself.
        gateway_settings={
            name: text
            for name, text in _texts(effective, "gateway").items()
            if name not in ("HOST", "PORT", "GRPC_PORT", "OWN_PORT", "GATEWAYS")
        },
        drain_s=gateway.drain_deadline_s,
        drain_notice_s=gateway.drain_notice_s,
        worker_grace_s=alone_s if serve.worker_grace_s is None else serve.worker_grace_s,
        start_timeout_s=serve.start_timeout_s,
        gateway_silence_s=serve.gateway_silence_s,
        status_file=Path(serve.status_file) if serve.status_file is not None else None,
        preload=serve.preload,
        report=serve.report,
    )


def _fetch_command(model: str) -> tuple[str, ...]:
    """What brings a hub's model onto this machine, before the time that a worker may take to load it begins to run."""
    if hub_name(model) is None:
        return ()
    return (sys.executable, "-m", "degas.rooms", "worker.formats.locate", model)


def _texts(effective: Mapping[str, Effective], name: str) -> dict[str, str]:
    if name not in effective:
        return {}
    one = effective[name]
    texts = one.section.texts(one.found)
    return {variable.removeprefix(one.section.prefix): text for variable, text in texts.items()}
