"""Owns what the registry knows of a model family: its names, and how its config.json becomes a decoder. Decode thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from worker.formats.source import CheckpointError, ProgressReport, Rename, Source, Target
from worker.models.card import make_card
from worker.models.contract import Load, Model
from worker.models.dense import load_dense
from worker.models.dense_config import DenseConfig
from worker.models.settings import Settings


@dataclass(frozen=True, slots=True)
class Family:
    """Models of one kind. `name` is what their cards say, `title` the models people know it by."""

    name: str
    title: str
    architectures: tuple[str, ...]  # as config.json names the class, or the `model_type`
    load: Load


def dense_family(
    name: str,
    title: str,
    architecture: str,
    read: Callable[[Settings], DenseConfig],
    *,
    rename: Rename = Target,
) -> Family:
    """A family whose models are dense decoders: `read` makes their settings, `name` is their `model_type` too, and `rename`
    gives stored tensors the names that `Dense` has for them."""

    def load(source: Source, device: torch.device, dtype: torch.dtype, report: ProgressReport) -> Model:
        settings = Settings(source.config, source.settings_file)
        model_type = settings.get("model_type", name)
        if model_type != name:
            raise settings.fault(f"'model_type' is {model_type!r}, not {name!r} as its architecture")
        sizes = read(settings)
        card_name = name.removesuffix("_text")
        card = make_card(sizes, source, card_name)
        return load_dense(source, sizes, card, device, dtype, report, rename=rename)

    return Family(name, title, (architecture,), load)


def refuse_own_code(settings: Settings, family: Family) -> None:
    """Raises CheckpointError if the folder brings a model class of its own, other than a copy of the known class."""
    for kind, named in settings.objects("auto_map").items():
        wanted = str(named).rpartition(".")[2]
        if "Model" in kind and wanted not in family.architectures:
            raise CheckpointError(
                f"this checkpoint wants code of its own (auto_map: {named}), which is never run; if it computes what "
                f"{family.title} do, take that line out",
                file=settings.file,
            )
