"""Owns the small protocol every torch device offers the runner: streams, events, pinned memory, graphs. Decode thread."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch


def pin(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The host tensor, pinned if `device` needs it: a copy from pageable memory would hold the host until the stream is
    through. torch hands out a pinned block again only when its copies are done."""
    return host if device.type == "cpu" else host.pin_memory()


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`, queued on the current stream; the host does not wait."""
    return pin(host, device).to(device, non_blocking=True)


class Event(Protocol):
    """A point in a stream's order."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def synchronize(self) -> None:
        """Block until the device has passed it."""

    def elapsed_s(self, later: Event) -> float:
        """Device seconds from this event to `later`; both must have been passed."""


class CaptureFailed(RuntimeError):
    """The device refused to record a graph, before it began. The work still runs eagerly: slower, with the same
    results; other captures may succeed."""


class CaptureBroken(RuntimeError):
    """A recording broke off midway. The allocator may go on believing that it records, so nothing may be captured any
    more: at start-up this is fatal, later the work runs eagerly."""


class Stream(Protocol):
    """An ordered queue of device work."""

    def record(self, event: Event | None = None) -> Event:
        """Mark the end of the work queued now, with `event` (which moves here) or with a new event."""

    def wait(self, event: Event) -> None:
        """Let later work of this stream start only after `event`."""

    def use(self) -> AbstractContextManager[None]:
        """Queue the torch operations of the block on this stream."""


class Graph(Protocol):
    """A captured sequence of operations over fixed memory."""

    def replay(self) -> None:
        """Queue it on the current stream."""


class Device(Protocol):
    """What the runner needs of a device. `compute` and `copy` are its two streams; `aside` is one of lower priority, for
    work that others need not wait for, or the compute stream itself."""

    name: str
    torch_device: torch.device
    compute: Stream
    copy: Stream
    uploads: Stream  # of steps' inputs; the compute stream itself where nothing is copied
    aside: Stream
    captures: bool  # whether capture() records a graph, so that shapes must be padded to buckets
    capture_broke: bool  # whether a recording broke off midway, so that none may be begun any more
    shares_memory: bool  # whether pinned memory is the device's own, so that nothing needs to be uploaded

    def event(self) -> Event:
        """A new event, made at start-up and recorded again and again in the loop."""

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Host memory that copies to and from the device without blocking."""

    def hand_over(self, tensor: torch.Tensor) -> None:
        """Say that memory made on the stream `aside` is read on the compute stream, before it is given up."""

    def capture(self, body: Callable[[], None], *, warm_up: bool = True, aside: bool = False) -> Graph:
        """Record `body`'s operations on the compute stream, where recording does not run them.

        `aside`: on the stream of that name, with a memory pool of its own: such a graph may run beside the others.
        `warm_up` runs `body` first: libraries then choose algorithms, and kernels are compiled and loaded, which is not
        possible during a recording. Without it the same body must have run in the same shapes before. Raises
        CaptureFailed where nothing was recorded, CaptureBroken where a recording broke off or one did before.
        """

    def synchronize(self) -> None:
        """Wait for everything queued on the device."""

    def free_bytes(self) -> int:
        """Memory that KV pages may still take."""
