"""Owns which model families there are, and picks one by a checkpoint's config.json. Decode thread."""

from __future__ import annotations

import difflib
import re

import torch

from worker.formats.moondream_tokenizer import is_moondream
from worker.formats.source import CheckpointError, ProgressReport, Source
from worker.models import moondream_load
from worker.models.contract import Model
from worker.models.families.gemma import GEMMA2, GEMMA3
from worker.models.families.gemma3_pictures import GEMMA3_PICTURES
from worker.models.families.granite import GRANITE
from worker.models.families.internvl import INTERNVL
from worker.models.families.lfm2 import LFM2
from worker.models.families.lfm2_vl import LFM2_VL
from worker.models.families.llama import LLAMA
from worker.models.families.mistral import MINISTRAL, MISTRAL
from worker.models.families.olmo2 import OLMO2
from worker.models.families.phi import PHI3
from worker.models.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from worker.models.families.qwen_vl import QWEN3_VL, QWEN25_VL
from worker.models.families.smollm3 import SMOLLM3
from worker.models.families.smolvlm import IDEFICS3, SMOLVLM
from worker.models.families.stablelm import STABLELM
from worker.models.family import Family, refuse_own_code
from worker.models.settings import Settings

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    MISTRAL,
    MINISTRAL,
    SMOLLM3,
    PHI3,
    GEMMA2,
    GEMMA3,
    OLMO2,
    GRANITE,
    STABLELM,
    LFM2,
    SMOLVLM,
    IDEFICS3,
    GEMMA3_PICTURES,
    INTERNVL,
    QWEN3_VL,
    QWEN25_VL,
    LFM2_VL,
    # Both the architecture's class name and the `model_type` that released checkpoints carry. One loader: it tells the two apart.
    Family("moondream", "Moondream 2 (pictures)", ("HfMoondream", "moondream1"), moondream_load.load),
    Family(
        "moondream3",
        "Moondream 3 and 3.1 (pictures)",
        ("moondream3", "Moondream3ForCausalLM"),
        moondream_load.load,
    ),
)
_BY_ARCHITECTURE = {name: family for family in FAMILIES for name in family.architectures}


def load_model(source: Source, device: torch.device, dtype: torch.dtype, report: ProgressReport) -> Model:
    """Load the model of `source` onto `device` in `dtype`; `report` is told of progress.

    Code that a checkpoint brings along (`auto_map`) is never run: a known architecture does not need it, an
    unknown one is refused. Raises CheckpointError.
    """
    return family_of(Settings(source.config, source.settings_file)).load(source, device, dtype, report)


def family_of(settings: Settings) -> Family:
    """The family of a config.json. Raises CheckpointError where none is served that it could be of."""
    names = architectures(settings)
    if not names and is_moondream(settings.values, settings.file.parent):
        return _BY_ARCHITECTURE["moondream3"]
    # A known `model_type` says more than the class: two generations of Moondream share theirs.
    for name in (str(settings.get("model_type")), *names):
        family = _BY_ARCHITECTURE.get(name)
        if family is not None:
            if not family.name.startswith(
                "moondream"
            ):  # whose folders bring a class of the same name, and more
                refuse_own_code(settings, family)
            return family
    raise unknown(settings, names)


def architectures(settings: Settings) -> list[str]:
    """What config.json calls the model, classes before the `model_type`."""
    listed = settings.get("architectures")
    names = [str(name) for name in listed] if isinstance(listed, list) else []
    model_type = settings.get("model_type")
    return [*names, model_type] if isinstance(model_type, str) else names


def unknown(settings: Settings, names: list[str]) -> CheckpointError:
    """The refusal of a model of no known family: what is served, and what of it comes nearest."""
    problem = f"unknown architecture {', '.join(names) or '(none named)'}"
    near = nearest(names)
    if near is not None:
        problem += f"; the nearest family that is served is {near.title}"
    problem += f"; served are {'; '.join(family.title for family in FAMILIES)}"
    if "auto_map" in settings.values:
        problem += "; the code that this checkpoint brings is never run"
    return settings.fault(problem)


def nearest(names: list[str]) -> Family | None:
    """The family whose name begins as one of these do, or looks most like it; None if none does."""

    def core(name: str) -> str:
        shortened = re.sub(r"(ForCausalLM|ForConditionalGeneration|LMHeadModel|Model)$", "", name)
        return re.sub(r"[^a-z0-9]", "", shortened.lower())

    known = {core(architecture): family for architecture, family in _BY_ARCHITECTURE.items()}
    for name in map(core, names):
        begins = [key for key in known if name.startswith(key) or (name and key.startswith(name))]
        alike = [max(begins, key=len)] if begins else difflib.get_close_matches(name, known, 1, 0.6)
        if alike:
            return known[alike[0]]
    return None
