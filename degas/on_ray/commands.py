"""Owns the commands `degas ray up`, `down` and `status`. Main thread; Ray is imported once one of them runs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from degas.on_ray.config import RAY_SETTINGS, RayConfig
from degas.on_ray.settings import OWN, SECTIONS, resolve
from shared.settings import ConfigError, give_flags, read_file

if TYPE_CHECKING:
    from degas.on_ray.cluster import SeenBoard

WRONG_SETTINGS = 2
NOT_UP = 1
POLL_S = 0.5

app = typer.Typer(
    no_args_is_help=True,
    help="Workers as actors on a Ray cluster: placed, restarted and scaled by it (needs the extra `ray`).",
)

ModelName = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="What to serve, as --model says it.", show_default=False)
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(help="TOML file of settings with the tables ray, worker, gateway; also DEGAS_CONFIG."),
]
Fleet = Annotated[str | None, typer.Option(help="Name of the fleet.", show_default="degas")]
Address = Annotated[
    str | None, typer.Option(help="<host>:<port> of the cluster's head; default: the one of this machine.")
]
NodeIp = Annotated[str | None, typer.Option(help="Which node this is, where several run on one machine.")]


@app.command("up")
def up(model_name: ModelName = None, config: ConfigFile = None, **flags: object) -> None:
    """Serve with workers on a Ray cluster, and gateways here. Ctrl-C ends all of it in order.

    Every setting is a flag, a variable (DEGAS_RAY_…, DEGAS_WORKER_…, DEGAS_GATEWAY_…) and a line of the file.
    """
    if model_name is not None:
        if flags["model"] not in (None, model_name):
            _fail("up", f"MODEL is {model_name!r} and --model {flags['model']!r}; give one of them")
        flags["model"] = model_name
    try:
        settings = resolve(flags, os.environ, config)
    except ConfigError as error:
        _fail("up", str(error))
    _need_ray("up")
    from degas.on_ray.up import up as run

    raise typer.Exit(run(settings))


@app.command("down")
def down(fleet: Fleet = None, address: Address = None, node_ip: NodeIp = None) -> None:
    """End a fleet in order, wherever on the cluster its `degas ray up` runs, and wait for the end."""
    board, name = _board("down", fleet, address, node_ip)
    from degas.on_ray.actors import Gone

    board.stop()
    shown = None
    try:
        while True:
            workers = len(board.read().get("workers", []))
            if workers != shown:
                typer.echo(f"{name} is draining, {workers} workers are left")
                shown = workers
            time.sleep(POLL_S)
    except Gone:
        typer.echo(f"{name} has ended")


@app.command("status")
def status(
    fleet: Fleet = None,
    address: Address = None,
    node_ip: NodeIp = None,
    as_json: Annotated[bool, typer.Option("--json", help="An object for programs.")] = False,
) -> None:
    """Tell where a fleet serves, and where its workers are."""
    board, name = _board("status", fleet, address, node_ip)
    from degas.on_ray.actors import Gone

    try:
        state = board.read()
    except Gone:
        typer.echo(f"{name} has ended", err=True)
        raise typer.Exit(NOT_UP) from None
    typer.echo(json.dumps(state) if as_json else describe(name, state))


def describe(name: str, state: dict[str, Any]) -> str:
    """A fleet's state as people read it."""
    lines = [f"{name}: {'serves' if state.get('ready') else 'is starting'} {state.get('url', '')}".rstrip()]
    workers = state.get("workers", [])
    lines.append(f"{len(workers)} workers, {state.get('wanted', 0)} wanted")
    lines += [
        f"  {one['number']:>4}  {one['state']:<8}  {one['endpoint'] or '-':<28}  {one['node'] or '-'}"
        for one in workers
    ]
    return "\n".join(lines)


def parameters() -> Iterator[Parameter]:
    """A flag for every setting of `up`, but for those that it sets itself; a name that two sections have is one flag."""
    seen = {name for names in OWN.values() for name in names}
    for section in SECTIONS:
        for parameter in section.parameters(typer.Option):
            if parameter.name not in seen and not section.settings[parameter.name].is_hidden:
                seen.add(parameter.name)
                yield parameter


give_flags(up, parameters())


def _board(
    command: str, fleet: str | None, address: str | None, node_ip: str | None
) -> tuple[SeenBoard, str]:
    """The board of a fleet, and the fleet's name; variables and DEGAS_CONFIG count as for `up`."""
    flags = {"fleet": fleet, "address": address, "node_ip": node_ip}
    try:
        found = RAY_SETTINGS.gather(flags, os.environ, read_file(None, os.environ))
        config: RayConfig = RAY_SETTINGS.parse({name: found[name] for name in flags if name in found})
    except ConfigError as error:
        _fail(command, str(error))
    _need_ray(command)
    from degas.on_ray import cluster

    try:
        cluster.join(config, only_existing=True)
        return cluster.SeenBoard(config.fleet), config.fleet
    except cluster.ClusterError as error:
        typer.echo(f"degas ray {command}: {error}", err=True)
        raise typer.Exit(NOT_UP) from None


def _need_ray(command: str) -> None:
    try:
        import ray  # noqa: F401
    except ModuleNotFoundError:
        _fail(command, "this needs ray: pip install 'degas-serve[gateway,ray]'")


def _fail(command: str, message: str) -> NoReturn:
    typer.echo(f"degas ray {command}: {message}", err=True)
    raise typer.Exit(WRONG_SETTINGS)
