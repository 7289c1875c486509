"""Owns encoding pictures for other workers on a torch device, and the format of what comes of it. Decode thread."""

from __future__ import annotations

import torch
from torch import Tensor

from shared.pictures import drawings, num_bytes, num_tokens
from shared.protocol import ELEMENT_BYTES, FeatureFormat, ImageInput, ImageSpec
from worker.device.contract import Device
from worker.models.contract import CropEncoder, Model
from worker.schedule.picture_intake import picture_of
from worker.schedule.sequence import Picture, Run
from worker.step.contract import GraphCounts, OutOfDeviceMemory, Progress
from worker.step.features import FeatureCache
from worker.step.vision_graphs import VisionGraphs

BLANK_PIXELS = 448
"""Both sides of the empty picture that is encoded to see what comes of one."""


class TorchEncoder:
    """Implements `loop.encoding.PictureEncoder` over a loaded model that reads pictures. Captures its graphs at once."""

    def __init__(
        self, model: Model, device: Device, *, weights: str, feature_bytes: int, step_crops: int
    ) -> None:
        encoder, spec = model.encoder, model.card.image
        assert encoder is not None and spec is not None
        self.card = model.card
        self._device = device
        self._encoder: CropEncoder = encoder
        self._progress: Progress = lambda: None
        self.graph_counts = GraphCounts()
        encode = self._encode_one_by_one
        if encoder.crop_size and device.captures:
            graphs = VisionGraphs(device, encoder, step_crops, self.graph_counts)
            encode = graphs.features
            with torch.inference_mode():
                for size in graphs.sizes:
                    if not graphs.capture(size):
                        break
        self.format = format_of(model, device, weights)
        self._cache = FeatureCache(model, feature_bytes, device, encode)

    @torch.inference_mode()
    def encode(self, tenant: str, picture: Picture, progress: Progress) -> bytes:
        """(positions, columns) of the picture in `format`, row-major. Blocks until they are on the host.

        Raises `OutOfDeviceMemory`.
        """
        self._progress = self._encoder.progress = progress
        try:
            with self._device.compute.use():
                return _bytes_of(self._cache, tenant, picture)
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemory(str(error)) from error

    @property
    def num_hits(self) -> int:
        """Units of pictures that were not encoded again."""
        return self._cache.num_hits

    def _encode_one_by_one(self, crops: Tensor) -> Tensor:
        """See `EncodeCrops`: crop by crop, so that signs of life are given in between."""
        encoded = []
        for crop in crops.split(1):
            encoded.append(self._encoder.features(crop))
            self._progress()
        return torch.cat(encoded)


@torch.inference_mode()
def format_of(model: Model, device: Device, weights: str) -> FeatureFormat:
    """What the model makes of a picture, found by encoding an empty one; `weights` is their fingerprint."""
    assert model.card.image is not None
    cache = FeatureCache(model, 0, device)
    with device.compute.use():
        picture = blank(model.card.image)
        features = cache.get([("", picture, 0)])["", picture.digest, 0]
    dtype = str(features.dtype).removeprefix("torch.")
    assert dtype in ELEMENT_BYTES, f"features of {dtype} have no name on the wire"
    return FeatureFormat(dtype, features.shape[1], weights)


def blank(spec: ImageSpec) -> Picture:
    """An empty picture as a gateway would prepare it."""
    sheets = [drawing.sheet for drawing in drawings(spec, BLANK_PIXELS, BLANK_PIXELS)]
    run = Run(0, num_tokens(spec, sheets), 0)
    frames = [bytes(num_bytes([sheet])) for sheet in sheets]
    return picture_of(spec, ImageInput(sheets, [(0, run.num_tokens)], b"blank"), (run,), frames)


def _bytes_of(cache: FeatureCache, tenant: str, picture: Picture) -> bytes:
    units = picture.units(picture.position, picture.end)
    found = cache.get((tenant, picture, unit) for unit in units)
    parts = [found[tenant, picture.digest, unit] for unit in units]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.contiguous().view(torch.uint8).cpu().numpy().tobytes()
