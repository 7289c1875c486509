"""Every kernel compiles for the GPU it is written for, in fp32 too, as the tests on a GPU run it: minutes of compiling."""

from __future__ import annotations

from tests.unit.worker.kernels.test_compiles import check_compiles


def test_every_kernel_compiles_in_fp32_too() -> None:
    check_compiles("--fp32")
