"""Owns the switch to Triton's interpreter, set before any kernel is imported: these tests need no GPU."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="kernel tests need Triton (its interpreter): pip install triton")

import torch
import triton.language as tl
from triton.runtime import interpreter


def _patch_language_once() -> None:
    """Triton's interpreter replaces some 250 functions of `triton.language` at each launch, and looks for them again at each call
    of a function like `tl.sum` within: a third of these tests' time. Here they are replaced once, for good."""
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: SimpleNamespace(restore=lambda: None)


_patch_language_once()


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield


@pytest.fixture
def last_first() -> Callable[[], AbstractContextManager[None]]:
    """For a block, a launch's programs run in the opposite order: on a GPU any of them may be the last to arrive."""
    interpreter_builder = interpreter.interpreter_builder

    @contextmanager
    def turned() -> Iterator[None]:
        place = interpreter_builder.set_grid_idx

        def opposite(*index: int) -> None:
            place(*(size - 1 - at for size, at in zip(interpreter_builder.grid_dim, index, strict=True)))

        interpreter_builder.set_grid_idx = opposite
        try:
            yield
        finally:
            del interpreter_builder.set_grid_idx

    return turned
