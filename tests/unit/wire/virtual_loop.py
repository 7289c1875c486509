"""An asyncio loop on a virtual clock, without descriptors: what is due runs when `settle` is called, in one thread."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, TypeVarTuple

from worker.sim.timeline import VirtualClock

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Readable(Protocol):
    """Stands for a descriptor."""

    signalled: bool


class VirtualLoop(asyncio.AbstractEventLoop):
    """First in, first out, as asyncio's own. Whatever a callback raises is kept in `faults`."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.readables: dict[int, Readable] = {}
        self.faults: list[BaseException] = []
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[asyncio.TimerHandle] = []
        self._readers: dict[int, asyncio.Handle] = {}

    @classmethod
    def on(cls, clock: VirtualClock) -> Self:
        """A loop on `clock`. What it leaves out of asyncio's interface raises NotImplementedError."""
        return cls(clock)

    # ------------------------------------------------------------ what asyncio calls

    def time(self) -> float:
        return self.clock.now()

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, timer)
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Generator[Any, None, T] | Coroutine[Any, Any, T], **_: object
    ) -> asyncio.Task[T]:
        return asyncio.Task(coro, loop=self)

    def add_reader(self, fd: FileDescriptorLike, callback: Callable[[*Ts], object], *args: *Ts) -> None:
        assert isinstance(fd, int)
        self._readers[fd] = asyncio.Handle(callback, args, self, None)

    def remove_reader(self, fd: FileDescriptorLike) -> bool:
        assert isinstance(fd, int)
        return self._readers.pop(fd, None) is not None

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.faults.append(context.get("exception") or RuntimeError(str(context)))

    # ------------------------------------------------------------ what tests call

    @property
    def num_timers(self) -> int:
        """Timers still to come."""
        return sum(not timer.cancelled() for timer in self._timers)

    @property
    def num_readers(self) -> int:
        """Descriptors watched."""
        return len(self._readers)

    def settle(self, max_rounds: int = 10_000) -> None:
        """Run rounds until nothing is due at this moment."""
        for _ in range(max_rounds):
            if not self._round():
                return
        raise AssertionError("the loop does not come to rest")

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine that needs no time to pass; returns its result."""
        task = self.create_task(work)
        self.settle()
        return task.result()

    def within(self, call: Callable[[], Any]) -> Any:
        """Call something as if from a callback of this loop."""
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            return call()
        finally:
            asyncio._set_running_loop(before)

    def _round(self) -> bool:
        """What is ready now, once each; what that makes ready comes in the next round. False if there was nothing."""
        for fd, handle in reversed(
            self._readers.items()
        ):  # a monitor's news before the frames that came first
            if self.readables[fd].signalled:
                self._ready.append(handle)
        while self._timers and (self._timers[0].cancelled() or self._timers[0].when() <= self.time()):
            self._ready.append(heapq.heappop(self._timers))
        num = len(self._ready)
        asyncio._set_running_loop(self)
        try:
            for _ in range(num):
                handle = self._ready.popleft()
                if not handle.cancelled():
                    handle._run()
        finally:
            asyncio._set_running_loop(None)
        return num > 0
