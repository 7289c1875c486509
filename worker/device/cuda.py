"""Owns one CUDA device: its compute and copy streams, events, pinned memory and captured graphs. Decode thread.

The compute stream is made the thread's current one: weights, memory, warm-up and steps are all queued there, so no
operation can fall on the default stream, which torch's streams do not wait for.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from worker.device.contract import CaptureBroken, CaptureFailed, Event, Graph, Stream

WARM_UP_RUNS = 2  # the second run finds what the first has cached: allocator blocks, cuBLAS workspaces


class CudaEvent:
    """A timing event; the bubble is the time between two of them. CUDA makes it at its first record."""

    __slots__ = ("raw",)

    def __init__(self) -> None:
        self.raw = torch.cuda.Event(enable_timing=True)

    def query(self) -> bool:
        return bool(self.raw.query())

    def synchronize(self) -> None:
        # Spins without Python's lock: a blocking event would wake this thread tens of microseconds late.
        self.raw.synchronize()

    def elapsed_s(self, later: Event) -> float:
        assert isinstance(later, CudaEvent)
        return float(self.raw.elapsed_time(later.raw)) / 1e3


class CudaStream:
    """A CUDA stream. Entering it does not synchronise anything."""

    __slots__ = ("raw",)

    def __init__(self, device: torch.device, priority: int) -> None:
        self.raw = torch.cuda.Stream(device, priority=priority)

    def record(self, event: Event | None = None) -> CudaEvent:
        if event is None:
            event = CudaEvent()
        assert isinstance(event, CudaEvent)
        event.raw.record(self.raw)
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self.raw.wait_event(event.raw)  # waits for the event's last record; later records do not matter

    def use(self) -> AbstractContextManager[None]:
        return _Current(self.raw)


class _Current(AbstractContextManager[None]):
    """Makes a stream the thread's current one for a block; cheaper than `torch.cuda.stream`, which asks for devices."""

    __slots__ = ("_previous", "_raw")

    def __init__(self, raw: torch.cuda.Stream) -> None:
        self._raw = raw

    def __enter__(self) -> None:
        self._previous = torch.cuda.current_stream()
        if self._previous != self._raw:
            torch.cuda.set_stream(self._raw)

    def __exit__(self, *_: object) -> None:
        if self._previous != self._raw:
            torch.cuda.set_stream(self._previous)


class CudaGraph:
    """A captured graph in the device's shared memory pool."""

    __slots__ = ("replay",)

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self.replay: Callable[[], None] = graph.replay  # keeps the graph alive


class CudaDevice:
    """The `cuda` device. Raises RuntimeError with advice when torch sees no GPU."""

    def __init__(self, index: int = 0, *, memory_share: float = 0.9) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError(
                "torch sees no CUDA device: check `nvidia-smi`, and that torch is a CUDA build "
                f"(this one is {torch.__version__}); `--device cpu` runs without"
            )
        self.name = f"cuda:{index}"
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)
        self.captures = True
        self.capture_broke = False
        self.shares_memory = False
        self._memory_share = memory_share
        self._compute = CudaStream(self.torch_device, priority=-1)
        self.compute: Stream = self._compute
        # Small copies should slip in between kernels, not queue behind a batch of them.
        self.copy: Stream = CudaStream(self.torch_device, priority=-2)
        # Not the copy stream, where an upload would queue behind outputs that wait for the step before.
        self.uploads: Stream = CudaStream(self.torch_device, priority=-2)
        # Pictures are encoded here: their kernels take what multiprocessors decode rows leave.
        self._aside = CudaStream(self.torch_device, priority=0)
        self.aside: Stream = self._aside
        # Work that was queued before this device was opened (on another device's memory) comes first.
        self._compute.raw.wait_stream(torch.cuda.current_stream())
        torch.cuda.set_stream(self._compute.raw)
        # All graphs replay on the one compute stream, in order, so they may share one memory pool (I1). Nothing in the
        # pool is needed after a replay: a step's results lie in its slot.
        self._pool: Any = torch.cuda.graph_pool_handle()  # torch's own name for the type is private
        # Graphs of the other stream run beside those, so they must not share memory with them.
        self._aside_pool: Any = torch.cuda.graph_pool_handle()
        self._keepers: dict[bool, torch.cuda.CUDAGraph] = {}  # by `aside`

    def event(self) -> Event:
        return CudaEvent()

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def hand_over(self, tensor: torch.Tensor) -> None:
        tensor.record_stream(self._compute.raw)

    def capture(self, body: Callable[[], None], *, warm_up: bool = True, aside: bool = False) -> Graph:
        """See `contract.Device`. Not through `torch.cuda.graph`, which synchronises the device and empties the
        allocator's cache each time: a graph may be captured while steps are in flight."""
        if self.capture_broke:
            raise CaptureBroken("an earlier recording broke off; nothing is captured any more")
        stream = self._aside if aside else self._compute
        if aside:
            stream.raw.wait_stream(self._compute.raw)  # the body reads what was made there
        with stream.use():
            if warm_up:
                try:
                    for _ in range(WARM_UP_RUNS):
                        body()
                except torch.OutOfMemoryError as error:  # smaller shapes may still fit
                    torch.cuda.empty_cache()
                    raise CaptureFailed(f"no memory to run it: {str(error)[:300]}") from error
                stream.raw.synchronize()  # errors of the body are raised here, not during the capture
            if aside not in self._keepers:
                # A pool whose last graph is gone is gone as well, and torch (2.11) refuses to record into its id again:
                # this graph holds it as long as the device lives, whatever becomes of a runner's graphs.
                self._keepers[aside] = self._record(self._fill_a_byte, aside)
            return CudaGraph(self._record(body, aside))

    def _record(self, body: Callable[[], None], aside: bool) -> torch.cuda.CUDAGraph:
        """Record into one of the pools, on the current stream. Raises CaptureBroken."""
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()  # a collected event or graph would call CUDA in the middle of the recording
        try:
            # Other threads may use CUDA meanwhile; this one is checked.
            graph.capture_begin(
                pool=self._aside_pool if aside else self._pool, capture_error_mode="thread_local"
            )
            try:
                body()
            finally:
                graph.capture_end()
        except Exception as error:
            # `capture_end` of a broken recording raises before it tells the allocator that recording is over: what is
            # allocated from now on may land in the pool of graphs, and another recording would be mixed with this.
            self.capture_broke = True
            raise CaptureBroken(f"{type(error).__name__}: {str(error)[:300]}") from error
        finally:
            if collecting:
                gc.enable()
        return graph

    def _fill_a_byte(self) -> None:
        torch.zeros(1, dtype=torch.uint8, device=self.torch_device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()  # what loading left in the allocator is free as well
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return int(free - (1 - self._memory_share) * total)
