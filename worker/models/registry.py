"""Owns which model families there are, and picks one by a checkpoint's config.json. Decode thread."""

from __future__ import annotations

import torch

from worker.formats.source import CheckpointError, ProgressReport, Source
from worker.models import llama, moondream, qwen3
from worker.models.contract import Load, Model

# Both the architectures' class names and the `model_type`s that released checkpoints carry.
FAMILIES: dict[str, Load] = {
    "HfMoondream": moondream.load,
    "moondream1": moondream.load,
    "LlamaForCausalLM": llama.load,
    "Qwen3ForCausalLM": qwen3.load,
}


def load_model(source: Source, device: torch.device, dtype: torch.dtype, report: ProgressReport) -> Model:
    """Load the model of `source` onto `device` in `dtype`; `report` is told of progress.

    Code that a checkpoint brings along (`auto_map`) is never run: a known architecture does not need it, an
    unknown one is refused. Raises CheckpointError.
    """
    config = source.config
    architectures = config.get("architectures")
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    model_type = config.get("model_type")
    if isinstance(model_type, str):
        names.append(model_type)
    for name in names:
        load = FAMILIES.get(name)
        if load is not None:
            return load(source, device, dtype, report)
    problem = f"unknown architecture {', '.join(names) or '(none named)'}; known are {', '.join(FAMILIES)}"
    if "auto_map" in config:
        problem += "; the code that this checkpoint brings is never run"
    raise CheckpointError(problem, file=source.settings_file)
