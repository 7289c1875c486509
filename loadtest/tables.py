"""Owns the layout of figures on a terminal of any width, in which no cell is cut. Runs wherever it is printed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_UNBOUNDED = 1 << 16


class Figures:
    """A table of texts. Where it does not fit, its headings wrap, then it is turned, and cut into tables that fit.

    `left` names the columns that hold words, `dim` those that are only there to compare with.
    """

    def __init__(
        self,
        title: str,
        columns: Sequence[str],
        *,
        caption: str = "",
        left: Collection[str] = (),
        dim: Collection[str] = (),
    ) -> None:
        self._title = title
        self._columns = list(columns)
        self._caption = caption
        self._left = left
        self._dim = dim
        self._rows: list[list[str]] = []

    def add(self, *cells: str) -> None:
        """One more line; as many cells as there are columns."""
        if len(cells) != len(self._columns):
            raise ValueError(f"{len(cells)} cells for {len(self._columns)} columns")
        self._rows.append(list(cells))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self._title, style="italic")
        yield from self._fit(console, options)
        if self._caption:
            yield Text(self._caption, style="dim")

    def _fit(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        def fits(table: Table) -> bool:
            wide = options.update(width=_UNBOUNDED)
            return Measurement.get(console, wide, table).maximum <= options.max_width

        for wraps in (False, True):
            table = self._upright(wraps=wraps)
            if fits(table):
                yield table
                return
        rows = self._rows
        while rows:
            num_taken = len(rows)
            while num_taken > 1 and not fits(self._turned(rows[:num_taken])):
                num_taken -= 1
            table = self._turned(rows[:num_taken])
            # If even one record is too wide, its texts are wrapped.
            yield table if fits(table) else self._turned(rows[:num_taken], folds=True)
            rows = rows[num_taken:]
            if rows:
                yield Text()

    def _upright(self, *, wraps: bool) -> Table:
        table = _empty()
        for index, name in enumerate(self._columns):
            cells = [row[index] for row in self._rows]
            words = name.split() if wraps else [name]
            table.add_column(
                name,
                justify="left" if name in self._left else "right",
                style="dim" if name in self._dim else None,
                width=max(map(cell_len, [*cells, *words])),
            )
        for row in self._rows:
            table.add_row(*map(Text, row))
        return table

    def _turned(self, rows: list[list[str]], *, folds: bool = False) -> Table:
        """A line for each column, a column for each record; the first column's texts head them."""
        table = _empty()
        table.add_column(self._columns[0], no_wrap=not folds, overflow="fold")
        for row in rows:
            table.add_column(row[0], justify="right", no_wrap=not folds, overflow="fold")
        for index, name in enumerate(self._columns[1:], 1):
            style = "dim" if name in self._dim else None
            table.add_row(Text(name), *(Text(row[index]) for row in rows), style=style)
        return table


def show(figures: RenderableType, objects: Sequence[object], *, as_json: bool) -> None:
    """Print the figures for a person, or a JSON list of objects for a program."""
    if as_json:
        print(json.dumps(list(objects)))
    else:
        Console().print(figures)


def of_objects(title: str, objects: Sequence[Mapping[str, object]]) -> Figures:
    """A table with a column for each key of the objects, which all have the same; a group's keys stand behind its name."""
    flat = [dict(flatten(one)) for one in objects]
    figures = Figures(title, list(flat[0]))
    for one in flat:
        figures.add(*one.values())
    return figures


def flatten(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names in words with their values as texts; a value in a group is named after the group and itself."""
    for key, value in values.items():
        name = prefix + key.replace("_", " ")
        if isinstance(value, Mapping):
            yield from flatten(value, name + ": ")
        else:
            yield name, f"{value:.6g}" if isinstance(value, float) else str(value)


def _empty() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
