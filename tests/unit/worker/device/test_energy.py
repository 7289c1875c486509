"""Energy counters: wrapping, which zones count, machines that do not tell, and a price that is not known."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from worker.device.energy import Counter, EnergyMeter, open_meter
from worker.loop.costs import Costs


def zone(folder: Path, name: str, kind: str, micro_j: int) -> Path:
    made = folder / name
    made.mkdir(parents=True)
    (made / "name").write_text(kind + "\n")
    (made / "energy_uj").write_text(f"{micro_j}\n")
    (made / "max_energy_range_uj").write_text("1000000000\n")
    return made


def test_packages_count_and_their_parts_do_not(tmp_path: Path) -> None:
    first, second = (
        zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000),
        zone(tmp_path, "intel-rapl:1", "package-1", 0),
    )
    core, whole = zone(tmp_path, "intel-rapl:0:0", "core", 0), zone(tmp_path, "intel-rapl:2", "psys", 0)
    meter = open_meter("cpu", tmp_path)
    assert meter is not None
    meter.close()
    for one, micro_j in ((first, 7_500_000), (second, 1_000_000), (core, 9_000_000), (whole, 9_000_000)):
        (one / "energy_uj").write_text(str(micro_j))
    meter.update()
    assert meter.joules == pytest.approx(3.5)


def test_a_counter_wraps_and_one_that_cannot_be_read_is_unknown_from_then_on() -> None:
    readings = iter([990.0, 5.0, 10.0])
    counter = Counter(lambda: next(readings), range_j=1000.0)
    meter = EnergyMeter([counter])
    meter.update()
    meter.update()
    assert meter.joules == pytest.approx(20.0)
    meter.update()  # no reading is left
    assert meter.joules is None
    assert Costs(None, meter).figures(10.0) == {}


@pytest.mark.parametrize("device", ["cpu", "sim", "cuda"])
def test_a_machine_that_does_not_tell_has_no_meter(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_meter(device, tmp_path / "nothing") is None


def test_one_unreadable_package_means_no_meter(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (zone(tmp_path, "intel-rapl:1", "package-1", 1) / "energy_uj").unlink()
    assert open_meter("cpu", tmp_path) is None


def test_a_gpu_is_read_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    milli_j = [1000]
    nvml = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-7": "handle"}[uuid],
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: milli_j[0],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr("worker.device.energy._uuid", lambda: "GPU-7")
    meter = open_meter("cuda")
    assert meter is not None
    meter.close()
    milli_j[0] = 4000
    meter.update()
    assert meter.joules == pytest.approx(3.0)


def test_what_has_no_price_has_no_figure() -> None:
    assert Costs().figures(10.0) == {}
    assert Costs(3.6).figures(1000.0) == {"price_per_hour": 3.6, "cost_total": pytest.approx(1.0)}
