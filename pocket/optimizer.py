"""Owns the weights while they are trained: float32 masters, their moments and their average; training process.

Matrices inside the blocks follow Muon (orthogonalised momentum), everything else AdamW. The network computes
on bf16 copies, written back after every step.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_MATRIX = re.compile(
    r"(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])|proj_mlp\.fc[12]|patch_emb|_decoder\.fc1)\.weight$"
)
_NO_DECAY = re.compile(r"(bias|ln\d?\.weight|post_ln\.weight|pos_emb|_features)$")


def orthogonalise(matrices: Tensor, num_steps: int = 5) -> Tensor:
    """Nearest (semi-)orthogonal matrices, roughly, by Newton and Schulz: (N, rows, cols) to the same, bf16."""
    x = matrices.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    done: Tensor = x.mT if tall else x
    return done


class Optimizer:
    """Steps a network whose parameters may be bf16; all state lives in `state`, by name, in float32."""

    def __init__(self, network: nn.Module, weight_decay: float = 0.02, average: float = 0.995) -> None:
        self.parameters = dict(network.named_parameters())
        self.weight_decay = weight_decay
        self.average = average
        self.state: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            held = parameter.detach().float()
            self.state[f"master.{name}"] = held.clone()
            self.state[f"average.{name}"] = held.clone()
            self.state[f"first.{name}"] = torch.zeros_like(held)
            if not _MATRIX.search(name):
                self.state[f"second.{name}"] = torch.zeros_like(held)

    @torch.no_grad()
    def step(self, step: int, rate: float) -> None:
        """One update; `step` counts from 0, `rate` is the learning rate."""
        decay_of_average = min(self.average, (step + 1) / (step + 20))
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            grad = parameter.grad.float()
            master, first = self.state[f"master.{name}"], self.state[f"first.{name}"]
            if _MATRIX.search(name):
                first.mul_(0.95).add_(grad)
                ahead = grad.add(first, alpha=0.95)
                # A fused qkv is three matrices: orthogonalised as one, they would share a spectrum.
                parts = 3 if name.endswith("qkv.weight") else 1
                update = orthogonalise(ahead.view(parts, -1, ahead.shape[-1])).float()
                # This scale gives updates the root mean square that Adam's have, so both share a rate.
                update = update * 0.2 * max(update.shape[-2:]) ** 0.5
                update = update.reshape(grad.shape)
            else:
                second = self.state[f"second.{name}"]
                first.lerp_(grad, 0.1)
                second.lerp_(grad.square(), 0.03)
                above = second.div(1 - 0.97 ** (step + 1)).sqrt_().add_(1e-8)
                update = first.div(1 - 0.9 ** (step + 1)).div_(above).mul_(0.6)
            if not _NO_DECAY.search(name):
                master.mul_(1 - rate * self.weight_decay)
            master.add_(update, alpha=-rate)
            self.state[f"average.{name}"].lerp_(master, 1 - decay_of_average)
            parameter.copy_(master)
            parameter.grad = None

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the state of a checkpoint, and set the network's weights from it."""
        if state.keys() != self.state.keys():
            raise ValueError("the checkpoint belongs to another network")
        for name, held in state.items():
            self.state[name].copy_(held)
        for name, parameter in self.parameters.items():
            parameter.copy_(self.state[f"master.{name}"])
