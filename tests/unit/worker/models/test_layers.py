"""Layers built of packed products equal torch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from worker.models.layers import LayerNorm, Mlp
from worker.models.linear import PackedLinear


def test_mlp_and_norm() -> None:
    torch.manual_seed(2)
    one, two = (torch.randn(48, 32), torch.randn(48)), (torch.randn(32, 48), torch.randn(32))
    mlp = Mlp(PackedLinear(*one), PackedLinear(*two))
    x = torch.randn(3, 32)
    want = F.linear(F.gelu(F.linear(x, *one), approximate="tanh"), *two)
    torch.testing.assert_close(mlp(x), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mlp.add(x, x), want + x, rtol=1e-4, atol=1e-4)
    weight, bias = torch.randn(32), torch.randn(32)
    torch.testing.assert_close(LayerNorm(weight, bias)(x), F.layer_norm(x, [32], weight, bias))
