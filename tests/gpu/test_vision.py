"""The vision encoder on the GPU: graphs against eager, kernels against torch, attention against fp32 arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from loadtest.gpu.random_models import random_model
from tests.two_sheets import image_crops
from worker.device.cuda import CudaDevice
from worker.forward import ImageCrops
from worker.models.moondream import Moondream
from worker.models.vision_tower import attention_backend
from worker.step.contract import GraphCounts
from worker.step.vision_graphs import VisionGraphs


def picture(model: Moondream, tiles_h: int, tiles_w: int) -> ImageCrops:
    config = model.config.vision
    side, margin = config.crop_size, 2 * config.overlap_margin * config.enc_patch_size
    window = side - margin

    def pixels(*shape: int) -> Tensor:
        return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, device=model.device)

    canvas = pixels(tiles_h * window + margin, tiles_w * window + margin)
    return image_crops(pixels(side, side), canvas, tiles_h, tiles_w)


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
        with device.aside.use():
            together = made.encode_images(pictures, graphs.features)
            alone = [made.encode_images([one], graphs.features)[0] for one in pictures]
        device.synchronize()
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


@pytest.mark.parametrize("crops", [1, 9, 26])
def test_attention_at_true_sizes_equals_fp32_arithmetic(crops: int) -> None:
    """729 tokens, no multiple of 128, and heads of 72 in bf16, strided as the qkv product leaves them; on the backend that
    serves, whichever it is."""
    from torch.nn.attention import SDPBackend

    torch.manual_seed(1)
    qkv = torch.randn(crops, 729, 3, 16, 72, device="cuda", dtype=torch.bfloat16)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    print("backend:", SDPBackend(torch._fused_sdp_choice(query, key, value)).name)
    with attention_backend(qkv.device):
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    for crop in range(crops):
        scores = query[crop].double() @ key[crop].double().transpose(1, 2) / 72**0.5
        expected = scores.softmax(-1) @ value[crop].double()
        difference = found[crop].double() - expected
        assert float(difference.norm() / expected.norm()) < 1e-2
        tail = difference[:, 640:]  # behind the last whole block of 128
        assert float(tail.norm() / expected[:, 640:].norm()) < 1e-2


def test_every_number_of_crops_is_served_by_graphs(model: tuple[Moondream, CudaDevice]) -> None:
    """A number that no graph covers would build an attention plan while rows decode."""
    made, device = model
    counts = GraphCounts()
    graphs = VisionGraphs(device, made.vision, 26, counts)
    assert all(graphs.capture(size) for size in graphs.sizes)
    with device.aside.use():
        for num in range(1, 40):
            graphs.features(torch.zeros(num, 70, 70, 3, dtype=torch.uint8, device=made.device))
    device.synchronize()
    assert counts.eager_steps_total == {}
