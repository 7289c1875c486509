"""Owns the vision encoder's captured graphs, one a number of crops. Decode thread.

A batch of crops is cut into pieces for which there is a graph, largest first, and nothing is padded: from a few
crops on the encoder is bound by its arithmetic, so that an empty crop would cost as much as a full one. Every
number of crops one picture may have is a piece, and twice the most; what no graph covers runs eagerly.
"""

from __future__ import annotations

from functools import partial

import structlog
import torch
from torch import Tensor

from worker.device.choices import choices
from worker.device.contract import CaptureFailed, Device, Graph
from worker.models.contract import CropEncoder
from worker.step.contract import GraphCounts

log = structlog.get_logger()


class VisionGraphs:
    """Graphs over one input of uint8 crops and one output of features, at most `most_crops` at a time.

    `features` is called on the stream they were captured for: the device's stream `aside`, unless that is switched off.
    All graphs share that stream's pool: its size is the largest piece's need, some 25 MB a crop in bf16 for the
    released Moondream.
    """

    def __init__(self, device: Device, encoder: CropEncoder, most_crops: int, counts: GraphCounts) -> None:
        self.sizes = piece_sizes(encoder.max_crops, most_crops)
        self.counts = counts
        self._device = device
        self._aside = choices().vision_stream
        self._encoder = encoder
        side, where = encoder.crop_size, device.torch_device
        most = self.sizes[0]
        self._crops = torch.zeros((most, side, side, 3), dtype=torch.uint8, device=where)
        shape = (most, encoder.num_tokens, encoder.width)
        self._features = torch.zeros(shape, dtype=encoder.dtype, device=where)
        self._graphs: dict[int, Graph] = {}

    def capture(self, size: int) -> bool:
        """Capture the encoder over `size` crops; False if the device refused. Raises CaptureBroken."""
        try:
            self._graphs[size] = self._device.capture(partial(self._body, size), aside=self._aside)
        except CaptureFailed as error:
            log.warning("capture_failed", crops=size, error=str(error))
            self.counts.add_capture("failed")
            return False
        self.counts.add_capture("startup")
        return True

    def features(self, crops: Tensor) -> Tensor:
        """(C, S, S, 3) uint8 → (C, num_tokens, width), in memory of its own."""
        num = crops.shape[0]
        out = self._features.new_empty(num, *self._features.shape[1:])
        at = 0
        for size in cut_pieces(num, list(self._graphs)):
            piece = slice(at, at + size)
            graph = self._graphs.get(size)
            if graph is None:
                self.counts.add_eager("vision")
                out[piece].copy_(self._encoder.features(crops[piece]))
            else:
                self._crops[:size].copy_(crops[piece])
                graph.replay()
                out[piece].copy_(self._features[:size])
            at += size
        return out

    def _body(self, size: int) -> None:
        self._features[:size].copy_(self._encoder.features(self._crops[:size]))


def piece_sizes(max_crops: int, most_crops: int) -> list[int]:
    """Numbers of crops to capture, the largest first: those of one picture, and twice the most if so many may come."""
    sizes = [2 * max_crops] if 2 * max_crops <= most_crops else []
    return [*sizes, *range(max_crops, 0, -1)]


def cut_pieces(num_crops: int, captured: list[int]) -> list[int]:
    """`num_crops` as a sum of captured sizes, largest first; what is left over is one last piece."""
    pieces = []
    for size in sorted(captured, reverse=True):
        while num_crops >= size:
            pieces.append(size)
            num_crops -= size
    return [*pieces, num_crops] if num_crops else pieces
