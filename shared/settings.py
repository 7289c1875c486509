"""Owns where a process's settings come from: flags, variables, one TOML file, defaults. Used before any thread.

A `Section` is one pydantic model under its name: `worker` has `--depth`, `DEGAS_WORKER_DEPTH` and `depth` in the
file's table `[worker]`, and they win in this order. The model and typer's `Option` come in as arguments, because
this room imports the standard library only.
"""

from __future__ import annotations

import difflib
import inspect
import json
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Final, Generic, Literal, TypeVar, cast, get_args, get_origin

Config = TypeVar("Config")

SECTIONS: Final = ("worker", "gateway", "serve", "ray")
FILE_VARIABLE: Final = "DEGAS_CONFIG"
NONE: Final = "none"
"""The text that leaves an optional setting unset."""

_FORMS: Final = {bool: "true|false", int: "NUMBER", float: "NUMBER", str: "TEXT", dict: "JSON"}
_UNITS: Final = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
_NEAR: Final = (
    0.8  # how alike a variable's second word must be to a section's name to be taken for a misspelling of it
)


class ConfigError(Exception):
    """A setting that cannot be used; the message names it and says what would be accepted."""


@dataclass(frozen=True, slots=True)
class Given:
    """A value as it was written, a text or a value of TOML, and where it was written."""

    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Setting:
    """What flags, help and documentation need to know of one field."""

    name: str
    default: Any
    description: str
    group: str
    form: str  # what a value looks like
    is_optional: bool
    is_list: bool
    is_secret: bool
    is_hidden: bool  # used between our own processes and not shown to people

    @property
    def flag(self) -> str:
        """The setting's name as a flag on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def default_text(self) -> str:
        """The default as a person would write it."""
        if self.default in (None, (), {}):
            return NONE
        if self.form == "BYTES":
            for name, size in _UNITS:
                if self.default and self.default % size == 0:
                    return f"{self.default // size} {name}"
        return as_text(self.default)


@dataclass(frozen=True, slots=True)
class File:
    """A TOML file of settings, or none."""

    name: str = ""
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Section(Generic[Config]):
    """The settings of one process. `groups` names headings by the first field that stands under each."""

    def __init__(
        self, name: str, config: type[Config], groups: Mapping[str, str], hidden: Collection[str] = ()
    ) -> None:
        self.name = name
        self.prefix = f"DEGAS_{name.upper()}_"
        self._config = config
        self.settings = {one.name: one for one in _describe(cast(Any, config).model_fields, groups, hidden)}

    def variable(self, name: str) -> str:
        """A setting's environment variable."""
        return self.prefix + name.upper()

    def gather(
        self, flags: Mapping[str, object], environment: Mapping[str, str], file: File
    ) -> dict[str, Given]:
        """Every setting that is given, by name: flag before variable before file. Flags that are None are not given.

        Raises `ConfigError` for names that no setting has.
        """
        table = file.tables.get(self.name, {})
        for where, names in (("", flags), (f"{file.name} [{self.name}]: ", table)):
            for name in names:
                if name not in self.settings:
                    raise ConfigError(f"{where}{name} {self._is_no_setting(name)}")
        self._check_variables(environment)
        found: dict[str, Given] = {}
        for name, setting in self.settings.items():
            given = flags.get(name)
            if given is not None:
                text = ",".join(given) if isinstance(given, list) else given
                found[name] = Given(_value(setting, text), setting.flag)
            elif (text := environment.get(self.variable(name))) is not None:
                found[name] = Given(_value(setting, text), self.variable(name))
            elif name in table:
                found[name] = Given(_value(setting, table[name]), f"{file.name} [{self.name}]")
        return found

    def parse(self, found: Mapping[str, Given]) -> Config:
        """Check the values together. Raises `ConfigError` with a sentence for each that is wrong."""
        try:
            return self._config(**{name: given.value for name, given in found.items()})
        except ValueError as error:  # pydantic's own is one
            details = getattr(error, "errors", None)
            if details is None:
                raise
            found_wrong = details(include_input=False, include_url=False, include_context=False)
        raise ConfigError("; ".join(self._complaint(item, found) for item in found_wrong))

    def load(
        self, flags: Mapping[str, object], environment: Mapping[str, str], file: Path | None = None
    ) -> Config:
        """Gather and parse; the file is `file`, or the one that DEGAS_CONFIG names. Raises `ConfigError`."""
        return self.parse(self.gather(flags, environment, read_file(file, environment)))

    def texts(self, found: Mapping[str, Given]) -> dict[str, str]:
        """The given values as variables for a child's environment. Raises `ConfigError` for values that no text expresses."""
        for name, given in found.items():
            if isinstance(given.value, (list, tuple)) and any("," in str(item) for item in given.value):
                raise ConfigError(f"{name}: a value in {given.origin} holds a comma, which separates values")
        return {self.variable(name): as_text(given.value) for name, given in found.items()}

    def parameters(self, option: Callable[..., Any]) -> list[inspect.Parameter]:
        """One keyword for each setting, annotated for typer; `option` is `typer.Option`. All are texts, parsed later."""
        return [
            inspect.Parameter(
                one.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[
                    cast(Any, list[str] | None if one.is_list else str | None),
                    option(
                        one.flag,
                        help=f"{one.description} (default: {one.default_text})",
                        metavar=one.form,
                        show_default=False,
                        hidden=one.is_hidden,
                        rich_help_panel=f"{self.name}: {one.group}",
                    ),
                ],
            )
            for one in self.settings.values()
        ]

    def _check_variables(self, environment: Mapping[str, str]) -> None:
        for variable in environment:
            capitals = variable.upper()
            if not capitals.startswith("DEGAS_") or capitals == FILE_VARIABLE:
                continue
            if capitals.startswith(self.prefix):
                name = capitals.removeprefix(self.prefix).lower()
                if name not in self.settings or variable != capitals:
                    raise ConfigError(f"{variable} {self._is_no_setting(name, self.variable)}")
            elif not any(capitals.startswith(f"DEGAS_{section.upper()}_") for section in SECTIONS):
                word, _, rest = capitals.removeprefix("DEGAS_").lower().partition("_")
                near = difflib.get_close_matches(word, SECTIONS, n=1, cutoff=_NEAR)
                name = rest if near == [self.name] else f"{word}_{rest}" if rest else word
                if near == [self.name] or name in self.settings:
                    raise ConfigError(f"{variable} {self._is_no_setting(name, self.variable)}")

    def _is_no_setting(self, name: str, spell: Callable[[str], str] = str) -> str:
        close = difflib.get_close_matches(name, self.settings, n=1)
        hint = f"; did you mean {spell(close[0])}?" if close else ""
        owner = {"serve": "degas serve", "ray": "degas ray up"}.get(self.name, f"the {self.name}")
        return f"is not a setting of {owner}{hint}"

    def _complaint(self, item: Mapping[str, Any], found: Mapping[str, Given]) -> str:
        message = str(item["msg"]).removeprefix("Value error, ")
        if not item["loc"]:
            return message
        name = str(item["loc"][0])
        setting, given = self.settings[name], found.get(name)
        if given is not None:
            shown = "not shown" if setting.is_secret else as_text(given.value)
            message += f" ({given.origin} is {shown})"
        # Our own validators say what would be accepted.
        is_ours = item["type"] == "value_error"
        return f"{name}: {message}" + ("" if is_ours else f"; a safe value is {setting.default_text}")


def read_file(path: Path | None, environment: Mapping[str, str]) -> File:
    """The file at `path`, else the one that DEGAS_CONFIG names, else none. Raises `ConfigError`."""
    source = "--config"
    if path is None:
        if not environment.get(FILE_VARIABLE):
            return File()
        path, source = Path(environment[FILE_VARIABLE]), FILE_VARIABLE
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{source} {path}: {error.strerror}; it names a TOML file of settings") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    for name, table in tables.items():
        if name not in SECTIONS or not isinstance(table, dict):
            close = difflib.get_close_matches(name, SECTIONS, n=1)
            hint = f"; did you mean [{close[0]}]?" if close else ""
            raise ConfigError(
                f"{path}: {name} is not one of the tables [worker], [gateway], [serve], [ray]{hint}"
            )
    return File(str(path), tables)


def give_flags(command: Callable[..., Any], parameters: Iterable[inspect.Parameter]) -> None:
    """Let typer see these keywords in place of the `**flags` of a command."""
    own = inspect.signature(command, eval_str=True)
    kept = [one for one in own.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    cast(Any, command).__signature__ = own.replace(parameters=[*kept, *parameters])


def as_text(value: Any) -> str:
    """A value as it is written in a flag or a variable."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return json.dumps(value)
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _value(setting: Setting, given: Any) -> Any:
    """None for the text "none"; the section's model parses every other text."""
    says_none = isinstance(given, str) and given.lower() == NONE
    return None if setting.is_optional and says_none else given


def _describe(
    fields: Mapping[str, Any], groups: Mapping[str, str], hidden: Collection[str]
) -> Iterator[Setting]:
    group = ""
    for name, one in fields.items():
        group = groups.get(name, group)
        kinds = get_args(one.annotation) if NoneType in get_args(one.annotation) else (one.annotation,)
        kind = kinds[0]
        outer = get_origin(kind) or kind
        is_list = outer is tuple
        form = "|".join(get_args(kind)) if outer is Literal else _FORMS.get(outer, "TEXT")
        form = {"s": "SECONDS", "bytes": "BYTES"}.get(name.rpartition("_")[2], form)
        yield Setting(
            name=name,
            default=one.get_default(call_default_factory=True),
            description=one.description or "",
            group=group,
            form="TEXT,…" if is_list else form,
            is_optional=NoneType in kinds,
            is_list=is_list,
            is_secret=any(hasattr(inner, "get_secret_value") for inner in (kind, *get_args(kind))),
            is_hidden=name in hidden,
        )
