"""Owns the device that is measured, or the CPU that stands in for it in a smoke run, and its copy bandwidth. Main thread."""

from __future__ import annotations

import statistics
import time

import torch

from worker.device.contract import Device
from worker.device.cpu import CpuDevice
from worker.device.cuda import CudaDevice
from worker.native.build import forbid


class ReplayingCpuDevice(CpuDevice):
    """A CPU that claims to capture graphs, so that a smoke run takes the path of captured graphs with its padding."""

    def __init__(self) -> None:
        super().__init__(num_threads=2)
        self.captures = True
        self.shares_memory = False


def open_device(*, smoke: bool) -> Device:
    """The GPU; in a smoke run the CPU that stands in for one. Open it before a model is made: weights packed for the CPU's
    compiled operations are nothing that kernels could read."""
    if not smoke:
        return CudaDevice()
    forbid()
    return ReplayingCpuDevice()


def measure_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes a second of a large copy on the device, read and written bytes both counted; median of 9."""
    source = torch.empty(num_bytes // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    rates: list[float] = []
    for _ in range(12):
        started_s = time.perf_counter()
        if device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            target.copy_(source)
            stop.record()
            stop.synchronize()
            seconds = start.elapsed_time(stop) / 1e3
        else:
            target.copy_(source)
            seconds = time.perf_counter() - started_s
        rates.append(2 * source.nbytes / seconds)
    return statistics.median(rates[3:])
