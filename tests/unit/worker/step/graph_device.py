"""Owns a device for tests that records and replays as CUDA graphs do, on the CPU.

A capture records every operation with the very tensors it touched; a replay runs those operations again on those
tensors, and nothing else: what Python decided while recording stays decided, and a buffer put in another's place
goes unnoticed, as on a GPU. As there, recording does not change memory (what it wrote is put back); memory that
operations allocate while recording belongs to the graph, and is poisoned whenever the graph is not running, for
the next graph of the shared pool may hold it; and an operation that would make the host wait fails the capture.

Triton kernels that run in its interpreter are recorded as they are launched. Allocating is no work of the device and
replays as nothing, so what no operation has written since is still poisoned.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from worker.device.contract import CaptureBroken, CaptureFailed, Event, Graph
from worker.device.cpu import CpuDevice

ALLOCATES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "equal", "_pin_memory")


def storage(tensor: Tensor) -> int:
    """An address that all views of the same memory share; 0 for packed weights, which have none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


def poison(tensor: Tensor) -> None:
    """Fill with what nobody can compute with unnoticed."""
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.fill_(float("nan"))
    elif tensor.dtype is torch.bool:
        tensor.logical_not_()
    else:
        tensor.fill_(-1 if tensor.dtype is torch.uint8 else 1 << 20 if tensor.element_size() > 2 else 77)


class _Recorder(TorchDispatchMode):
    """Lists operations as they run, and undoes what they do to memory that was there before."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.operations: list[tuple[Callable[..., Any], Any, Any, list[tuple[int, Tensor]]]] = []
        self.own: dict[int, Tensor] = {}  # by storage: what the graph allocated
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # written memory, and what it held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in WAITS:
            raise RuntimeError(f"{name} makes the host wait for the device: not allowed in a capture")
        given = {storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)} - {0}
        self._keep_written(func, args, kwargs)
        result = func(*args, **kwargs)
        made = []
        for place, leaf in enumerate(tree_leaves(result)):
            if isinstance(leaf, Tensor) and storage(leaf) not in given:
                self.own[storage(leaf)] = leaf
                made.append((place, leaf))
        if name in ALLOCATES:
            poison(result)
            return result
        is_view = not made and not any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
        if not is_view:
            self.operations.append((func, args, kwargs, made))
        return result

    def _keep_written(self, func: Any, args: Any, kwargs: Any) -> None:
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            self._keep(args[place] if place < len(args) else kwargs.get(argument.name))

    def _keep(self, value: Any) -> None:
        for tensor in tree_leaves(value):
            if (
                not isinstance(tensor, Tensor)
                or storage(tensor) in self.own
                or storage(tensor) in self.before
            ):
                continue
            whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            self.before[storage(tensor)] = (whole, whole.clone())

    @contextmanager
    def launches(self) -> Iterator[None]:
        """Within it launches of interpreted kernels, of which no dispatch mode is told, are recorded as well. Which
        of its arguments a kernel writes is not known, so all are put back."""
        interpreter = sys.modules.get("triton.runtime.interpreter")
        if interpreter is None:
            yield
            return
        executor = interpreter.GridExecutor
        launch = executor.__call__

        def record(grid: Any, *args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():
                self._keep((args, kwargs))
                launch(grid, *args, **kwargs)
            self.operations.append((partial(launch, grid), args, kwargs, []))

        executor.__call__ = record
        try:
            yield
        finally:
            executor.__call__ = launch


class RecordedGraph:
    """One capture. `num_replays` counts."""

    def __init__(self, body: Callable[[], None], replayed: list[RecordedGraph]) -> None:
        self.body = body
        self.num_operations = 0
        self._replayed = replayed
        recorder = _Recorder()
        try:
            with recorder.launches(), recorder:
                body()
        except RuntimeError as error:
            raise CaptureBroken(str(error)) from error
        finally:
            for memory, content in recorder.before.values():
                memory.copy_(content)
        self._operations = recorder.operations
        self._own = list(recorder.own.values())
        self.num_operations = len(self._operations)
        self._poison()

    def replay(self) -> None:
        """Run every recorded operation again on its own tensors."""
        for func, args, kwargs, made in self._operations:
            leaves = tree_leaves(func(*args, **kwargs))
            for place, target in made:
                target.copy_(leaves[place])
        self._poison()
        self._replayed.append(self)

    def _poison(self) -> None:
        for tensor in self._own:
            poison(tensor)


class GraphDevice(CpuDevice):
    """A CPU that captures: shapes are padded to buckets, inputs uploaded, decode steps replayed."""

    def __init__(
        self, *, events_look_late: bool = True, refuses: Callable[[int], bool] | None = None
    ) -> None:
        self.num_events = 0
        super().__init__(num_threads=1, events_look_late=events_look_late)
        self.captures = True
        self.shares_memory = False
        self.graphs: list[RecordedGraph] = []
        self.replayed: list[RecordedGraph] = []
        self.num_warm_ups = 0
        self._refuses = refuses or (lambda number: False)
        self._attempts = 0

    def capture(self, body: Callable[[], None], *, warm_up: bool = True, aside: bool = False) -> Graph:
        self._attempts += 1
        if self._refuses(self._attempts):
            raise CaptureFailed("refused for the test")
        if warm_up:
            self.num_warm_ups += 1
            body()
        if self.capture_broke:
            raise CaptureBroken("an earlier recording broke off")
        try:
            graph = RecordedGraph(body, self.replayed)
        except CaptureBroken:
            self.capture_broke = True
            raise
        self.graphs.append(graph)
        return graph

    def event(self) -> Event:
        self.num_events += 1
        return super().event()
