"""Owns how settings are shown: a table, JSON, a TOML file, the tables of docs/operating.md. Main thread; secrets stay hidden."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import SecretStr
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from degas.on_ray.config import RAY_SETTINGS
from degas.settings import ALL, BUILT_IN, Effective
from shared.settings import NONE, Given, Section, Setting, as_text

DEFAULT: Final = "default"
NOBODYS: Final = (DEFAULT, BUILT_IN)
HIDDEN: Final = "(hidden)"
COMMENT_COLUMNS: Final = 100


def as_table(effective: Mapping[str, Effective]) -> Group:
    """For a terminal of any width: long values and origins go on in the next line."""
    parts: list[Table | Text] = []
    for one in effective.values():
        table = Table(
            title=f"[{one.section.name}]", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
        )
        table.title = Text(f"[{one.section.name}]", style="bold")
        table.add_column("setting", no_wrap=True)
        table.add_column("value", overflow="fold")
        table.add_column("from", overflow="fold")
        for setting, value, origin in _lines(one):
            style = "dim" if origin in NOBODYS else ""
            table.add_row(Text(setting.name), Text(_shown(value)), Text(origin), style=style)
        parts.append(table)
    return Group(*parts)


def as_json(effective: Mapping[str, Effective]) -> str:
    """Each section's settings with `value` and `from`."""
    found = {
        one.section.name: {
            setting.name: {"value": value, "from": origin} for setting, value, origin in _lines(one)
        }
        for one in effective.values()
    }
    return json.dumps(found, indent=1, ensure_ascii=False)


def as_toml(effective: Mapping[str, Effective]) -> str:
    """A file for `--config`: what was given as lines, each default as a comment, so that it can be taken up."""
    lines = ["# Settings of Degas: degas serve --config THIS-FILE"]
    for one in effective.values():
        lines += ["", f"[{one.section.name}]"]
        group = ""
        for setting, value, origin in _lines(one):
            if setting.group != group:
                group = setting.group
                lines += ["", f"# --- {group}"]
            lines += textwrap.wrap(
                setting.description,
                COMMENT_COLUMNS,
                initial_indent="# ",
                subsequent_indent="# ",
                break_on_hyphens=False,
                break_long_words=False,
            )
            if setting.is_secret and origin not in NOBODYS:
                lines.append(f"# {setting.name}: hidden; given by {origin}")
            elif origin in NOBODYS:
                lines.append(f"# {setting.name} = {to_toml(value)}")
            else:
                lines.append(f"{setting.name} = {to_toml(value)}  # from {origin}")
    return "\n".join(lines) + "\n"


def as_markdown(section: Section[Any]) -> str:
    """The table of docs/operating.md: every setting that people may use, with its default."""
    rows = ["| setting | default | |", "|---|---|---|"]
    rows += [
        f"| `{one.name}` | {one.default_text} | {one.description.replace('|', '&#124;')} |"
        for one in section.settings.values()
        if not one.is_hidden
    ]
    return "\n".join(rows) + "\n"


def show(effective: Mapping[str, Effective], console: Console | None = None) -> None:
    """Print the table."""
    (console or Console()).print(as_table(effective))


def to_toml(value: Any) -> str:
    """One value as TOML writes it. TOML has no null: an optional setting is not set by "none"."""
    if value is None:
        return f'"{NONE}"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{to_toml(key)} = {to_toml(item)}" for key, item in value.items()) + "}"
    # Where values are texts, numbers and truth values, JSON is TOML but for the one control character it leaves bare.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _lines(one: Effective) -> Iterator[tuple[Setting, Any, str]]:
    for setting in one.section.settings.values():
        if not setting.is_hidden:
            given: Given | None = one.found.get(setting.name)
            value = _plain(getattr(one.config, setting.name))
            yield setting, value, DEFAULT if given is None else given.origin


def _plain(value: Any) -> Any:
    """The value without secrets and without types that JSON lacks."""
    if isinstance(value, SecretStr):
        return HIDDEN
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _shown(value: Any) -> str:
    return NONE if value in (None, [], {}) else as_text(value)


def with_tables(text: str) -> str:
    """The text of docs/operating.md or docs/ray.md with each section's table made anew from the code."""
    for section in (*ALL, RAY_SETTINGS):
        heading = f"`[{section.name}]`, `{section.prefix}…`\n\n"
        before, found, after = text.partition(heading)
        if found:
            text = before + heading + as_markdown(section) + after[after.index("\n\n") + 1 :]
    return text


if (
    __name__ == "__main__"
):  # after a change of settings: python -m degas.config_view docs/operating.md (and docs/ray.md)
    path = Path(sys.argv[1])
    path.write_text(with_tables(path.read_text()))
