"""Owns the model card of a decoder of text: special ids and sampling defaults of its folder. Decode thread."""

from __future__ import annotations

from typing import Any

from shared.protocol import ImageSpec, ModelCard
from worker.formats.chat_templates import DEFAULT
from worker.formats.source import Source
from worker.models.dense_config import DenseConfig, described
from worker.models.settings import Settings


def make_card(
    sizes: DenseConfig,
    source: Source,
    family: str,
    config: Settings | None = None,
    image: ImageSpec | None = None,
) -> ModelCard:
    """What gateways are told. Ids and sampling defaults come from generation_config.json and config.json.

    `config` are that file's settings if they do not all stand at its top. Raises CheckpointError on ids outside the
    vocabulary, and on defaults that are none.
    """
    config = config or Settings(source.config, source.settings_file)
    generation = Settings(source.generation, source.path / "generation_config.json")
    said = described(config)

    def ids(name: str) -> list[int]:
        """The ids that both files name, generation_config.json's first."""
        return list(
            dict.fromkeys(
                one for given in (generation, config) for one in _ids(name, given, sizes.vocab_size)
            )
        )

    ends = [token_id for token_id in source.end_tokens() if token_id < sizes.vocab_size]
    return ModelCard(
        model_id=str(said.get("model_id") or source.model_id),
        family=family,
        context_tokens=sizes.context_tokens,
        vocab_size=sizes.vocab_size,
        bos_id=next(iter(ids("bos_token_id")), None),
        # Each file may name ends that the others lack: a base model's config.json, an instruct model's generation_config.
        eos_ids=list(dict.fromkeys([*ids("eos_token_id"), *ends])),
        created=source.created,
        image=image,
        capabilities=[*(["chat"] if source.templates else []), "completions"],
        description=str(said.get("description") or ""),
        special_tokens=source.special_tokens(),
        chat_templates={name: text for name, text in source.templates.items() if name != DEFAULT},
        **_sampling(generation),
    )


def _ids(name: str, settings: Settings, vocab_size: int) -> list[int]:
    """One id or a list of them; none where the file says nothing."""
    value = settings.get(name, [])
    ids = value if isinstance(value, list) else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise settings.fault(f"{name!r} is {token_id!r}; ids lie in 0 … {vocab_size - 1}")
    return list(ids)


def _sampling(generation: Settings) -> dict[str, Any]:
    """The card's defaults: greedy unless the folder asks for sampling."""
    sampled = generation.get("do_sample")
    temperature = generation.get("temperature")
    if sampled is False or (temperature is None and not sampled):
        temperature = 0.0
    elif temperature is None:
        temperature = 1.0
    found = {
        "default_temperature": (temperature, 0.0, 100.0, "temperature"),
        "default_top_p": (generation.get("top_p", 1.0), 0.0, 1.0, "top_p"),
        "default_min_p": (generation.get("min_p", 0.0), 0.0, 1.0, "min_p"),
        "default_repetition_penalty": (
            generation.get("repetition_penalty", 1.0),
            0.01,
            10.0,
            "repetition_penalty",
        ),
    }
    for value, low, high, name in found.values():
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise generation.fault(f"{name!r} is {value!r}; it lies in {low:g} … {high:g}")
    top_k = generation.get("top_k", 0)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 0 <= top_k < 1 << 31:
        raise generation.fault(f"'top_k' is {top_k!r}; it is a whole number of at least 0, 0 for no limit")
    return {name: float(value) for name, (value, *_) in found.items()} | {"default_top_k": top_k}
