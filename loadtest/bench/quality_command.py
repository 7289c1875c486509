"""Owns the command line of `degas bench quality`. Main thread; torch is loaded once it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import structlog
import typer

from loadtest.tables import Figures, show
from worker.formats.errors import CheckpointError

if TYPE_CHECKING:
    from loadtest.bench.quality import Quantize

POCKET = "pocket"
EVERY: tuple[Quantize | None, ...] = (None, "int8", "int4")


def command(
    model: Annotated[
        str, typer.Option(help="pocket, smollm2, a folder, a GGUF file or a hub's org/name.")
    ] = POCKET,
    quantize: Annotated[
        str,
        typer.Option(
            help="Some of none, int8, int4, comma separated; empty: all, of a file in blocks already only none."
        ),
    ] = "",
    scenes: Annotated[int, typer.Option(min=1, help="pocket: unseen scenes, about 13 questions each.")] = 300,
    tokens: Annotated[int, typer.Option(min=0, help="Text models: tokens of the passage; 0: all.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Text models: compute threads.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Also write the JSON list of objects into this file.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list of objects instead of a table.")
    ] = False,
) -> None:
    """What quantised weights change: KL divergence and top-1 agreement on a fixed text; pocket's examination."""
    asked = [_format(name.strip()) for name in quantize.split(",") if name.strip()]
    before = structlog.get_config()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # stdout is for figures
    try:
        table, objects = _measure(model, asked, scenes, tokens, threads)
    except CheckpointError as error:
        raise typer.BadParameter(str(error)) from None
    finally:
        structlog.configure(**before)
    show(table, objects, as_json=as_json)
    if out is not None:
        out.write_text(json.dumps(objects, indent=1) + "\n")


def _measure(
    model: str, asked: list[Quantize | None], scenes: int, tokens: int, threads: int
) -> tuple[Figures, list[dict[str, Any]]]:
    from loadtest.bench.quality import measure_pocket, measure_text, pocket_table, text_table
    from worker.native.library import use_threads

    if model == POCKET:
        exams = [measure_pocket(one, scenes) for one in dict.fromkeys((None, *(asked or EVERY)))]
        return pocket_table(exams), exams
    use_threads(threads)
    texts = []
    for one in asked or EVERY:
        try:
            texts.append(measure_text(model, one, most_tokens=tokens))
        except CheckpointError:
            if asked or not texts:
                raise
            break  # in blocks already
    return text_table(texts), [one.to_json() for one in texts]


def _format(name: str) -> Quantize | None:
    if name == "none":
        return None
    if name in ("int8", "int4"):
        return cast("Quantize", name)
    raise typer.BadParameter(f"{name!r} is none of none, int8, int4", param_hint="--quantize")
