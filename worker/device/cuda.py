"""Owns one CUDA device: its compute and copy streams, events, pinned memory and captured graphs. Decode thread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from worker.device.base import Event, Graph, Stream

WARM_UP_RUNS = 2  # lets libraries pick algorithms and allocate workspaces before they are recorded


class CudaEvent:
    """A timing event: the bubble is measured between them."""

    __slots__ = ("raw",)

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.raw = torch.cuda.Event(enable_timing=True)
        self.raw.record(stream)

    def query(self) -> bool:
        return bool(self.raw.query())

    def synchronize(self) -> None:
        self.raw.synchronize()

    def elapsed_s(self, later: Event) -> float:
        assert isinstance(later, CudaEvent)
        return float(self.raw.elapsed_time(later.raw)) / 1e3


class CudaStream:
    """A CUDA stream. Entering it does not synchronise anything."""

    __slots__ = ("raw",)

    def __init__(self, device: torch.device, priority: int) -> None:
        self.raw = torch.cuda.Stream(device, priority=priority)

    def record(self) -> CudaEvent:
        return CudaEvent(self.raw)

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self.raw.wait_event(event.raw)

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        with torch.cuda.stream(self.raw):
            yield


class CudaGraph:
    """A captured graph in the device's shared memory pool."""

    __slots__ = ("_graph",)

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def replay(self) -> None:
        self._graph.replay()


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
        self._memory_share = memory_share
        self._compute = CudaStream(self.torch_device, priority=-1)
        self.compute: Stream = self._compute
        # Small copies should slip in between kernels, not queue behind a batch of them.
        self.copy: Stream = CudaStream(self.torch_device, priority=-2)
        self._pool: Any = None  # torch's own name for a pool's handle is private

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def capture(self, body: Callable[[], None]) -> Graph:
        stream = self._compute.raw
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                body()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # All graphs replay on the one compute stream, in order, so they may share one memory pool (I1).
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            body()
        self._pool = graph.pool()
        return CudaGraph(graph)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def free_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return int(free - (1 - self._memory_share) * total)
