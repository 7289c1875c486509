"""Owns the command line of `degas bench quality`. Main thread; torch is loaded once it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from loadtest.tables import Figures, show
from worker.formats.errors import CheckpointError

if TYPE_CHECKING:
    from loadtest.bench.quality import Quantize

POCKET = "pocket"


def command(
    model: Annotated[
        str, typer.Option(help="pocket, smollm2, a folder, a GGUF file or a hub's org/name.")
    ] = POCKET,
    quantize: Annotated[
        str, typer.Option(help="int8, int4 or none; several, comma separated, are measured in turn.")
    ] = "none,int8,int4",
    scenes: Annotated[int, typer.Option(min=1, help="pocket: unseen scenes, about 13 questions each.")] = 300,
    tokens: Annotated[int, typer.Option(min=0, help="Text models: tokens of the passage; 0: all.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Text models: compute threads.")] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write a JSON list of objects into this file.")
    ] = None,
) -> None:
    """What quantised weights change: KL divergence and top-1 agreement on a fixed text; pocket's examination."""
    asked = [_format(name.strip()) for name in quantize.split(",") if name.strip()]
    table: Figures
    objects: list[dict[str, Any]]
    from loadtest.bench.quality import measure_pocket, measure_text, pocket_table, text_table
    from worker.native.library import use_threads

    try:
        if model == POCKET:
            if asked[:1] != [None]:
                asked.insert(0, None)
            exams = [measure_pocket(one, scenes) for one in asked]
            table, objects = pocket_table(exams), exams
        else:
            use_threads(threads)
            texts = [measure_text(model, one, most_tokens=tokens) for one in asked]
            table, objects = text_table(texts), [one.to_json() for one in texts]
    except CheckpointError as error:
        raise typer.BadParameter(str(error)) from None
    show(table, objects, as_json=False)
    if json_file is not None:
        json_file.write_text(json.dumps(objects, indent=1) + "\n")


def _format(name: str) -> Quantize | None:
    if name == "none":
        return None
    if name in ("int8", "int4"):
        return cast("Quantize", name)
    raise typer.BadParameter(f"{name!r} is none of none, int8, int4", param_hint="--quantize")
