"""Owns `degas bench quality`: what rounded weights, and products over them, change in a model's answers. Main thread.

A text model reads one fixed passage (`passage.txt`, written for this), every next token given to it. Beside it stands the
reference: the same weights as the file has them, in fp32, multiplied by torch's own operations. The embedded model sits its
examination through a real gateway and worker, with and without `quantize`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from loadtest.tables import Figures
from worker.device.cpu import CpuDevice
from worker.formats.locate import POCKET, locate
from worker.formats.open_source import open_source
from worker.formats.source import Source
from worker.forward import PrefillSegment, StepTokens
from worker.models.contract import Model
from worker.models.held import held_bytes
from worker.models.registry import load_model
from worker.native.library import torch_alone
from worker.native.quantised_source import QuantisedSource
from worker.step.kv_memory import pages_of

PASSAGE = Path(__file__).with_name("passage.txt")
WINDOW = 512  # tokens that see each other; the next window begins anew
PAGE_TOKENS = 16
Quantize = Literal["int8", "int4"]


@dataclass(frozen=True, slots=True)
class TextQuality:
    """One model beside its reference. KL in nats a token, of the reference's distribution to the model's."""

    model: str
    quantize: str
    tokens: int
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    perplexity: float
    reference_perplexity: float
    held_bytes: int
    reference_bytes: int  # of the same weights in 16 bits

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


class Reader:
    """Runs windows of one sequence each through a model, in chunks, and gives out the logits of every position."""

    def __init__(self, model: Model, chunk: int) -> None:
        self._model, self._chunk = model, chunk
        pages = -(-WINDOW // PAGE_TOKENS) + 1
        self._cache = pages_of(model, pages, PAGE_TOKENS)
        self._table = torch.arange(1, pages, dtype=torch.int32)

    def logits(self, ids: list[int]) -> Iterator[Tensor]:
        """(tokens of a chunk, V) fp32, chunk after chunk."""
        for first in range(0, len(ids), self._chunk):
            some = ids[first : first + self._chunk]
            positions = torch.arange(first, first + len(some))
            tokens = StepTokens(positions, positions + PAGE_TOKENS)  # page 1 follows page 0, and so on
            used = self._table[: -(-(first + len(some)) // PAGE_TOKENS)]
            tokens.prefills.append(PrefillSegment(len(some), first, 0, used))
            hidden = self._model.forward(self._model.embed(torch.tensor(some)), tokens, self._cache)
            yield self._model.logits(hidden)


def measure_text(
    name: str, quantize: Quantize | None, *, most_tokens: int = 0, chunk: int = 128, cache: Path | None = None
) -> TextQuality:
    """Read the passage with both. `most_tokens` 0: all of it. Raises CheckpointError for what cannot be served so."""
    path = locate(name)
    CpuDevice()
    with torch.inference_mode():
        with torch_alone():
            reference = _load(open_source(path))
        source: Source = open_source(path)
        model = _load(source if quantize is None else QuantisedSource(source, quantize, cache))
        before, ids = passage_ids(source, most_tokens)
        window = min(WINDOW, model.card.context_tokens)
        kls: list[Tensor] = []
        agreed = num_scored = 0
        lost = reference_lost = 0.0
        for first in range(0, len(ids), window - len(before)):
            piece = [*before, *ids[first : first + window - len(before)]]
            at = 0
            for found, wanted in zip(
                Reader(model, chunk).logits(piece), Reader(reference, chunk).logits(piece), strict=True
            ):
                ours, theirs = found.double().log_softmax(-1), wanted.double().log_softmax(-1)
                kls.append((theirs.exp() * (theirs - ours)).sum(-1))
                agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
                following = torch.tensor(piece[at + 1 : at + 1 + len(ours)])
                rows = torch.arange(len(following))
                lost -= float(ours[rows, following].sum())
                reference_lost -= float(theirs[rows, following].sum())
                num_scored += len(following)
                at += len(ours)
    kl = torch.cat(kls)
    held = held_bytes(model)
    return TextQuality(
        name,
        quantize or "none",
        len(kl),
        float(kl.mean()),
        float(kl.quantile(0.99)),
        agreed / len(kl),
        math.exp(lost / num_scored),
        math.exp(reference_lost / num_scored),
        held,
        2 * reference.num_weights,
    )


def passage_ids(source: Source, most_tokens: int) -> tuple[list[int], list[int]]:
    """By the model's own tokenizer: what every text begins with, if anything, and the passage."""
    from tokenizers import Tokenizer

    reader = Tokenizer.from_str(source.tokenizer().decode())
    begins: list[int] = reader.encode("").ids
    ids: list[int] = reader.encode(PASSAGE.read_text(encoding="utf-8"), add_special_tokens=False).ids
    return begins, ids[:most_tokens] if most_tokens else ids


def _load(source: Source) -> Model:
    return load_model(source, torch.device("cpu"), torch.float32, lambda *_: None)


def text_table(done: list[TextQuality]) -> Figures:
    """For the terminal."""
    table = Figures(
        f"{PASSAGE.name}: {done[0].tokens} tokens, beside the file's weights in fp32 by torch's operations",
        (
            "quantize",
            "KL mean",
            "KL p99",
            "same top 1",
            "perplexity",
            "reference",
            "MB held",
            "16-bit MB",
        ),
        caption="KL in nats a token; held: weights as they are multiplied, tables of words and rotations included",
        left=("quantize",),
    )
    for one in done:
        table.add(
            one.quantize,
            f"{one.kl_mean:.2g}",
            f"{one.kl_p99:.2g}",
            f"{one.top1_agreement:.2%}",
            f"{one.perplexity:.3f}",
            f"{one.reference_perplexity:.3f}",
            f"{one.held_bytes / 1e6:.1f}",
            f"{one.reference_bytes / 1e6:.1f}",
        )
    return table


SHARES = ("exact", "count", "iou", "point", "absent")


def measure_pocket(quantize: Quantize | None, scenes: int) -> dict[str, Any]:
    """The examination through gateway and worker; shares between 0 and 1."""
    from loadtest.bench.pocket import measure_accuracy

    flags = [] if quantize is None else ["--quantize", quantize]
    return {
        "model": POCKET,
        "quantize": quantize or "none",
        "scenes": scenes,
        **measure_accuracy(scenes, None, small=False, flags=flags),
    }


def pocket_table(done: list[dict[str, Any]]) -> Figures:
    """Per cent, and points gained or lost against the first."""
    table = Figures(
        f"{POCKET}: {done[0]['scenes']} unseen scenes, {done[0]['n']} questions, per cent right",
        ("quantize", *SHARES),
        caption="in brackets: points against the first line, whose questions are the same",
        left=("quantize",),
    )
    for one in done:
        cells = [f"{100 * one[name]:.2f} ({100 * (one[name] - done[0][name]):+.2f})" for name in SHARES]
        table.add(one["quantize"], *cells)
    return table
