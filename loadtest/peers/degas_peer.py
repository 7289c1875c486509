"""Owns Degas's engine as a peer: the real scheduler, pipeline and runner, ticked as the decode thread would. Main thread."""

from __future__ import annotations

import time
from pathlib import Path
from queue import SimpleQueue

import torch

from loadtest.peers.side import Run, Spec, Stamp, read_clocks, serve, timed_run
from shared.protocol import FromWorker, ImageInput, StepOutputs, Submit, pack_i32, unpack_i32, unpack_i64
from worker.device.cpu import CpuDevice
from worker.device.huge_pages import use_huge_pages
from worker.formats.open_source import open_source
from worker.loop.engine import Engine
from worker.loop.inbox import Inbox, Received
from worker.models.registry import load_model
from worker.native.library import use_threads
from worker.native.products import use_activations
from worker.schedule.limits import SchedulerLimits
from worker.schedule.pages import PagePool
from worker.schedule.prefix_cache import PrefixCache
from worker.schedule.scheduler import Scheduler
from worker.step.staging import StepShape
from worker.step.torch_runner import TorchRunner

GATEWAY, EPOCH = b"bench", 1
CONTEXT_TOKENS, PAGE_TOKENS = 2048, 16
MAX_STEP_TOKENS = 2048  # of prompts: more would only take memory


class TokenLog:
    """Stands in for the I/O thread: keeps every step's message, and when it was handed over."""

    def __init__(self) -> None:
        self.steps: list[tuple[Stamp, StepOutputs]] = []

    def send(self, gateway: bytes, message: FromWorker, payloads: list[bytes] | None = None) -> None:
        """For one gateway. Raises RuntimeError on anything but tokens."""
        if not isinstance(message, StepOutputs):
            raise RuntimeError(f"the engine refused a row: {message}")
        self.steps.append((read_clocks(), message))

    def broadcast(self, message: FromWorker) -> None:
        """Heartbeats are of no interest here."""


class DegasSide:
    """The engine over a TorchRunner. Takes up to `rows` rows of `prompt_tokens` in, `row_tokens` in and out.

    A step takes up to `step_tokens` of prompts, None: all of them.
    """

    version = "degas"

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        rows: int,
        row_tokens: int,
        prompt_tokens: int,
        depth: int = 2,
        threads: int = 1,
        step_tokens: int | None = None,
    ) -> None:
        self._threads = threads
        use_threads(threads)
        device = CpuDevice()
        with torch.inference_mode():
            self.model = load_model(open_source(folder), device.torch_device, dtype, lambda *_: None)
        use_huge_pages()
        num_pages = rows * -(-row_tokens // PAGE_TOKENS) + 2 * rows + 1
        pool = PagePool(num_pages, PAGE_TOKENS)
        step_tokens = step_tokens or rows * prompt_tokens + rows
        context_tokens = max(CONTEXT_TOKENS, row_tokens)
        limits = SchedulerLimits(
            max_rows=rows,
            step_tokens=step_tokens,
            mixed_tokens=step_tokens,
            max_sequence_tokens=context_tokens,
        )
        with torch.inference_mode():
            runner = TorchRunner(
                self.model,
                device,
                StepShape(
                    max_rows=rows,
                    max_sequence_tokens=context_tokens,
                    step_tokens=step_tokens,
                    page_tokens=PAGE_TOKENS,
                    num_pages=num_pages,
                    vocab_size=self.model.card.vocab_size,
                    num_slots=max(2, depth),
                ),
            )
        self._inbox: Inbox = SimpleQueue()
        self._log = TokenLog()
        self.engine = Engine(
            Scheduler(limits, pool, PrefixCache(pool)),
            runner,
            self.model.card,
            inbox=self._inbox,
            outbox=self._log,
            clock=time.perf_counter,
            epoch=EPOCH,
            depth=depth,
        )
        self._next_id = 0

    def warm(self, prompts: list[list[int]], new_tokens: int) -> str:
        """Run once, to warm up; Degas has nothing to choose."""
        self.run(prompts, new_tokens)
        return ""

    def use_threads(self) -> None:
        """Compute on as many threads as at first, whatever another engine of this process has set since."""
        use_threads(self._threads)

    def first_token(
        self, prompt: list[int], images: list[ImageInput], frames: list[bytes]
    ) -> tuple[int, float]:
        """The first token behind a prompt with pictures, and seconds from its submission. Raises RuntimeError if refused."""
        self._log.steps.clear()
        number = self._next_id
        self._next_id += 1
        submit = Submit(EPOCH, number, str(number), pack_i32(prompt), 1, images=images, ignore_eos=True)
        begin_s = time.perf_counter()
        self._inbox.put(Received(GATEWAY, submit, frames))
        while self.engine.tick() or not self._inbox.empty():
            pass
        (wall_s, _), step = next(one for one in self._log.steps if unpack_i32(one[1].token_ids))
        return unpack_i32(step.token_ids)[0], wall_s - begin_s

    def run(self, prompts: list[list[int]], new_tokens: int) -> Run:
        """Decode `new_tokens` for every prompt, greedily."""
        start = read_clocks()
        first_id = self._next_id
        self._log.steps.clear()
        for prompt in prompts:
            submit = Submit(
                EPOCH,
                self._next_id,
                str(self._next_id),
                pack_i32(prompt),
                new_tokens,
                ignore_eos=True,
            )
            self._inbox.put(Received(GATEWAY, submit))
            self._next_id += 1
        while self.engine.tick():
            pass
        tokens: list[list[int]] = [[] for _ in prompts]
        first = start
        for at, step in self._log.steps:
            for sequence_id, token_id in zip(
                unpack_i64(step.sequence_ids), unpack_i32(step.token_ids), strict=True
            ):
                row = tokens[sequence_id - first_id]
                if not row:
                    first = at
                row.append(token_id)
        return timed_run(tokens, start, first, self._log.steps[-1][0])


def make(spec: Spec) -> DegasSide:
    """The engine as `degas worker` would set it up, with rows and pages for what is asked."""
    use_activations(spec.activations)  # type: ignore[arg-type]
    return DegasSide(
        Path(spec.folder),
        getattr(torch, spec.dtype),
        spec.max_rows,
        spec.prompt_tokens + spec.new_tokens,
        spec.prompt_tokens,
        threads=spec.threads,
        step_tokens=min(spec.max_rows * spec.prompt_tokens, MAX_STEP_TOKENS) + spec.max_rows,
    )


if __name__ == "__main__":
    serve(make)
