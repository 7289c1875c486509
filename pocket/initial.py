"""Owns the weights a training run starts from; runs once in the training process."""

import math

import torch
from torch import Tensor, nn

from pocket.network import Network, NetworkConfig, VisionConfig
from pocket.objective import AuxiliaryHeads
from pocket.scenes import draw_scene, scene_rng
from pocket.tiling import cut_crops


class Trainee(nn.Module):
    """The network and the heads that are thrown away."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.network = Network(config)
        self.heads = AuxiliaryHeads(config.vision.enc_dim, config.text.dim)


@torch.no_grad()
def initialise(trainee: Trainee, seed: int) -> None:
    """Fill all weights from a seed."""
    generator = torch.Generator().manual_seed(seed)
    depths = {
        "text": trainee.network.config.text.n_layers,
        "vision": trainee.network.config.vision.enc_n_layers,
    }
    for name, parameter in trainee.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif "ln" in name.split(".")[-2]:
            parameter.fill_(1.0)
        elif name.endswith("_features"):
            # From a quarter of a turn to sixteen over the picture: coarse place to fine offset.
            turns = torch.logspace(-2, 4, parameter.shape[1], base=2.0).expand_as(parameter)
            signs = torch.randn(parameter.shape, generator=generator).sign()
            parameter.copy_(turns * signs / math.sqrt(parameter.shape[0]))
        else:
            scale = {"network.text.wte": 0.3, "network.vision.pos_emb": 0.3}.get(
                name, parameter.shape[-1] ** -0.5
            )
            if name.endswith(("blocks", "attn.proj.weight", "mlp.fc2.weight")) and ".blocks." in name:
                scale /= math.sqrt(2 * depths[name.split(".")[1]])
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    weight, bias = whitening(trainee.network.config.vision, seed)
    trainee.network.vision.patch_emb.weight.copy_(weight)
    trainee.network.vision.patch_emb.bias.copy_(bias)


def whitening(config: VisionConfig, seed: int, num_scenes: int = 150) -> tuple[Tensor, Tensor]:
    """Patch embedding weight and bias that turn drawn patches into even, uncorrelated features.

    Patches are nearly flat, so under random weights edges are a whisper beside brightness and shapes are
    learned late. The strongest principal directions, scaled alike and turned at random, start even.
    """
    patches = []
    size, grid = config.enc_patch_size, config.grid
    for index in range(num_scenes):
        scene = draw_scene(scene_rng(seed + 500_000, index), config)
        crops = torch.from_numpy(cut_crops(scene.picture, config)[0].copy()).double() / 127.5 - 1
        cut = crops.view(-1, grid, size, grid, size, 3).permute(0, 1, 3, 5, 2, 4).reshape(-1, 3 * size * size)
        patches.append(cut)
    rows = torch.cat(patches)
    mean = rows.mean(0)
    values, directions = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    values, directions = values.flip(0)[: config.enc_dim], directions.flip(1)[:, : config.enc_dim]
    # The weakest directions kept are half noise: they are scaled up less.
    scaled = directions / (values + values[config.enc_dim // 3]).sqrt()
    turn, _ = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed))
    )
    weight = turn.double() @ scaled.T
    return weight.float(), -(weight @ mean).float()
