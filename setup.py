"""The wheel's layout: one top-level package, `degas`, with the rooms inside it under `degas/_rooms`.

The repository keeps the rooms at its top level and imports them as `shared`, `gateway`, `worker` …; `degas/__init__.py`
puts their folder on the import path. Everything else about the distribution stands in pyproject.toml.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ("shared", "gateway", "worker", "loadtest", "pocket")
DATA = {
    "gateway": ["web/*"],
    "gateway.native": ["*.c"],
    "worker": ["pocket/weights/*"],
    "worker.native": ["*.cpp", "*.h"],
    "loadtest.bench": ["*.txt"],
    "loadtest.capacity": ["*.toml"],
    "loadtest.gpu": ["*.sh", "*.txt"],
}


def installed(package: str) -> str:
    """What a room's package is called inside the wheel."""
    return f"degas._rooms.{package}"


here = [room for room in ROOMS if Path(room).is_dir()]  # an image's build copies only what it serves with
inside = find_packages(include=[pattern for room in here for pattern in (room, f"{room}.*")])

setup(
    packages=[*find_packages(include=["degas", "degas.*"]), *map(installed, inside)],
    package_dir={installed(room): room for room in here},
    package_data={"degas": ["py.typed"]} | {installed(name): files for name, files in DATA.items()},
)
