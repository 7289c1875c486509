"""Owns the `degas` command: serve, worker, gateway, models, config, doctor, keys, ray, top, bench, loadtest. Main thread; heavy imports are lazy."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Parameter
from pathlib import Path
from typing import Annotated

import typer

from degas.key_commands import app as keys_app
from degas.on_ray.commands import app as ray_app
from degas.settings import ALL, OWN_SOCKET, resolve, serve_options
from gateway.config import GATEWAY_SETTINGS
from shared.settings import ConfigError, give_flags
from worker.config import WORKER_SETTINGS

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # its report would show variables, API keys among them
    help="Degas: streaming inference for small vision-language models, with the bubbles taken out.",
)
ANYTHING = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
WRONG_SETTINGS = 2

ModelName = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="What to serve, as --model says it.", show_default=False)
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(help="TOML file of settings with the tables worker, gateway, serve; also DEGAS_CONFIG."),
]


@app.callback(invoke_without_command=True)
def _degas(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        typer.echo(f"degas {_version()}")
        raise typer.Exit


@app.command("serve")
def serve(model_name: ModelName = None, config: ConfigFile = None, **flags: object) -> None:
    """Serve on this machine: one gateway and one supervised worker.

    Every setting of both is a flag here, a variable DEGAS_WORKER_<NAME> or DEGAS_GATEWAY_<NAME>, and a line of the file.
    A flag beats a variable, a variable the file.
    """
    from degas import supervisor

    with _wrong_settings_end("serve"):
        options = serve_options(resolve(_with_model(model_name, flags), os.environ, config))
    raise typer.Exit(supervisor.serve(options))


@app.command("worker")
def worker(config: ConfigFile = None, **flags: object) -> None:
    """Run a worker alone. Each setting is also a variable DEGAS_WORKER_<NAME> and a line of the file's table worker."""
    from worker.__main__ import run

    raise typer.Exit(run(flags, config))


@app.command("gateway")
def gateway(config: ConfigFile = None, **flags: object) -> None:
    """Run a gateway alone. Each setting is also a variable DEGAS_GATEWAY_<NAME> and a line of the file's table gateway."""
    try:
        from gateway.__main__ import run
    except ModuleNotFoundError as error:
        typer.echo(f"the gateway needs {error.name}: pip install 'degas-serve[gateway]'", err=True)
        raise typer.Exit(WRONG_SETTINGS) from None
    raise typer.Exit(run(flags, config))


@app.command("models")
def models(
    folder: Annotated[
        list[Path] | None, typer.Option(help="Folder to look in as well; may be given again.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A list for programs.")] = False,
) -> None:
    """List the models on this machine: embedded ones, those in the hub's cache, and those in folders."""
    from degas.models import print_models

    raise typer.Exit(print_models(folder or [], as_json=as_json))


@app.command(name="config")
def show_config(
    model_name: ModelName = None,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: value and origin of each.")] = False,
    as_toml: Annotated[bool, typer.Option("--toml", help="Print a file that --config reads.")] = False,
    **flags: object,
) -> None:
    """Print the settings that `degas serve` with the same flags would use, and where each comes from. Keys stay hidden."""
    from degas import config_view

    with _wrong_settings_end("config"):
        effective = resolve(_with_model(model_name, flags), os.environ, config)
    if as_json or as_toml:
        typer.echo((config_view.as_json if as_json else config_view.as_toml)(effective).rstrip("\n"))
    else:
        config_view.show(effective)


@app.command("doctor")
def doctor(
    model_name: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Load it too: what it takes here, and how quick it can be."),
    ] = None,
) -> None:
    """Check this machine and installation, and say what to do about what is wrong. Settings are those of the environment."""
    from degas.doctor import examine

    raise typer.Exit(examine(model_name))


@app.command("top")
def top(
    urls: Annotated[list[str] | None, typer.Argument(metavar="[URL]...", help="Gateways to watch.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and stop.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Figures for programs, a line each interval.")
    ] = False,
    interval: Annotated[
        float, typer.Option(help="Seconds between readings; with --once 0: one reading, since the start.")
    ] = 1.0,
    api_key_env: Annotated[
        str, typer.Option(help="Name of the variable with the key, where metrics need one.")
    ] = "DEGAS_API_KEY",
) -> None:
    """Watch gateways and their workers: streams, queue, tokens, step times, pages, cost. Ctrl-C ends it."""
    try:
        from degas.top.command import run
        from degas.top.scrape import check_url
    except ModuleNotFoundError as error:
        typer.echo(f"degas top needs {error.name}: pip install 'degas-serve[gateway]'", err=True)
        raise typer.Exit(WRONG_SETTINGS) from None
    try:
        addresses = [check_url(url) for url in urls or ["http://127.0.0.1:8080"]]
        if not (0.1 <= interval <= 3600 or (once and interval == 0)):
            raise ValueError(
                f"--interval must be between 0.1 and 3600 s, not {interval:g}; 1 is a safe value"
            )
    except ValueError as error:
        typer.echo(f"degas top: {error}", err=True)
        raise typer.Exit(WRONG_SETTINGS) from None
    key = os.environ.get(api_key_env) or None
    if key is None and api_key_env != "DEGAS_API_KEY":
        typer.echo(f"degas top: the variable {api_key_env} is not set", err=True)
        raise typer.Exit(WRONG_SETTINGS)
    raise typer.Exit(run(addresses, key=key, interval_s=interval, once=once, as_json=as_json))


def serve_parameters() -> Iterator[Parameter]:
    """A flag for every setting of the supervisor and of both processes; a name that two of them have is one flag."""
    seen = set(OWN_SOCKET.values())
    for section in ALL:
        for parameter in section.parameters(typer.Option):
            if parameter.name not in seen and not section.settings[parameter.name].is_hidden:
                seen.add(parameter.name)
                yield parameter


app.add_typer(keys_app, name="keys")
app.add_typer(ray_app, name="ray")
give_flags(serve, serve_parameters())
give_flags(show_config, serve_parameters())
give_flags(worker, WORKER_SETTINGS.parameters(typer.Option))
give_flags(gateway, GATEWAY_SETTINGS.parameters(typer.Option))


def main() -> None:
    """Entry point of the console script."""
    own = {one.name for one in app.registered_commands} | {one.name for one in app.registered_groups}
    if not {*sys.argv[1:2]} & own:
        _add_measuring()
    app(prog_name="degas")


def _add_measuring() -> None:
    """bench, loadtest and simulate, which load a client and the loop: a server's process has no use for them."""
    try:
        from loadtest.bench.cli import app as bench
        from loadtest.bench.simulate import app as simulate
        from loadtest.capacity.command import cluster
        from loadtest.chaos.commands import faults, soak
        from loadtest.cli import app as loadtest

        app.add_typer(loadtest, name="loadtest")
        app.add_typer(bench, name="bench")
        simulate.command(name="cluster")(cluster)
        app.add_typer(simulate, name="simulate")
        app.command(name="soak")(soak)
        app.command(name="faults")(faults)
    except ImportError as error:
        missing = str(error.name)

        @app.command(name="simulate", context_settings=ANYTHING)
        @app.command(name="soak", context_settings=ANYTHING)
        @app.command(name="faults", context_settings=ANYTHING)
        @app.command(name="loadtest", context_settings=ANYTHING)
        @app.command(name="bench", context_settings=ANYTHING)
        def absent() -> None:
            """Needs the extra `loadtest`."""
            typer.echo(f"this needs {missing}: pip install 'degas-serve[loadtest]'", err=True)
            raise typer.Exit(WRONG_SETTINGS)


def _version() -> str:
    try:
        return importlib.metadata.version("degas-serve")
    except importlib.metadata.PackageNotFoundError:
        return "of a source folder that is not installed"


def _with_model(name: str | None, flags: dict[str, object]) -> dict[str, object]:
    """The positional MODEL is `--model`."""
    if name is None:
        return flags
    if flags["model"] not in (None, name):
        raise ConfigError(f"MODEL is {name!r} and --model {flags['model']!r}; give one of them")
    return flags | {"model": name}


@contextmanager
def _wrong_settings_end(command: str) -> Iterator[None]:
    """One sentence and exit code 2 in place of a `ConfigError`."""
    try:
        yield
    except ConfigError as error:
        typer.echo(f"degas {command}: {error}", err=True)
        raise typer.Exit(WRONG_SETTINGS) from None
