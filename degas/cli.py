"""Owns the `degas` command: serve, gateway, worker, bench, loadtest, doctor. Main thread; heavy imports are lazy."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Degas: streaming inference for small vision-language models, with the bubbles taken out.",
)
FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Option(help="'pocket' (embedded), 'sim', or a checkpoint folder.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP and WebSocket port; 0 picks a free one.")] = 8080,
    grpc_port: Annotated[int, typer.Option(help="gRPC port; 0 picks a free one, -1 is off.")] = 8081,
    device: Annotated[str | None, typer.Option(help="auto, cuda, cpu or sim.")] = None,
    depth: Annotated[int | None, typer.Option(help="Steps in flight; 1 is blocking mode.")] = None,
    max_rows: Annotated[int | None, typer.Option(help="Sequences decoded together.")] = None,
    beat_timeout: Annotated[
        float, typer.Option(help="Seconds without decode progress after which the worker is replaced.")
    ] = 3.0,
) -> None:
    """Serve on this machine: one gateway and one supervised worker.

    Everything else is set by DEGAS_WORKER_… and DEGAS_GATEWAY_… variables (docs/operating.md lists them).
    """
    from degas import supervisor
    from degas.options import ServeOptions

    given = {"model": model, "device": device, "depth": depth, "max_rows": max_rows}
    options = ServeOptions(
        host=host,
        port=port,
        grpc_port=None if grpc_port < 0 else grpc_port,
        worker_settings={name: str(value) for name, value in given.items() if value is not None},
        beat_timeout_s=beat_timeout,
    )
    raise typer.Exit(supervisor.serve(options))


@app.command(context_settings=FORWARDED)
def worker(context: typer.Context) -> None:
    """Run a worker alone (`degas worker --help` lists its settings)."""
    from worker.__main__ import main as worker_main

    raise typer.Exit(worker_main(list(context.args)))


@app.command(context_settings=FORWARDED)
def gateway(context: typer.Context) -> None:
    """Run a gateway alone; its settings are DEGAS_GATEWAY_… variables."""
    from gateway.__main__ import main as gateway_main

    sys.argv = ["degas gateway", *context.args]
    raise typer.Exit(gateway_main())


@app.command()
def doctor() -> None:
    """Check this machine and installation, and say what to do about what is wrong."""
    from degas.doctor import examine

    raise typer.Exit(examine())


@app.command(context_settings=FORWARDED)
def keys(context: typer.Context) -> None:
    """Make CURVE key pairs for a worker and its gateways (`degas keys FOLDER [--apart]`), unless they exist."""
    from degas.keys import main as keys_main

    raise typer.Exit(keys_main(list(context.args)))


def main() -> None:
    """Entry point of the console script."""
    try:
        from loadtest.bench.cli import app as bench
        from loadtest.bench.simulate import command as simulate
        from loadtest.cli import app as loadtest

        app.add_typer(loadtest, name="loadtest")
        app.add_typer(bench, name="bench")
        app.command(name="simulate")(simulate)
    except ImportError as error:
        missing = str(error.name)

        @app.command(name="simulate", context_settings=FORWARDED)
        @app.command(name="loadtest", context_settings=FORWARDED)
        @app.command(name="bench", context_settings=FORWARDED)
        def absent() -> None:
            typer.echo(f"this needs {missing}: pip install 'degas-serve[loadtest]'", err=True)
            raise typer.Exit(2)

    app()
