"""Owns the settings of `degas ray up`: frozen, parsed once. Used before Ray is imported."""

from __future__ import annotations

import re
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from degas.on_ray.scaling import ScaleLimits
from shared.settings import Section

_ADDRESS: Final = re.compile(r"(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9_.-]+):(\d{1,5})", re.ASCII)
_PORTS: Final = re.compile(r"(\d{1,5})-(\d{1,5})", re.ASCII)
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)


class RayConfig(BaseModel):
    """What concerns the cluster: the cluster itself, how many workers, their resources, how gateways find them."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    address: str | None = Field(
        None,
        description="of the Ray cluster, <host>:<port> of its head; none: the one that RAY_ADDRESS names or that runs on this "
        "machine, else one of this machine alone is started and ended with us",
    )
    node_ip: str | None = Field(
        None,
        description="which node of the cluster this is, where several run on one machine; none: Ray finds it",
    )
    fleet: str = Field(
        "degas", description="name of these workers; several fleets share a cluster under different names"
    )

    min_workers: int = Field(1, ge=1, le=1024, description="fewest workers")
    max_workers: int | None = Field(
        None, ge=1, le=1024, description="most workers; none: as few as the fewest, so their number is fixed"
    )
    num_cpus: float = Field(
        1.0,
        ge=0,
        le=1024,
        description="CPUs that Ray sets aside for a worker; also its threads, unless these are set",
    )
    num_gpus: float | None = Field(
        None,
        ge=0,
        le=64,
        description="GPUs for a worker; none: 1 where the device is cuda, or auto and the cluster has GPUs; else 0",
    )
    worker_ports: str | None = Field(
        None, description="<first>-<last>, from which a worker takes a free port of its node; none: any"
    )

    target_load: float = Field(
        0.8,
        gt=0,
        le=1,
        description="scaling: part of its rows, and of its pages, that each worker should have in use",
    )
    scale_up_s: float = Field(
        5.0,
        ge=0,
        le=3600,
        description="scaling: more workers once that was exceeded for so long; at most twice as many",
    )
    scale_down_s: float = Field(
        120.0, ge=0, le=86400, description="scaling: fewer once fewer would have sufficed for all of so long"
    )
    worker_drain_s: float = Field(
        300.0, ge=0, le=86400, description="how long a worker that is taken away may finish what it has begun"
    )

    run_gateway: bool = Field(
        True, description="run the gateways here too; no: they run elsewhere and ask the registry"
    )
    registry: str | None = Field(
        None,
        description="<host>:<port> on which the workers' endpoints are told to gateways elsewhere, at /workers; none: off",
    )
    keys_dir: str | None = Field(
        None,
        description="folder of CURVE keys as `degas keys FOLDER --apart` makes it, made if it is not there; none: new keys "
        "each time, gone afterwards",
    )
    worker_keys_dir: str | None = Field(
        None,
        description="folder on every node that has the worker's keys already; none: they are sent to the nodes through Ray",
    )

    @field_validator("address")
    @classmethod
    def _check_address(cls, value: str | None) -> str | None:
        if value is not None and not _is_address(value) and value != "local":
            raise ValueError(
                f"{value!r} is not <host>:<port> of a Ray head, such as 10.0.0.1:6379, or 'local'; run this on a node of the "
                f"cluster, not through a Ray client (ray://)"
            )
        return value

    @field_validator("fleet")
    @classmethod
    def _check_fleet(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError(f"{value!r} is not a name of at most 64 letters, digits, '_', '.' and '-'")
        return value

    @field_validator("worker_ports")
    @classmethod
    def _check_ports(cls, value: str | None) -> str | None:
        if value is not None:
            found = _PORTS.fullmatch(value)
            if not found or not 1 <= int(found[1]) <= int(found[2]) <= 65535:
                raise ValueError(f"{value!r} is not <first>-<last>, such as 5600-5663")
        return value

    @field_validator("registry")
    @classmethod
    def _check_registry(cls, value: str | None) -> str | None:
        if value is not None and not _is_address(value, lowest=0):
            raise ValueError(f"{value!r} is not <host>:<port>, such as 10.0.0.1:5550")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> RayConfig:
        if self.max_workers is not None and self.max_workers < self.min_workers:
            raise ValueError(
                f"max_workers {self.max_workers} is below min_workers {self.min_workers}; a safe value is none"
            )
        if not self.run_gateway and self.registry is None:
            raise ValueError(
                "run_gateway is off and there is no registry, so no gateway would find the workers; set registry to "
                "<host>:<port>, such as 10.0.0.1:5550"
            )
        if not self.run_gateway and self.keys_dir is None:
            raise ValueError(
                "run_gateway is off, and gateways elsewhere need the keys that the workers know; set keys_dir to a folder, "
                "such as ./keys"
            )
        if self.worker_keys_dir is not None and self.keys_dir is None:
            raise ValueError(
                "worker_keys_dir needs keys_dir, the gateways' half of the same keys, such as ./keys"
            )
        return self

    def limits(self) -> ScaleLimits:
        """How the number of workers is decided."""
        most = self.min_workers if self.max_workers is None else self.max_workers
        return ScaleLimits(self.min_workers, most, self.target_load, self.scale_up_s, self.scale_down_s)

    def ports(self) -> tuple[int, int] | None:
        """First and last port for workers; None for any."""
        if self.worker_ports is None:
            return None
        first, _, last = self.worker_ports.partition("-")
        return int(first), int(last)

    def registry_address(self) -> tuple[str, int] | None:
        """Where the registry listens; None where there is none."""
        host, _, port = (self.registry or "").rpartition(":")
        return (host.strip("[]"), int(port)) if self.registry else None


def _is_address(value: str, lowest: int = 1) -> bool:
    found = _ADDRESS.fullmatch(value)
    return found is not None and lowest <= int(found[2]) <= 65535


RAY_SETTINGS: Final = Section(
    "ray",
    RayConfig,
    groups={
        "address": "the cluster",
        "min_workers": "the workers",
        "target_load": "how many there are",
        "run_gateway": "gateways and keys",
    },
)
