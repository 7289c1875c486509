"""The compiled operations for 64-bit Arm: cross-compiled, run under qemu, and compared with this machine's own and with fp64.

`make test-arm` installs what that takes and runs it. Elsewhere only what compilers refuse shows, where there is a cross compiler.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from ctypes import CDLL
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.arm import cases as made
from tests.arm.cases import Cases, Result
from tests.unit.worker.models.paged_driver import relative_error
from worker.native.build import ARM_KINDS, FLAGS, SOURCE, _units
from worker.native.library import load

COMPILER = shutil.which(os.environ.get("DEGAS_ARM_CXX", "aarch64-linux-gnu-g++"))
QEMU = shutil.which("qemu-aarch64")
PROCESSORS = {"armv82": ("max", "NEON, sdot int8"), "armv8": ("cortex-a57", "NEON, int8")}
"""For each kind an emulated processor, of which the second has no dot products, and what the library calls its instructions."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
compiles = pytest.mark.skipif(COMPILER is None, reason="no cross compiler for 64-bit Arm")
runs = pytest.mark.skipif(
    COMPILER is None or QEMU is None or not os.environ.get("DEGAS_TEST_ARM"), reason="make test-arm runs this"
)


@compiles
@pytest.mark.parametrize("kind", ARM_KINDS)
def test_the_source_is_understood(kind: str) -> None:
    """All of it for the first kind; of the others what differs."""
    assert COMPILER is not None
    units = [unit for unit in _units(SOURCE) if kind == next(iter(ARM_KINDS)) or unit.stem == "integers"]
    command = [
        COMPILER,
        *FLAGS,
        *ARM_KINDS[kind][0],
        "-Wall",
        "-Werror",
        "-Wno-unused-function",
        "-fsyntax-only",
    ]
    done = subprocess.run([*command, *map(str, units)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module", params=ARM_KINDS)
def arm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs `calls.cpp` with the operations compiled for a kind of processor."""
    assert COMPILER is not None and QEMU is not None
    program = tmp_path_factory.mktemp(request.param) / "calls"
    sources = [*_units(SOURCE), Path(__file__).with_name("calls.cpp")]
    flags = [flag for flag in (*FLAGS, *ARM_KINDS[request.param][0]) if flag != "-fPIC"]
    subprocess.run([COMPILER, *flags, "-static", *map(str, sources), "-o", str(program)], check=True)
    cpu, name = PROCESSORS[request.param]
    command = [QEMU, "-cpu", cpu, str(program)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"4 {name}\n"
    return command


@pytest.fixture(scope="module")
def own() -> CDLL:
    found = load()
    if found is None or not found.has_integers():
        pytest.skip("nothing to compare with: no compiler here, or a processor without products")
    return found


def _cases(lanes: int, own: CDLL) -> Cases:
    torch.manual_seed(0)
    # Panels are of at most 64 outputs.
    return Cases(lanes, lambda kind, outputs, inputs: own.bytes_packed(kind, -(-outputs // 64) * 64, inputs))


def _differences(
    results: list[Result], others: list[Result], found: list[Tensor], want: list[Tensor]
) -> list[str]:
    wrong = []
    for result, other in zip(results, others, strict=True):
        got, expected = result.of(found), other.of(want)
        same = torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
        if not same and (result.bound == 0.0 or not relative_error(got, expected) < result.bound):
            wrong.append(f"{result.label}: {relative_error(got.float(), expected.float())}")
    return wrong


@runs
@pytest.mark.parametrize("what", ["products", "extremes", "finishes", "roundings", "along_rows"])
def test_what_another_processor_computes(arm: list[str], own: CDLL, what: str, tmp_path: Path) -> None:
    here, there = _cases(own.vector_lanes(), own), _cases(4, own)
    for each in (here, there):
        torch.manual_seed(1)
        getattr(made, what)(each)
    found, want = there.tape.run_by(arm, tmp_path), here.tape.run_here(own)
    assert all(result.of(found).isfinite().all() for result in there.results if what != "roundings")
    assert _differences(there.results, here.results, found, want) == []


@runs
def test_attention(arm: list[str], own: CDLL, tmp_path: Path) -> None:
    here, there = _cases(own.vector_lanes(), own), _cases(4, own)
    made.attention(here)
    attended = made.attention(there)
    found, want = there.tape.run_by(arm, tmp_path), here.tape.run_here(own)
    assert _differences(there.results, here.results, found, want) == []
    for case, result, keys, values in attended:
        case.keys, case.values = keys.of(found), values.of(found)
        assert relative_error(result.of(found), case.expected()) < result.bound, result.label


@runs
def test_whole_layers(arm: list[str], own: CDLL, tmp_path: Path) -> None:
    here, there, threaded = _cases(own.vector_lanes(), own), _cases(4, own), _cases(4, own)
    for each, threads in ((here, 1), (there, 1), (threaded, 3)):
        torch.manual_seed(2)
        made.layers(each, threads)
    found, want = there.tape.run_by(arm, tmp_path), here.tape.run_here(own)
    assert _differences(there.results, here.results, found, want) == []
    shared = threaded.tape.run_by(arm, tmp_path)
    assert all(torch.equal(one.of(shared), one.of(found)) for one in there.results), "by threads"
