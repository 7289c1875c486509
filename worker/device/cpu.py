"""Owns the CPU as a device: every operation runs inline when it is queued. Decode thread.

An eager torch operation on a second thread re-takes Python's lock for each op and so overlaps with nothing;
running inline is what measures best for models of a few million parameters (docs/lab-notes.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import time
from collections.abc import Callable, Iterator

import torch

from worker.device.contract import Event, Graph, Stream
from worker.device.memory import free_memory

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEEP_BYTES = UNKNOWN_BYTES = 1 << 30
GIVE_BACK_BYTES = 3 << 19  # what a quantiser works with stays below it


class CpuEvent:
    """An event that has passed as soon as it exists. With `late`, `query` says False until the event was waited for, so
    that tests drive the pipeline as deep as with a device that is always behind the host."""

    __slots__ = ("_late", "_recorded_s")

    def __init__(self, late: bool) -> None:
        self.record(late)

    def record(self, late: bool) -> None:
        """Record the event at the present time."""
        self._late = late
        self._recorded_s = time.perf_counter()

    def query(self) -> bool:
        return not self._late

    def synchronize(self) -> None:
        self._late = False

    def elapsed_s(self, later: Event) -> float:
        assert isinstance(later, CpuEvent)
        return later._recorded_s - self._recorded_s


class CpuStream:
    """Program order is stream order."""

    __slots__ = ("_late",)

    def __init__(self, late: bool) -> None:
        self._late = late

    def record(self, event: Event | None = None) -> CpuEvent:
        if event is None:
            return CpuEvent(self._late)
        assert isinstance(event, CpuEvent)
        event.record(self._late)
        return event

    def wait(self, event: Event) -> None:
        pass  # nothing to wait for: queued work has run already

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        yield


class CpuGraph:
    """Replays by calling: there is nothing to capture."""

    __slots__ = ("replay",)

    def __init__(self, body: Callable[[], None]) -> None:
        self.replay = body


def has_bf16() -> bool:
    """Whether this processor multiplies bf16 itself (AVX-512 BF16, AMX, or Arm's). Elsewhere torch emulates it, and
    prompts take ten times as long as in fp32."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def available_bytes() -> int:
    """Memory that can be allocated without swapping; 0 where the system does not say."""
    return free_memory().num_bytes


def _keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks: it would hand megabyte temporaries back after each step and fault
    them in again, thousands of pages a step (2.7× on attention alone at 32 rows)."""
    _set_thresholds(KEEP_BYTES)


def _set_thresholds(num_bytes: int, *, trim: bool = False) -> None:
    """From which size on glibc gives a block pages of its own, which go back when it is freed."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_TRIM_THRESHOLD, num_bytes)
        libc.mallopt(M_MMAP_THRESHOLD, num_bytes)
        if trim:
            libc.malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another libc has no mallopt: the worker only runs slower


@contextlib.contextmanager
def giving_back() -> Iterator[None]:
    """For a block that makes what will stay, such as weights: memory freed in it goes back at once. Kept, as in serving,
    temporaries lie between what stays, and the holes that they leave fit nothing that comes after them: 1.7 GB of weights
    then took 2.1."""
    _set_thresholds(GIVE_BACK_BYTES)
    try:
        yield
    finally:
        _set_thresholds(KEEP_BYTES, trim=True)


class CpuDevice:
    """The `cpu` device. `events_look_late` is for tests of the pipeline."""

    def __init__(self, *, num_threads: int | None = None, events_look_late: bool = False) -> None:
        if num_threads:
            torch.set_num_threads(num_threads)
        _keep_freed_memory()
        self.name = "cpu"
        self.torch_device = torch.device("cpu")
        self.captures = False
        self.capture_broke = False
        self.shares_memory = True
        self._events_look_late = events_look_late
        self.compute: Stream = CpuStream(events_look_late)
        self.copy: Stream = CpuStream(events_look_late)
        self.uploads: Stream = self.compute
        self.aside: Stream = self.compute

    def event(self) -> Event:
        return CpuEvent(self._events_look_late)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def hand_over(self, tensor: torch.Tensor) -> None:
        pass  # one stream

    def capture(self, body: Callable[[], None], *, warm_up: bool = True, aside: bool = False) -> Graph:
        return CpuGraph(body)

    def synchronize(self) -> None:
        pass

    def free_bytes(self) -> int:
        return free_memory().num_bytes or UNKNOWN_BYTES
