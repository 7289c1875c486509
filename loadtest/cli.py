"""Owns `degas loadtest`: options in, a run, then the table, the JSON and the page. Runs in the main thread."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest.client import Result, run
from loadtest.page import html_report
from loadtest.report import terminal_report, to_json
from loadtest.scenarios import Scenario, ScenarioError, Slo

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # its report would show variables, the API key among them
    help="Measure a running Degas from the outside.",
)

WARMUP_REQUESTS = 16


@app.callback()
def _loadtest() -> None:
    """Measure a running Degas from the outside."""


@app.command()
def short(
    url: Annotated[str, typer.Option(help="Base address of the server.")] = "http://127.0.0.1:8080",
    transport: Annotated[str, typer.Option(help="sse, ws or both.")] = "both",
    rate: Annotated[float, typer.Option(help="Arrivals a second, open loop.")] = 10.0,
    seconds: Annotated[float, typer.Option(help="How long requests keep arriving.")] = 10.0,
    max_requests: Annotated[int, typer.Option(help="Stop after this many.")] = 100_000,
    in_flight: Annotated[
        int, typer.Option(help="Closed loop: keep this many in flight instead of a rate.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Equal seeds send equal requests at equal times.")] = 0,
    pictures: Annotated[int, typer.Option(help="How many different pictures are asked about.")] = 8,
    picture_px: Annotated[int, typer.Option(help="Side of a picture in pixels.")] = 128,
    picture_height_px: Annotated[int, typer.Option(help="Cut pictures to this height. 0: squares.")] = 0,
    min_tokens: Annotated[int, typer.Option(help="Smallest output limit of a request.")] = 3,
    max_tokens: Annotated[int, typer.Option(help="Largest output limit of a request.")] = 16,
    connections: Annotated[int, typer.Option(help="WebSocket connections that the lanes share.")] = 4,
    timeout: Annotated[float, typer.Option(help="Give a request up after this many seconds.")] = 30.0,
    warmup: Annotated[
        bool, typer.Option(help="Wait for readiness and send a few unmeasured requests.")
    ] = False,
    ready_s: Annotated[
        float, typer.Option(help="With --warmup: fail if the server is not ready within this many seconds.")
    ] = 60.0,
    slo_ttft_ms: Annotated[float, typer.Option(help="Good: first token within this. 0: any.")] = 500.0,
    slo_gap_ms: Annotated[float, typer.Option(help="Good: every gap within this. 0: any.")] = 0.0,
    slo_total_ms: Annotated[float, typer.Option(help="Good: whole answer within this. 0: any.")] = 2000.0,
    model: Annotated[str | None, typer.Option(help="Model to name in requests.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="DEGAS_API_KEY", help="Key to send.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result here as JSON.")] = None,
    html_path: Annotated[
        Path | None, typer.Option("--html", help="Write a self-contained page here.")
    ] = None,
    i_own_this_host: Annotated[bool, typer.Option(help="Allow a target that is not this machine.")] = False,
) -> None:
    """Many short image questions, streamed: time to first token, gaps, totals, goodput and errors."""
    scenario = Scenario(
        url=url, transport=transport, rate=rate, seconds=seconds, max_requests=max_requests, in_flight=in_flight,
        seed=seed, pictures=pictures, picture_px=picture_px, picture_height_px=picture_height_px, min_tokens=min_tokens, max_tokens=max_tokens,
        connections=connections, warmup_requests=WARMUP_REQUESTS if warmup else 0, request_timeout_s=timeout, ready_s=ready_s,
        model=model, api_key=api_key, slo=Slo(slo_ttft_ms, slo_gap_ms, slo_total_ms), i_own_this_host=i_own_this_host,
    )  # fmt: skip
    raise typer.Exit(run_short(scenario, json_path=json_path, html_path=html_path))


def run_short(scenario: Scenario, *, json_path: Path | None = None, html_path: Path | None = None) -> int:
    """Run, print and write; the exit code is 0 when at least one request ended well and nothing cut the run short."""
    console = Console()
    try:
        scenario.check()
    except ScenarioError as error:
        Console(stderr=True).print(f"[red]degas loadtest:[/red] {error}")
        return 2
    try:
        result = _run_watched(scenario, Console(stderr=True))
    except ScenarioError as error:  # the server was not ready
        Console(stderr=True).print(f"[red]degas loadtest:[/red] {error}")
        return 2
    console.print(terminal_report(result))
    if json_path is not None:
        json_path.write_text(json.dumps(to_json(result), indent=1) + "\n")
        console.print(f"JSON: {json_path}")
    if html_path is not None:
        html_path.write_text(html_report(result))
        console.print(f"page: {html_path}")
    return 0 if result.all.ok and result.stopped is None else 1


def _run_watched(scenario: Scenario, console: Console) -> Result:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("load", total=scenario.seconds, counts="warming up")

        def show(elapsed_s: float, result: Result) -> None:
            counts = f"{result.all.ok} ok, {result.all.errors.total()} failed"
            progress.update(bar, completed=min(elapsed_s, scenario.seconds), counts=counts)

        async def watched() -> Result:
            stop = asyncio.Event()
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stop.set)
            return await run(scenario, stop=stop, on_progress=show)

        try:
            import uvloop
        except ImportError:
            return asyncio.run(watched())
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(watched())


if __name__ == "__main__":
    app()
