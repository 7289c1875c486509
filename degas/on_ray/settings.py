"""Owns what `degas ray up` was told: its own settings, and those of workers and gateways in the same flags, variables and file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from degas.on_ray.config import RAY_SETTINGS, RayConfig
from degas.settings import GRPC_PORT
from gateway.config import GATEWAY_SETTINGS, GatewayConfig
from shared.settings import ConfigError, Given, read_file
from worker.config import WORKER_SETTINGS, WorkerConfig

SECTIONS: Final = (RAY_SETTINGS, WORKER_SETTINGS, GATEWAY_SETTINGS)
OWN: Final = {"worker": ("endpoint", "curve_key_dir", "drain_s"), "gateway": ("workers", "curve_key_dir")}
"""Settings that `degas ray up` sets itself: how workers and gateways meet, and how long a worker may take to end."""


@dataclass(frozen=True, slots=True)
class UpSettings:
    """Everything `degas ray up` needs. Settings of workers and gateways: their variables, with their texts."""

    ray: RayConfig
    worker: WorkerConfig
    gateway: GatewayConfig
    worker_variables: Mapping[str, str]
    gateway_variables: Mapping[str, str]


def resolve(
    flags: Mapping[str, object], environment: Mapping[str, str], file_path: Path | None = None
) -> UpSettings:
    """Flags before variables before the file, and all of it checked. Raises `ConfigError`."""
    file = read_file(file_path, environment)
    found: dict[str, dict[str, Given]] = {}
    for section in SECTIONS:
        own = {name: value for name, value in flags.items() if name in section.settings}
        found[section.name] = section.gather(own, environment, file)
    for name, settings in OWN.items():
        for setting in settings:
            if (given := found[name].get(setting)) is not None:
                raise ConfigError(
                    f"{given.origin} sets {setting} of the {name}, which degas ray up sets itself; take it out (keys: "
                    f"--keys-dir, draining: --worker-drain-s)"
                )
    worker = found["worker"]
    if (model := worker.get("model")) is not None:
        worker["model"] = Given(_absolute(str(model.value)), model.origin)
    found["gateway"].setdefault("grpc_port", Given(GRPC_PORT, "default of degas ray up"))
    ray = RAY_SETTINGS.parse(found["ray"])
    if "threads" not in worker and ray.num_cpus >= 1:
        worker["threads"] = Given(int(ray.num_cpus), "--num-cpus")
    return UpSettings(
        ray,
        WORKER_SETTINGS.parse(worker),
        GATEWAY_SETTINGS.parse(found["gateway"]),
        WORKER_SETTINGS.texts(worker),
        GATEWAY_SETTINGS.texts(found["gateway"]),
    )


def _absolute(model: str) -> str:
    """A path as every node understands it, if it is one that exists here: actors run in folders of their own."""
    path = Path(model).expanduser()
    return str(path.resolve()) if "/" in model and path.exists() else model


def gpus_and_device(asked: float | None, device: str, in_cluster: float) -> tuple[float, str]:
    """GPUs for each worker, and its device. One that was given no GPU computes on the CPU, whatever its node has."""
    gpus = asked if asked is not None else float(device == "cuda" or (device == "auto" and in_cluster > 0))
    return gpus, "cpu" if device == "auto" and not gpus else device
