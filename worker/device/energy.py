"""Owns how much energy the device has used: RAPL or NVML, read once a second. The thread `energy`; readers see a float.

Linux shows a processor's own counters below `/sys/class/powercap` (one of micro-joules for each package, which wraps
at `max_energy_range_uj`); since 2020 only root may read them. NVML counts a GPU's milli-joules since its driver was
loaded (`nvmlDeviceGetTotalEnergyConsumption`, from Volta on). Where neither can be read there is no meter.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import structlog

log = structlog.get_logger()

POWERCAP: Final = Path("/sys/class/powercap")
PERIOD_S: Final = 1.0


class Counter:
    """A counter of energy that starts again from zero at `range_j`, as joules that only grow from the first reading on."""

    def __init__(self, read_j: Callable[[], float], range_j: float = 0.0) -> None:
        self._read_j = read_j
        self._range_j = range_j
        self._last_j = read_j()
        self.joules = 0.0

    def update(self) -> None:
        """Take a reading. Raises what the reading raises."""
        now_j = self._read_j()
        grown_j = now_j - self._last_j
        if grown_j < 0:
            grown_j = max(
                0.0, grown_j + self._range_j
            )  # without a range it began anew: what was missed is not known
        self._last_j = now_j
        self.joules += grown_j


class EnergyMeter:
    """The joules that some counters have counted since this was made."""

    def __init__(self, counters: list[Counter], period_s: float = PERIOD_S) -> None:
        self._counters = counters
        self._period_s = period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="energy", daemon=True)
        self.joules: float | None = 0.0  # None: reading failed, and what follows is not known

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def update(self) -> None:
        """Read every counter once."""
        try:
            for counter in self._counters:
                counter.update()
        except Exception as error:  # NVML's errors have no common base without the library
            self.joules = None
            log.warning("energy_unknown", error=str(error))
            return
        self.joules = sum(counter.joules for counter in self._counters)

    def _run(self) -> None:
        while self.joules is not None and not self._stop.wait(self._period_s):
            self.update()


def open_meter(device: str, folder: Path = POWERCAP) -> EnergyMeter | None:
    """A started meter for the device `cuda` or `cpu`; None where the machine does not tell, and for others."""
    counters = _nvml_counters() if device == "cuda" else _rapl_counters(folder) if device == "cpu" else []
    if not counters:
        return None
    meter = EnergyMeter(counters)
    meter.start()
    return meter


def _rapl_counters(folder: Path) -> list[Counter]:
    """One for each package of the machine. Its parts (core, uncore, dram of some) are in it or come on top of others' use."""
    counters: list[Counter] = []
    try:
        for zone in sorted(folder.glob("intel-rapl:*")):
            if zone.name.count(":") > 1 or not (zone / "name").read_text().startswith("package"):
                continue
            range_j = int((zone / "max_energy_range_uj").read_text()) / 1e6
            counters.append(Counter(_reader(zone / "energy_uj"), range_j))
    except (OSError, ValueError):
        return []  # all of them or none: a part of the machine's use would pass for the whole
    return counters


def _reader(path: Path) -> Callable[[], float]:
    return lambda: int(path.read_text()) / 1e6


def _nvml_counters() -> list[Counter]:
    """The GPU that torch calls its first, if the package `nvidia-ml-py` is installed."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(_uuid())
        return [Counter(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)]
    except Exception:  # no package, no driver, a GPU that does not count
        return []


def _uuid() -> str:
    import torch

    return f"GPU-{torch.cuda.get_device_properties(0).uuid}"
