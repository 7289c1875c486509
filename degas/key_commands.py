"""Owns `degas keys`: clients' API keys in a file, and CURVE key pairs for worker and gateways. Main thread."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from gateway.config import GATEWAY_SETTINGS
from shared.settings import ConfigError, read_file

WRONG_USE = 2


class _Keys(typer.core.TyperGroup):
    """`degas keys FOLDER` is `degas keys curve FOLDER`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]  # typer's is click's
        """See click's `Command`."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["curve", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Keys, no_args_is_help=True, help="API keys of clients; `degas keys FOLDER` makes CURVE key pairs."
)

KeyName = Annotated[str, typer.Argument(metavar="NAME", help="Letters, digits, _ . -; stands in metrics.")]
KeysFile = Annotated[
    Path | None,
    typer.Option("--keys-file", help="The file; by default the gateway's own setting.", show_default=False),
]
Limit = Annotated[int | None, typer.Option(min=1, show_default=False)]


@app.command("curve")
def curve(
    folder: Annotated[Path, typer.Argument(help="Where the keys go.")],
    apart: Annotated[
        bool, typer.Option(help="A folder for the worker, another for gateways, in FOLDER.")
    ] = False,
) -> None:
    """Make CURVE key pairs for a worker and its gateways, unless they exist."""
    from degas.keys import run

    raise typer.Exit(run(folder, apart=apart))


@app.command("new")
def new(
    name: KeyName,
    tenant: Annotated[
        str | None,
        typer.Option(help="Whose it is; default: NAME. Keys of a tenant share what is held for it."),
    ] = None,
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    max_streams: Limit = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A model it may use; may be given again. None: all.")
    ] = None,
    days: Annotated[
        int | None, typer.Option(min=1, help="Days until it expires.", show_default=False)
    ] = None,
    keys_file: KeysFile = None,
) -> None:
    """Make an API key, print it once, and append its hash and limits to the file. Tokens are prompts' and answers' together."""
    import msgspec

    from degas import api_keys
    from gateway import keys

    path = _path(keys_file)
    key, hashed = api_keys.new_key()
    expires = None
    if days is not None:
        expires = (datetime.now(UTC) + timedelta(days=days)).replace(microsecond=0)
    fields = {
        "name": name,
        "hash": hashed,
        "tenant": tenant,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_streams": max_streams,
        "models": tuple(model) if model else None,
        "expires": expires,
    }
    try:
        api_keys.add(path, msgspec.convert(fields, keys.KeyEntry))
    except msgspec.ValidationError as error:
        _fail(str(error))
    except (keys.KeysError, OSError) as error:
        _fail(f"{path}: {error}")
    print(key)
    print(f"degas keys: added {name} to {path}; the key is not shown again", file=sys.stderr)


@app.command("list")
def show(keys_file: KeysFile = None) -> None:
    """List the keys of the file: name, tenant, limits, expiry. Never a hash."""
    from gateway import keys

    path = _path(keys_file)
    try:
        entries = keys.load(path)
    except keys.KeysError as error:
        _fail(f"{path}: {error}")
    rows = [["NAME", "TENANT", "REQUESTS/MIN", "TOKENS/MIN", "STREAMS", "MODELS", "EXPIRES"]]
    for entry in entries:
        expires = "never" if entry.expires is None else entry.expires.isoformat()
        if entry.is_over(datetime.now(UTC).timestamp()):
            expires += " (over)"
        limits = (entry.requests_per_minute, entry.tokens_per_minute, entry.max_streams)
        models = "all" if entry.models is None else ",".join(entry.models)
        rows.append([entry.name, entry.owner, *(str(one or "-") for one in limits), models, expires])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command("revoke")
def revoke(name: KeyName, keys_file: KeysFile = None) -> None:
    """Take a key out of the file. Gateways notice within a second; answers under way go on to their end."""
    from degas import api_keys
    from gateway import keys

    path = _path(keys_file)
    try:
        api_keys.remove(path, name)
    except (keys.KeysError, OSError) as error:
        _fail(f"{path}: {error}")
    print(f"degas keys: revoked {name}", file=sys.stderr)


def _path(given: Path | None) -> Path:
    """The file that was named, or the one that a gateway would use."""
    if given is not None:
        return given
    try:
        found = GATEWAY_SETTINGS.gather({}, os.environ, read_file(None, os.environ)).get("keys_file")
    except ConfigError as error:
        _fail(str(error))
    if found is None:
        _fail("which file? give --keys-file, or set DEGAS_GATEWAY_KEYS_FILE")
    return Path(str(found.value))


def _fail(message: str) -> NoReturn:
    print(f"degas keys: {message}", file=sys.stderr)
    raise typer.Exit(WRONG_USE)
