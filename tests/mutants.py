"""Plants one-line faults in a copy of the worker and the gateway, one at a time, and shows that each is caught:
those of the loop and the host's work by the loop's tests, those of the wire and its ends by the tests of all joined.

make mutants                 all of them
make mutants ARGS='zombie'   those whose name holds the word
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOOP = ("tests/unit/worker/loop/test_loop.py", "tests/unit/worker/loop/test_state_machine.py")
HOST = tuple(
    f"tests/unit/worker/{name}.py" for name in ("step/test_staging", "loop/test_masks", "schedule/test_depth")
)
ENCODERS = ("tests/unit/wire/test_encoder_scenes.py",)
LENDING = ("tests/unit/gateway/core/test_lending.py",)
WIRE = ("tests/unit/wire/test_scenes.py", "tests/unit/wire/test_state_machine.py")


@dataclass(frozen=True)
class Mutant:
    """One planted fault: `before` becomes `after` in `file`."""

    name: str
    file: str
    before: str
    after: str
    suite: tuple[str, ...] = LOOP


MUTANTS = [
    Mutant(
        "free pages while a row is in flight",
        "worker/schedule/scheduler.py",
        "if seq.inflight_refs or not seq.holds:",
        "if not seq.holds:",
    ),
    Mutant(
        "forget to count a decode row's reference",
        "worker/schedule/scheduler.py",
        "            seq.num_sampled += 1\n            seq.inflight_refs += 1",
        "            seq.num_sampled += 1",
    ),
    Mutant(
        "reuse a slot before its commit",
        "worker/schedule/pipeline.py",
        "step = InFlight(self._free.popleft(), plan",
        "step = InFlight(0, plan",
    ),
    Mutant(
        "launch one token past max_tokens",
        "worker/schedule/scheduler.py",
        "elif seq.num_sampled < seq.max_tokens:",
        "elif seq.num_sampled <= seq.max_tokens:",
    ),
    Mutant("commit the newest step first", "worker/schedule/pipeline.py", "return self._in_flight[0] if", "return self._in_flight[-1] if"),
    Mutant("advance a grammar twice", "worker/schedule/scheduler.py", "constraint.advance(token_id)", "constraint.advance(token_id); constraint.advance(token_id)"),
    Mutant(
        "forget cancel during prefill",
        "worker/schedule/scheduler.py",
        "        if seq is None or seq.finish is not None:\n            return None",
        "        if seq is None or seq.finish is not None or seq.in_prefill:\n            return None",
    ),
    Mutant(
        "take a zombie's token",
        "worker/schedule/scheduler.py",
        "            if seq.finish is not None:\n                out.num_zombies += 1",
        "            if False:\n                out.num_zombies += 1",
    ),
    Mutant("off by one in the token index", "worker/schedule/scheduler.py", " indexes.append(index)", " indexes.append(index + 1)"),
    Mutant("off by one in the write position", "worker/step/staging.py", "seq.pages[p // page_tokens] * page_tokens + p % page_tokens", "seq.pages[p // page_tokens] * page_tokens + (p + 1) % page_tokens"),
    Mutant("skip a page boundary", "worker/schedule/scheduler.py", "or self._grow(seq, seq.num_computed + 1):", "or True:"),
    Mutant("key the prefix cache without its tenant", "worker/schedule/prefix_cache.py", '"little") + seq.tenant.encode())', '"little"))'),
    Mutant("key a block without its picture", "worker/schedule/prefix_cache.py", "            digest.update(picture.page_key)\n    return", "            pass\n    return"),
    Mutant("key a page without its picture", "worker/schedule/prefix_cache.py", "                    digest.update(picture.page_key)\n            for", "                    pass\n            for"),
    Mutant("remember pages of generated coordinates by id", "worker/schedule/prefix_cache.py", "if seq.is_spatial:", "if False:"),
    Mutant("split the bidirectional prefix", "worker/schedule/budget.py", "if first < start + num < end:", "if False:"),
    Mutant("sample constrained rows before their predecessor commits", "worker/loop/engine.py", "while (oldest := self.pipeline.oldest) is not step:", "while False:"),
    Mutant("accept the decode rows of a mixed step twice", "worker/loop/engine.py", "first = 0 if early is None else len(plan.decode)", "first = 0"),
    Mutant("a NaN row's token is taken", "worker/schedule/scheduler.py", "            if bad[i]:", "            if False:"),
    Mutant("lose a preempted sequence's values", "worker/sim/runner.py", "for index, value in seq.values.items():", "for index, value in ():"),
    Mutant("forget a row on release", "worker/schedule/scheduler.py", "self.free_rows.append(seq.row)", "pass"),
    Mutant("draw by row, not by sequence", "worker/step/staging.py", "uniforms([s.seed for s in settings]", "uniforms([s.seed + 1 for s in settings]"),
    Mutant("evict a page that is held", "worker/schedule/prefix_cache.py", "            self._idle.pop(page, None)\n", ""),
    Mutant("keep from routers that a page was evicted", "worker/schedule/prefix_cache.py", "            self._events.on_removed(keys)", "            pass"),
    Mutant("copy outputs before sampling", "worker/sim/runner.py", "self.copy.wait(self.compute.record())", "pass"),
    Mutant("two terminal events on cancel", "worker/loop/commands.py", "                if seq is not None:\n                    self._reports.send_finish(seq)", "                if seq is not None:\n                    self._reports.send_finish(seq)\n                    self._reports.send_finish(seq)"),
]  # fmt: skip


WIRE_MUTANTS = [
    Mutant("take tokens of a dead epoch", "gateway/core/worker_link.py", "        if isinstance(message, wire.StepOutputs):\n            if message.epoch != self.epoch:", "        if isinstance(message, wire.StepOutputs):\n            if False:", WIRE),
    Mutant("believe a dead epoch's last word", "gateway/core/worker_link.py", "if self.ready is None or fatal.epoch != self.epoch:", "if self.ready is None:", WIRE),
    Mutant("a new epoch loses nothing of the old", "gateway/core/worker_link.py", "        if self.ready is not None:\n            self._lose(", "        if self.ready is not None:\n            self._life.on_lost(); log.info(", WIRE),
    Mutant("never notice silence", "gateway/decisions/link_state.py", "silent_s >= self._patience_s else", "False else", WIRE),
    Mutant("forget what a dead worker had said", "gateway/core/worker_link.py", "            self._socket.drain_all()\n", "            pass\n", WIRE),
    Mutant("a send eats the edge", "gateway/core/worker_socket.py", "            self._drain_scheduled = True\n            self._loop.call_soon(self.drain)\n\n    def _has", "            pass\n\n    def _has", WIRE),
    Mutant("pass over a gap", "gateway/decisions/stream.py", "if index != self.next_index:", "if index < self.next_index:", WIRE),
    Mutant("take a repeated token", "gateway/decisions/stream.py", "if index != self.next_index:", "if index > self.next_index:", WIRE),
    Mutant("off by one in what a finish must have counted", "gateway/decisions/stream.py", "num_unsent = 1 if", "num_unsent = 2 if", WIRE),
    Mutant("forget to retry", "gateway/core/dispatch.py", "if verdict is Verdict.RETRY}", "if False}", WIRE),
    Mutant("quarantine without evidence", "gateway/decisions/recovery.py", "if record.num_crashes >= 3 and singled_out:", "if record.num_crashes >= 2:", WIRE),
    Mutant("tried again behind newcomers", "gateway/core/placement.py", "(AHEAD if flight.record.num_attempts else 0)", "0", WIRE),
    Mutant("newcomers take the places of those who wait", "gateway/core/dispatch.py", "self._placement.num_returning = len(self.recovery)", "pass", WIRE),
    Mutant("retry what had begun", "gateway/core/dispatch.py", "[flight for flight in lost if not flight.has_shown]", "list(lost)", WIRE),
    Mutant("retry all at once", "gateway/decisions/recovery.py", "if self._trial.flights or not self._file:", "if not self._file:", WIRE),
    Mutant("leak a flight on a crash", "gateway/core/dispatch.py", "        for flight in held:\n            self._take_off(flight)\n", "", WIRE),
    Mutant("leave orphans running", "gateway/core/service.py", "            link.cancel(orphans)\n", "            pass\n", WIRE),
    Mutant("a place at a worker leaks", "gateway/core/dispatch.py", "            worker.occupancy.leave(flight.request.tenant, self._now())\n", "            pass\n", WIRE),
    Mutant("two terminal events for a client that cancels", "gateway/core/flights.py", "        if self.state.end is None:\n            self._events.stop_sequence(self)\n", "        if True:\n            self._events.stop_sequence(self)\n", WIRE),
    Mutant("never tell the worker of a cancel", "gateway/core/flights.py", "            self._events.stop_sequence(self)\n            self.state.cancel()", "            self.state.cancel()", WIRE),
    Mutant("a listener's fault escapes", "gateway/core/flights.py", "            except Exception as fault:\n                self._on_listener_fault(flight, fault)\n                return", "            except ConnectionError as fault:\n                self._on_listener_fault(flight, fault)\n                return", WIRE),
    Mutant("write to a connection that is closing", "gateway/core/lending.py", "in closing.items() if is_closing()]", "in closing.items() if False]", LENDING),
    Mutant("write past what others have waiting", "gateway/core/lending.py", "in watched.items() if others_wait()]", "in watched.items() if False]", LENDING),
    Mutant("lend a stream inside a character", "gateway/core/tokens.py", "return None if self._held or self._texts", "return None if self._texts", LENDING),
    Mutant("the compiled loop passes over a gap", "gateway/native/burst.c", "|| first[i] != s->next_index ||", "||", LENDING),
    Mutant("never cut off a client that stalls", "gateway/transport/bounded.py", "elif now_s - self._progress_s >= self._stall_s:", "elif False:", WIRE),
    Mutant("no bound on what a client leaves unread", "gateway/transport/bounded.py", "if unread > self._limit_bytes:", "if False:", WIRE),
    Mutant("take a request for a dead epoch", "worker/loop/commands.py", "if message.epoch != self._epoch:", "if False:", WIRE),
    Mutant("a lease that ran out goes untold", "worker/wire/transport.py", "            self._inbox.put(LeaseEnded(gateway))", "            pass", WIRE),
    Mutant("a gateway's messages do not renew its lease", "worker/wire/transport.py", "        lease.until_s = self._now() + lease.lease_s\n", "        pass\n", WIRE),
    Mutant("malformed frames go uncounted", "gateway/core/service.py", "flights.on_outputs(outputs)\n        except ValueError:\n            link.note(\"malformed\")\n", "flights.on_outputs(outputs)\n        except ValueError:\n            pass\n", WIRE),
]  # fmt: skip


ENCODER_MUTANTS = [
    Mutant("let an encoder's pictures go down with it", "gateway/core/dispatch.py", "        self.encoders.on_lost(worker, crashed=crashed)\n", "        pass\n", ENCODERS),
    Mutant("wait for a picture after the request is over", "gateway/core/dispatch.py", "        self.encoders.forget(flight)\n", "        pass\n", ENCODERS),
    Mutant("blame a request for a worker that never had it", "gateway/core/dispatch.py", "        lost = [flight for flight in held if flight.staged is None]", "        lost = held", ENCODERS),
    Mutant("leave a trial only after a second attempt", "gateway/core/dispatch.py", "        if not flight.record.has_lost and", "        if not flight.record.num_attempts > 1 and", ENCODERS),
    Mutant("take features of another size", "gateway/core/encoders.py", "        if len(payloads[0]) != _num_bytes(job.image, job.format):", "        if False:", ENCODERS),
    Mutant("send a worker the pictures it has", "gateway/core/encoders.py", "            if key not in worker.held and", "            if", ENCODERS),
    Mutant("believe a new worker to have the last one's pictures", "gateway/core/service.py", "        worker.held = Held(link.ready.limits.feature_bytes)", "        pass", ENCODERS),
    Mutant("let a picture kill one encoder after the other, then workers", "gateway/core/encoders.py", "        if job.num_crashes >= MAX_LOSSES and job.was_alone:", "        if False:", ENCODERS),
    Mutant("encode a given picture again", "worker/sim/runner.py", "    if picture.features is None or offset < 0:", "    if True:", ENCODERS),
]  # fmt: skip


HOST_MUTANTS = [
    Mutant("show a row's old pages", "worker/step/staging.py", "            if pages is not shown:\n                num_shown = 0\n", "", HOST),
    Mutant("forget that padding overwrote a table", "worker/step/staging.py", "    views.held[start:end] = [NOTHING] * (end - start)\n", "", HOST),
    Mutant("forget that a sequence moved to another row", "worker/step/staging.py", "        and rows == views.rows\n", "", HOST),
    Mutant("let a row run on without its mask", "worker/schedule/scheduler.py", " or seq.mask is AWAITED:", ":", HOST),
    Mutant("resume a row whose mask is being built", "worker/schedule/scheduler.py", "best.mask is AWAITED or not", "not", HOST),
    Mutant("use a mask built ahead twice", "worker/schedule/sequence.py", "        self.mask = mask_moved(self.mask, MaskLife.AWAITED if self.is_mask_slow else MaskLife.DUE)\n        self.ready_mask = None\n", "", HOST),
    Mutant("never pace a slow row", "worker/loop/masks.py", "seq.on_slow_mask()", "pass", HOST),
    Mutant("stay deep whatever it costs", "worker/schedule/depth.py", "min(self.loss, key=", "max(self.loss, key=", HOST),
]  # fmt: skip


NO_FAULT = {
    suite: Mutant(
        "no fault at all", "worker/schedule/scheduler.py", "class Scheduler:", "class Scheduler:", suite
    )
    for suite in (LOOP, WIRE, ENCODERS, HOST, LENDING)
}


def survives(mutant: Mutant, folder: Path) -> tuple[bool, float]:
    """Run the suite over a copy with the fault planted; True when no test fails."""
    for name in ("gateway", "worker", "shared", "tests"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "weights", "data")
        )
    path = folder / mutant.file
    source = path.read_text()
    if source.count(mutant.before) != 1:
        raise SystemExit(
            f"mutant {mutant.name!r}: its text stands {source.count(mutant.before)} times in {mutant.file}"
        )
    path.write_text(source.replace(mutant.before, mutant.after))
    started_s = time.perf_counter()
    options = ["-x", "-q", "-p", "no:cacheprovider", "--timeout=500", "--hypothesis-profile=unshrunk"]
    command = [sys.executable, "-m", "pytest", *options, *mutant.suite]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=600, check=False)
    return done.returncode == 0, time.perf_counter() - started_s


def main() -> int:
    """Plant each fault; exit 1 if any survives."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [
        mutant for mutant in (*MUTANTS, *WIRE_MUTANTS, *ENCODER_MUTANTS, *HOST_MUTANTS) if word in mutant.name
    ]
    for suite in dict.fromkeys(mutant.suite for mutant in chosen):
        with tempfile.TemporaryDirectory() as folder:
            if not survives(NO_FAULT[suite], Path(folder))[0]:
                print("the suite fails without any fault planted: what follows would mean nothing")
                return 2
    survivors = 0
    for mutant in chosen:
        with tempfile.TemporaryDirectory() as folder:
            alive, seconds = survives(mutant, Path(folder))
        survivors += alive
        print(f"{'SURVIVED' if alive else 'caught  '} {seconds:5.1f} s  {mutant.name}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} planted faults caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
