"""Owns models that read pictures beside a dense decoder: a vision tower and a projector in front of it. Decode thread.

A family says how its pictures are cut and placed (`ImageSpec`), what its tensors are called, and how tower and projector
are built; nothing else of it is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.protocol import FreeSize, FreeTiles, ImageSpec, ModelCard
from worker.formats.source import ProgressReport, Rename, Source
from worker.forward import ImageCrops, ImageSheet
from worker.models.card import make_card
from worker.models.contract import EncodeCrops, Model
from worker.models.dense import Dense, load_dense
from worker.models.dense_config import DenseConfig
from worker.models.family import Family
from worker.models.flex_tower import FlexTower
from worker.models.free_tower import FreeTower
from worker.models.linear import Take, TakeWeight
from worker.models.settings import Settings
from worker.models.tiling import cut_crops
from worker.models.vision_tower import Tower

AnyTower = Tower | FreeTower | FlexTower
Project = Callable[[Tensor], Tensor]
"""A tower's features (C, T, D) → input embeddings of the decoder (C, crop_tokens, dim)."""

PACKED_PATCHES = {"cpu": 1024, "gpu": 16384}
"""Patches of pictures of any size that are encoded together. A GPU gains by fewer launches, up to what its memory was planned
for; a CPU by operations that a small picture alone would not fill, and tells of its progress between layers."""

ReadText = Callable[[Settings], DenseConfig]


@dataclass(frozen=True, slots=True)
class PictureParts:
    """What a family makes of a folder."""

    text: Settings  # of the decoder, its class's defaults included
    sizes: DenseConfig
    spec: ImageSpec
    rename: Rename  # stored names → `model.…`, `lm_head.…` for the decoder, any others for the rest
    build: Callable[[Take], tuple[AnyTower, Project]]
    rotary_axes: tuple[int, ...] = ()  # of each rotated pair, where the spec's positions have several
    num_taps: int = 0  # see `contract.Model`; features are then (1 + taps) · dim wide


class PictureModel(Dense):
    """A dense decoder that reads pictures; implements `contract.Model`."""

    def __init__(
        self,
        parts: PictureParts,
        sizes: DenseConfig,
        card: ModelCard,
        take: Take,
        device: torch.device,
        take_weight: TakeWeight | None = None,
    ) -> None:
        super().__init__(sizes, card, take, device, take_weight)
        self._tower, self._project = parts.build(take)
        self._spec = parts.spec
        if parts.spec.attends != "causal":
            self.prefix_tokens = parts.spec.crop_tokens
        self.num_taps = parts.num_taps
        if parts.rotary_axes:
            self.rotary_axes = torch.tensor(parts.rotary_axes, device=device)

    @property
    def encoder(self) -> AnyTower:
        """The vision tower."""
        return self._tower

    def encode_images(self, images: list[ImageCrops], features: EncodeCrops | None = None) -> list[Tensor]:
        """Pictures → one (positions, D) tensor each, with `num_taps` times as many columns more. Raises
        ValueError on sheets that do not fit."""
        if not images:
            return []
        if isinstance(self._spec.rule, FreeSize):
            if not isinstance(self._tower, FreeTower):  # a tower that takes crops of one size a call
                encode = features or self._tower.features
                return [self._project(encode(image.sheets[0].pixels.unsqueeze(0)))[0] for image in images]
            crops = [_frames(image.sheets[0]) for image in images]
            together = PACKED_PATCHES["cpu" if self.device.type == "cpu" else "gpu"]
            return [
                self._project(encoded.unsqueeze(0))[0]
                for first, last in packs([self._tower.num_patches(crop) for crop in crops], together)
                for encoded in self._tower.features_of(crops[first:last])
            ]
        if isinstance(self._spec.rule, FreeTiles):
            return [
                torch.cat([part for sheet in image.sheets for part in self._parts(sheet, features)])
                for image in images
            ]
        crops = [cut_crops(image, self._spec.crop_size) for image in images]
        encoded = self._project((features or self._tower.features)(torch.cat(crops)))
        return [own.flatten(0, 1) for own in torch.split(encoded, [len(own) for own in crops])]

    def _parts(self, sheet: ImageSheet, features: EncodeCrops | None) -> Iterator[Tensor]:
        """(positions, D) of each crop of a sheet: tiles of one size, or one crop of any."""
        encode = features or self._tower.features
        is_one = sheet.rows == sheet.cols == 1
        crops = sheet.pixels.unsqueeze(0) if is_one else cut_crops(ImageCrops([sheet]), self._spec.crop_size)
        yield from self._project(encode(crops))


def _frames(sheet: ImageSheet) -> Tensor:
    """(H, W, 3) of a still picture, (F, H, W, 3) of a group of frames that lie one below the other."""
    return sheet.pixels if sheet.rows == 1 else sheet.pixels.unflatten(0, (sheet.rows, -1))


def packs(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """From and to of neighbours that go together: as many as `most` in all, one that is larger alone."""
    first = total = 0
    for at, size in enumerate(sizes):
        if at > first and total + size > most:
            yield first, at
            first, total = at, 0
        total += size
    if sizes:
        yield first, len(sizes)


def picture_family(
    name: str, title: str, architecture: str, read: Callable[[Settings, Source], PictureParts]
) -> Family:
    """A family of `PictureModel`s: `read` makes its parts, `name` is their `model_type` too."""

    def load(source: Source, device: torch.device, dtype: torch.dtype, report: ProgressReport) -> Model:
        settings = Settings(source.config, source.settings_file)
        model_type = settings.get("model_type", name)
        if model_type != name:
            raise settings.fault(f"'model_type' is {model_type!r}, not {name!r} as its architecture")
        parts = read(settings, source)
        # Ends and beginnings stand in either of the two.
        said = {**parts.text.values, **{key: v for key, v in settings.values.items() if v is not None}}
        card = make_card(parts.sizes, source, name, Settings(said, settings.file), image=parts.spec)

        def build(*given: object) -> PictureModel:
            return PictureModel(parts, *given)  # type: ignore[arg-type]

        return load_dense(source, parts.sizes, card, device, dtype, report, rename=parts.rename, build=build)

    return Family(name, title, (architecture,), load)


def text_settings(settings: Settings, defaults: dict[str, object]) -> Settings:
    """The decoder's settings in `text_config`, over the defaults of its class, which released folders leave out."""
    given = {key: value for key, value in settings.objects("text_config").items() if value is not None}
    whole = {"degas": settings.get("degas"), "tie_word_embeddings": None}
    return Settings({**defaults, **given, **whole}, settings.file)


def section(settings: Settings, name: str, defaults: dict[str, object]) -> Settings:
    """An object of config.json, over the defaults of its class."""
    given = {key: value for key, value in settings.objects(name).items() if value is not None}
    return Settings({**defaults, **given}, settings.file)
