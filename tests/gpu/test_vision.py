"""The vision encoder on the GPU: graphs against eager, kernels against torch, and that attention is the fused one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from loadtest.gpu.random_models import random_model
from worker.device.cuda import CudaDevice
from worker.forward import ImageCrops
from worker.models.moondream import Moondream
from worker.step.contract import GraphCounts
from worker.step.vision_graphs import VisionGraphs


def picture(model: Moondream, tiles_h: int, tiles_w: int) -> ImageCrops:
    config = model.config.vision
    side, margin = config.crop_size, 2 * config.overlap_margin * config.enc_patch_size
    window = side - margin

    def pixels(*shape: int) -> Tensor:
        return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, device=model.device)

    canvas = pixels(tiles_h * window + margin, tiles_w * window + margin)
    return ImageCrops(pixels(side, side), canvas, tiles_h, tiles_w)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request: pytest.FixtureRequest) -> Iterator[tuple[Moondream, CudaDevice]]:
    device = CudaDevice()
    torch.manual_seed(0)
    with torch.inference_mode():
        made = random_model("tiny-moondream", device.torch_device, request.param).model
        assert isinstance(made, Moondream)
        yield made, device


def test_graphs_equal_eager(model: tuple[Moondream, CudaDevice]) -> None:
    made, device = model
    pictures = [picture(made, *tiles) for tiles in ((1, 1), (1, 2), (2, 2), (3, 4))]
    expected = [made.encode_images([one])[0] for one in pictures]
    counts = GraphCounts()
    graphs = VisionGraphs(device, made.vision, 26, counts)
    assert all(graphs.capture(size) for size in graphs.sizes)
    for _ in range(2):  # the second time over what the first left in the pool
        together = made.encode_images(pictures, graphs.features)
        alone = [made.encode_images([one], graphs.features)[0] for one in pictures]
        for one, other, want in zip(alone, together, expected, strict=True):
            assert torch.equal(one, want), "the same kernels over the same crops"
            assert float((other - want).double().norm() / want.double().norm()) < 0.02
    assert counts.eager_steps_total == {}


def test_kernels_equal_torch(model: tuple[Moondream, CudaDevice]) -> None:
    made, _ = model
    crops = torch.randint(0, 256, (3, 70, 70, 3), dtype=torch.uint8, device=made.device)
    assert made.vision.fuses
    fused = made.vision.features(crops).double()
    made.vision.fuses = False
    plain = made.vision.features(crops).double()
    made.vision.fuses = True
    assert float((fused - plain).norm() / plain.norm()) < (1e-5 if made.dtype == torch.float32 else 2e-2)


def test_true_sizes_take_flash_attention() -> None:
    """Heads of 72 in bf16, as the released encoder has them, strided as its qkv product leaves them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    qkv = torch.randn(2, 729, 3, 16, 72, device="cuda", dtype=torch.bfloat16)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert out.transpose(1, 2).is_contiguous(), "its heads are joined without a copy"
