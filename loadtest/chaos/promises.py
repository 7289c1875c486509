"""Owns the table of promises: a line each, whose words wrap. No clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from rich import box
from rich.table import Table
from rich.text import Text

VERDICTS: Final = {True: ("yes", "green"), False: ("NO", "bold red"), None: ("too short", "dim")}


def promise_table(title: str, promises: Mapping[str, bool | None], facts: Iterable[str]) -> Table:
    """Each promise, what was measured, and whether it was kept; None: the run was too short to say."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("promise", overflow="fold", ratio=2)
    table.add_column("measured", overflow="fold", ratio=5)
    table.add_column("kept", no_wrap=True)
    for (name, kept), fact in zip(promises.items(), facts, strict=True):
        word, style = VERDICTS[kept]
        table.add_row(Text(name), Text(fact), Text(word, style=style))
    return table
