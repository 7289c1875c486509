"""Owns the vision encoder's figures on a GPU: milliseconds by number of crops, eager against captured. Main thread.

`python -m loadtest.gpu.vision --out FOLDER`; docs/gpu.md says how the figures are taken. `--smoke` proves on a CPU
that the script runs; its figures mean nothing.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

from loadtest.gpu.devices import open_device
from loadtest.gpu.kernels import measure_products
from loadtest.gpu.random_models import random_model
from worker.device.choices import without
from worker.device.contract import Device
from worker.forward import ImageCrops, ImageSheet
from worker.models.contract import EncodeCrops
from worker.models.moondream import Moondream
from worker.models.moondream_config import VisionConfig
from worker.step.contract import GraphCounts
from worker.step.vision_graphs import VisionGraphs

COUNTS = (1, 2, 4, 9, 13, 26)  # 9: a picture of 700 by 500 pixels


@dataclass(frozen=True, slots=True)
class Line:
    """One number of crops, or one set of pictures. Milliseconds of a batch; host: until it was queued."""

    what: str
    crops: int
    plain_ms: float
    fused_ms: float
    captured_ms: float
    gelu_apart_ms: float  # as fused, with the GELU in a kernel behind its product: without `vision_gelu`
    fused_host_ms: float
    captured_host_ms: float
    floor_ms: float


def flops_of(config: VisionConfig) -> float:
    """Operations of one crop: products and attention of the encoder."""
    tokens, dim = config.num_tokens, config.enc_dim
    layer = 2 * tokens * dim * (4 * dim + 2 * config.enc_ff_dim) + 4 * tokens * tokens * dim
    return float(config.enc_n_layers * layer + 2 * tokens * 3 * config.enc_patch_size**2 * dim)


def time_ms(device: Device, work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median milliseconds on the device from the first operation to the last, and of the host to queue them."""
    times: list[float] = []
    host: list[float] = []
    for _ in range(repeats):
        device.synchronize()
        started = device.compute.record()
        started_s = time.perf_counter()
        work()
        host.append((time.perf_counter() - started_s) * 1e3)
        ended = device.compute.record()
        ended.synchronize()
        times.append(started.elapsed_s(ended) * 1e3)
    return statistics.median(times[1:] or times), statistics.median(host[1:] or host)


def measure(
    device: Device, model: Moondream, what: str, crops: int, work: Callable[[EncodeCrops], object], graphs: VisionGraphs,
    repeats: int, floor_ms: float,
) -> Line:  # fmt: skip
    """The four ways, twice each in turn; the better of the two."""
    vision, can_fuse = model.vision, model.vision.fuses
    best: dict[str, tuple[float, float]] = {}
    for _ in range(2):
        for way in ("plain", "fused", "captured", "gelu apart"):
            vision.fuses = can_fuse and way != "plain"
            features = graphs.features if way == "captured" else vision.features
            with without(*(["vision_gelu"] if way == "gelu apart" else [])):
                took = time_ms(device, partial(work, features), repeats)
            best[way] = min(best.get(way, (1e9, 1e9)), took)
    return Line(
        what,
        crops,
        best["plain"][0],
        best["fused"][0],
        best["captured"][0],
        best["gelu apart"][0],
        best["fused"][1],
        best["captured"][1],
        floor_ms,
    )


def picture(model: Moondream, tiles_h: int, tiles_w: int) -> ImageCrops:
    """A picture of noise."""
    config = model.config.vision
    side, margin = config.crop_size, 2 * config.overlap_margin * config.enc_patch_size

    def pixels(height: int, width: int) -> torch.Tensor:
        return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, device=model.device)

    window = side - margin
    canvas = pixels(tiles_h * window + margin, tiles_w * window + margin)
    return ImageCrops([ImageSheet(pixels(side, side), 1, 1), ImageSheet(canvas, tiles_h, tiles_w)])


@dataclass(frozen=True, slots=True)
class Backend:
    """Attention of one layer over some crops by one of torch's backends; `error` against fp32 arithmetic."""

    name: str
    crops: int
    is_default: bool
    ms: float
    error: float


def measure_backends(device: Device, config: VisionConfig, counts: list[int], repeats: int) -> list[Backend]:
    """Every backend that takes the encoder's heads, strided as its qkv product leaves them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    where, tokens, heads = device.torch_device, config.num_tokens, config.enc_n_heads
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    found: list[Backend] = []
    for crops in counts:
        shape = (crops, tokens, 3, heads, config.enc_dim // heads)
        query, key, value = torch.randn(shape, device=where).to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
        with sdpa_kernel(SDPBackend.MATH):
            exact = (query[:1].float(), key[:1].float(), value[:1].float())
            expected = F.scaled_dot_product_attention(*exact)
        taken = SDPBackend(torch._fused_sdp_choice(query, key, value))
        for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
            backend = getattr(SDPBackend, name)
            if name == "MATH" and where.type == "cuda":
                continue  # gigabytes of scores
            try:
                with sdpa_kernel(backend):
                    out = F.scaled_dot_product_attention(query, key, value)
                    took_ms, _ = time_ms(
                        device, partial(F.scaled_dot_product_attention, query, key, value), repeats
                    )
            except RuntimeError as refused:
                print(f"{name} at {crops} crops: {str(refused).splitlines()[0][:120]}")
                continue
            difference = out[:1].float() - expected
            error = float(difference.norm() / expected.norm())
            found.append(Backend(name, crops, backend == taken, took_ms, error))
    return found


HEADING = (
    f"{'what':28} crops  plain ms  fused ms  graph ms  gelu apart  host ms: fused  graph  floor ms  ×floor"
)


def to_line(line: Line) -> str:
    """One line of the table under `HEADING`."""
    return (
        f"{line.what:28} {line.crops:5} {line.plain_ms:9.3f} {line.fused_ms:9.3f} {line.captured_ms:9.3f} {line.gelu_apart_ms:11.3f} "
        f"{line.fused_host_ms:14.3f} {line.captured_host_ms:6.3f} {line.floor_ms:9.3f} "
        f"{line.captured_ms / line.floor_ms:7.2f}"
    )


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("gpu-results"),
    repeats: Annotated[int, typer.Option(help="Runs of each.")] = 20,
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny encoder on the CPU.")] = False,
) -> None:
    """Measure, print the table, write `vision.json`."""
    out.mkdir(parents=True, exist_ok=True)
    device = open_device(smoke=smoke)
    where = device.torch_device
    repeats = 2 if smoke else repeats
    dtype = torch.float32 if smoke else torch.bfloat16
    with torch.inference_mode(), device.compute.use():
        flops_per_s = 1e12 if smoke else measure_products(where, 8192)
        made = random_model("tiny-moondream" if smoke else "moondream2", where, dtype)
        model = made.model
        assert isinstance(model, Moondream)
        config = model.config.vision
        graphs = VisionGraphs(device, model.vision, COUNTS[-1], GraphCounts())
        started_s = time.perf_counter()
        captured = sum([graphs.capture(size) for size in graphs.sizes])
        capture_s = time.perf_counter() - started_s
        held = torch.cuda.max_memory_allocated() >> 20 if where.type == "cuda" else 0
        print(f"{captured} of {len(graphs.sizes)} graphs in {capture_s:.1f} s, at most {held} MiB allocated")
        backends = measure_backends(device, config, [9, 26] if not smoke else [2], repeats)
        for one in backends:
            default = "default" if one.is_default else ""
            print(
                f"{one.name:20} {one.crops:3} crops {one.ms:8.3f} ms a layer, error {one.error:.1e} {default}"
            )
        floor_ms = flops_of(config) / flops_per_s * 1e3
        lines: list[Line] = []
        for count in COUNTS:
            side = config.crop_size
            crops = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, device=where)
            name = f"{count} crops"
            work = lambda features, crops=crops: features(crops)  # noqa: E731
            lines.append(measure(device, model, name, count, work, graphs, repeats, count * floor_ms))
            print(to_line(lines[-1]), flush=True)
        for number, tiles_h, tiles_w in [(1, 1, 1), (1, 2, 4), (1, 3, 4), (8, 1, 1), (4, 2, 4), (2, 3, 4)]:
            pictures = [picture(model, tiles_h, tiles_w) for _ in range(number)]
            count = number * (1 + tiles_h * tiles_w if tiles_h * tiles_w > 1 else 1)
            name = f"{number} pictures of {tiles_h}×{tiles_w} tiles"
            encode = lambda features, pictures=pictures: model.encode_images(pictures, features)  # noqa: E731
            lines.append(measure(device, model, name, count, encode, graphs, repeats, count * floor_ms))
            print(to_line(lines[-1]), flush=True)
    record = {
        "device": torch.cuda.get_device_name() if where.type == "cuda" else "cpu (smoke)",
        "torch": torch.__version__,
        "product_flops_per_s": flops_per_s,
        "graphs": captured,
        "capture_s": capture_s,
        "max_allocated_mib": held,
        "attention": [asdict(one) for one in backends],
        "figures": [asdict(line) for line in lines],
    }
    (out / "vision.json").write_text(json.dumps(record, indent=1))
    print(f"\nproduct {flops_per_s / 1e12:.0f} TFLOP/s\n{HEADING}")
    print("\n".join(to_line(line) for line in lines))


if __name__ == "__main__":
    typer.run(main)
