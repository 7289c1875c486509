"""The cases that are measured on a GPU agree with their references: a run there should fail at nothing that fails here."""

from __future__ import annotations

import pytest
import torch

from loadtest.gpu.kernel_cases import Bench


@pytest.mark.slow
def test_every_case_agrees_with_its_reference() -> None:
    for make in Bench(torch.device("cpu"), smoke=True).cases():
        case = make()
        found, expected = case.kernel[0]().clone(), case.reference[0]().clone()
        assert torch.allclose(found.float(), expected.float(), rtol=1e-4, atol=1e-4), case.name
