"""Owns image features on the device, kept by content so that a repeated picture is encoded once, and their way off it and
back. Decode thread."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.protocol import FeatureFormat, Sheet
from worker.device.choices import choices
from worker.device.contract import Device
from worker.forward import ImageCrops, ImageSheet
from worker.models.contract import EncodeCrops, Model
from worker.schedule.sequence import Picture

Key = tuple[str, bytes, int]
"""Tenant, picture's digest, unit."""


class FeatureCache:
    """Least recently used features, bounded in bytes, keyed by tenant, pixels and unit: a shared key would let one
    tenant learn from timing which pictures another has sent."""

    def __init__(
        self,
        model: Model,
        max_bytes: int,
        device: Device,
        encode: EncodeCrops | None = None,
        format: FeatureFormat | None = None,
    ) -> None:
        """`encode` runs the vision encoder over crops; by default as it is, over all of them at once. `format` is what
        pictures that come encoded have, which intake has checked."""
        self._model = model
        self._format = format
        self._device = device
        self._encoded = device.event()
        self._encode = encode
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self.num_hits = 0  # units that were here
        self.bytes_given_total = 0  # of pictures that came encoded
        self._features: OrderedDict[Key, Tensor] = OrderedDict()

    def get(self, wanted: Iterable[tuple[str, Picture, int]]) -> dict[Key, Tensor]:
        """Features (positions, D) for each (tenant, picture, unit), all misses encoded together."""
        found: dict[Key, Tensor] = {}
        missing: dict[Key, tuple[Picture, int]] = {}
        for tenant, picture, unit in wanted:
            key = (tenant, picture.digest, unit)
            features = self._features.get(key)
            if features is None:
                missing[key] = picture, unit
            else:
                self._features.move_to_end(key)
                self.num_hits += 1
                found[key] = features
        given = [key for key, (picture, _) in missing.items() if picture.features is not None]
        for key in given:
            found[key] = self._keep(key, self._given(*missing.pop(key)))
        if missing:
            # Everything of new pictures is queued beside the compute stream, which goes on with decode rows meanwhile and
            # waits only where their features are read.
            stream = self._device.aside if choices().vision_stream else self._device.compute
            with stream.use():
                crops = [self._upload(picture, unit) for picture, unit in missing.values()]
                for key, encoded in zip(missing, self._model.encode_images(crops, self._encode), strict=True):
                    # Pictures that are encoded together come as views of one tensor, and a view keeps all of it alive: what
                    # is kept has memory of its own, so that the bound counts what is really held.
                    is_whole = encoded.untyped_storage().nbytes() == encoded.nbytes
                    found[key] = self._keep(key, encoded if is_whole else encoded.clone())
            if stream is not self._device.compute:
                self._device.compute.wait(stream.record(self._encoded))
                for key in missing:
                    self._device.hand_over(found[key])
        while self._num_bytes > self._max_bytes and len(self._features) > 1:
            _, old = self._features.popitem(last=False)
            self._num_bytes -= old.nbytes
        return found

    def _keep(self, key: Key, features: Tensor) -> Tensor:
        self._features[key] = features
        self._num_bytes += features.nbytes
        return features

    def _given(self, picture: Picture, unit: int) -> Tensor:
        """The features of one unit of a picture that came encoded, queued on the compute stream."""
        assert self._format is not None and picture.features is not None
        dtype: torch.dtype = getattr(torch, self._format.dtype)
        row_bytes = self._format.columns * dtype.itemsize
        data = np.frombuffer(picture.features, np.uint8).reshape(-1, row_bytes)
        if picture.unit_tokens:
            data = data[unit * picture.unit_tokens : (unit + 1) * picture.unit_tokens]
        self.bytes_given_total += data.nbytes
        return self._on_device(data).view(dtype)

    def _upload(self, picture: Picture, unit: int) -> ImageCrops:
        """All sheets of a picture that is one unit, else the one crop."""
        if not picture.unit_tokens:
            return ImageCrops(
                [
                    ImageSheet(self._on_device(_array(frame, sheet)), sheet.rows, sheet.cols)
                    for sheet, frame in zip(picture.sheets, picture.frames, strict=True)
                ]
            )
        for sheet, frame in zip(picture.sheets, picture.frames, strict=True):
            if unit < sheet.rows * sheet.cols:
                row, col = divmod(unit, sheet.cols)
                high, wide = sheet.height // sheet.rows, sheet.width // sheet.cols
                whole = _array(frame, sheet)
                crop = whole[row * high : (row + 1) * high, col * wide : (col + 1) * wide]
                return ImageCrops([ImageSheet(self._on_device(crop), 1, 1)])
            unit -= sheet.rows * sheet.cols
        raise IndexError("intake lets no picture through that has more runs than crops")

    def _on_device(self, values: npt.NDArray[np.uint8]) -> Tensor:
        on_host = self._model.device.type == "cpu"
        # A copy from pageable memory would hold the host until the compute stream is through. torch keeps pinned
        # blocks, and hands one out again only when the copies that read it are done.
        host = torch.empty(values.shape, dtype=torch.uint8, pin_memory=not on_host)
        host.numpy()[:] = values
        return host if on_host else host.to(self._model.device, non_blocking=True)


def _array(frame: bytes, sheet: Sheet) -> npt.NDArray[np.uint8]:
    return np.frombuffer(frame, np.uint8).reshape(sheet.height, sheet.width, 3)
