"""Plants one-line faults in a copy of the worker, one at a time, and shows that the loop's tests catch each.

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
SUITE = ["tests/unit/worker/test_loop.py", "tests/unit/worker/test_state_machine.py"]


@dataclass(frozen=True)
class Mutant:
    """One planted fault: `before` becomes `after` in `file`."""

    name: str
    file: str
    before: str
    after: str


MUTANTS = [
    Mutant(
        "free pages while a row is in flight",
        "worker/scheduler.py",
        "if seq.inflight_refs or seq.phase is not Phase.RUNNING:",
        "if seq.phase is not Phase.RUNNING:",
    ),
    Mutant(
        "forget to count a decode row's reference",
        "worker/scheduler.py",
        "            seq.num_sampled += 1\n            seq.inflight_refs += 1",
        "            seq.num_sampled += 1",
    ),
    Mutant(
        "reuse a slot before its commit",
        "worker/pipeline.py",
        "step = InFlight(self._free.popleft(), plan",
        "step = InFlight(0, plan",
    ),
    Mutant(
        "launch one token past max_tokens",
        "worker/scheduler.py",
        "elif seq.num_sampled < seq.max_tokens:",
        "elif seq.num_sampled <= seq.max_tokens:",
    ),
    Mutant("commit the newest step first", "worker/pipeline.py", "return self._in_flight[0] if", "return self._in_flight[-1] if"),
    Mutant("advance a grammar twice", "worker/scheduler.py", "seq.constraint.advance(token_id)", "seq.constraint.advance(token_id); seq.constraint.advance(token_id)"),
    Mutant(
        "forget cancel during prefill",
        "worker/scheduler.py",
        "        if seq is None or seq.finish is not None:\n            return None",
        "        if seq is None or seq.finish is not None or seq.in_prefill:\n            return None",
    ),
    Mutant(
        "take a zombie's token",
        "worker/scheduler.py",
        "            if seq.finish is not None:\n                out.num_zombies += 1",
        "            if False:\n                out.num_zombies += 1",
    ),
    Mutant("off by one in the token index", "worker/scheduler.py", "out.indexes.append(index)", "out.indexes.append(index + 1)"),
    Mutant("off by one in the write position", "worker/staging.py", "seq.pages[p // page_tokens] * page_tokens + p % page_tokens", "seq.pages[p // page_tokens] * page_tokens + (p + 1) % page_tokens"),
    Mutant("skip a page boundary", "worker/scheduler.py", "or self._grow(seq, seq.num_computed + 1):", "or True:"),
    Mutant("key the prefix cache without its tenant", "worker/prefix_cache.py", '"little") + seq.tenant.encode())', '"little"))'),
    Mutant("key the prefix without its picture", "worker/prefix_cache.py", "                digest.update(picture.digest)\n    return", "                pass\n    return"),
    Mutant("remember pages of generated coordinates by id", "worker/prefix_cache.py", "if seq.is_spatial:", "if False:"),
    Mutant("split the bidirectional prefix", "worker/scheduler.py", "if start + num < seq.prefix_tokens:", "if False:"),
    Mutant("sample constrained rows before their predecessor commits", "worker/engine.py", "while (oldest := self.pipeline.oldest) is not step:", "while False:"),
    Mutant("a NaN row's token is taken", "worker/scheduler.py", "            if bad[i]:", "            if False:"),
    Mutant("lose a preempted sequence's values", "worker/device/sim.py", "for index, value in seq.values.items():", "for index, value in ():"),
    Mutant("forget a row on release", "worker/scheduler.py", "self.free_rows.append(seq.row)", "pass"),
    Mutant("draw by row, not by sequence", "worker/staging.py", "uniform(s.seed, index) if", "uniform(s.seed + 1, index) if"),
    Mutant("evict a page that is held", "worker/prefix_cache.py", "            self._idle.pop(page, None)\n", ""),
    Mutant("copy outputs before sampling", "worker/device/sim.py", "self.copy.wait(self.compute.record())", "pass"),
    Mutant("two terminal events on cancel", "worker/engine.py", "                if seq is not None:\n                    self._reports.send_finish(seq)", "                if seq is not None:\n                    self._reports.send_finish(seq)\n                    self._reports.send_finish(seq)"),
]  # fmt: skip


NO_FAULT = Mutant("no fault at all", "worker/scheduler.py", "class Scheduler:", "class Scheduler:")


def survives(mutant: Mutant, folder: Path) -> tuple[bool, float]:
    """Run the suite over a copy with the fault planted; True when no test fails."""
    for name in ("worker", "shared", "tests"):
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
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--timeout=120", *SUITE]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=300, check=False)
    return done.returncode == 0, time.perf_counter() - started_s


def main() -> int:
    """Plant each fault; exit 1 if any survives."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    with tempfile.TemporaryDirectory() as folder:
        if not survives(NO_FAULT, Path(folder))[0]:
            print("the suite fails without any fault planted: what follows would mean nothing")
            return 2
    chosen = [mutant for mutant in MUTANTS if word in mutant.name]
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
