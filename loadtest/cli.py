"""Owns `degas loadtest`: options in, a run, then the table, the JSON and the page. Runs in the main thread."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest.client import Result
from loadtest.compared import compared_page, compared_table, read_report
from loadtest.page import html_report
from loadtest.report import terminal_report, to_json
from loadtest.scenarios import Scenario, ScenarioError, Slo
from loadtest.shards import on_loop, run_metered
from loadtest.target import fit

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # its report would show variables, the API key among them
    help="Measure a running Degas, or another server of OpenAI's interface, from the outside.",
)

WARMUP_REQUESTS = 16


@dataclass(frozen=True, slots=True)
class Preset:
    """What a scenario is for, and defaults that fit it."""

    help: str
    rate: float = 10.0
    max_tokens: int = 16
    slo_ttft_ms: float = 500.0
    slo_total_ms: float = 2000.0


PRESETS: Final = {
    "short": Preset("Many short questions, about pictures where the model takes them."),
    "chat": Preset("Conversations of several turns: each sends the whole history again.", 4.0, 32),
    "bursts": Preset("Requests that arrive many at once: how long do the last of a burst wait?", 20.0),
    "long": Preset("Prompts of thousands of tokens that share no beginning.", 1.0, 16, 5000.0, 10_000.0),
    "structured": Preset("Answers that a JSON schema constrains; each is checked.", 5.0, 64, 500.0, 4000.0),
    "cancels": Preset(
        "Clients that go away in the middle; afterwards nothing may be left running.", 40.0, 64
    ),
    "slow": Preset("Some clients read slowly: do the others notice?", 10.0, 64, 500.0, 4000.0),
    "mixed": Preset("All of these at once.", 10.0, 32, 1000.0, 5000.0),
}


@app.callback()
def _loadtest() -> None:
    """Measure a running Degas, or another server of OpenAI's interface, from the outside."""


def _command(kind: str, preset: Preset) -> Callable[..., None]:
    """The command of one scenario: all have the same options, and defaults of their own."""

    def command(
        url: Annotated[str, typer.Option(help="Base address of the server.")] = "http://127.0.0.1:8080",
        transport: Annotated[str, typer.Option(help="sse, ws or both.")] = "both",
        rate: Annotated[float, typer.Option(help="Arrivals a second, open loop.")] = preset.rate,
        seconds: Annotated[float, typer.Option(help="How long requests keep arriving.")] = 10.0,
        max_requests: Annotated[int, typer.Option(help="Stop after this many.")] = 100_000,
        in_flight: Annotated[
            int, typer.Option(help="Closed loop: keep this many in flight instead of a rate.")
        ] = 0,
        processes: Annotated[int, typer.Option(help="Client processes that share the load.")] = 1,
        seed: Annotated[int, typer.Option(help="Equal seeds send equal requests at equal times.")] = 0,
        model: Annotated[
            str | None, typer.Option(help="Model to ask; none: the first that the server lists.")
        ] = None,
        images: Annotated[
            str,
            typer.Option(help="yes, no, or auto: as the server says; other servers than Degas say nothing."),
        ] = "auto",
        pictures: Annotated[int, typer.Option(help="How many different pictures are asked about.")] = 8,
        picture_px: Annotated[int, typer.Option(help="Side of a picture in pixels.")] = 128,
        picture_height_px: Annotated[int, typer.Option(help="Cut pictures to this height. 0: squares.")] = 0,
        min_tokens: Annotated[int, typer.Option(help="Smallest output limit of a request.")] = 3,
        max_tokens: Annotated[
            int, typer.Option(help="Largest output limit of a request.")
        ] = preset.max_tokens,
        turns: Annotated[int, typer.Option(help="chat, mixed: turns of a conversation.")] = 4,
        think_s: Annotated[
            float, typer.Option(help="chat, mixed: seconds between answer and question.")
        ] = 0.2,
        burst: Annotated[int, typer.Option(help="bursts: requests that arrive at once.")] = 16,
        prompt_tokens: Annotated[
            int, typer.Option(help="long, mixed: about so many tokens a prompt. 0: what fits, at most 2000.")
        ] = 0,
        slow_share: Annotated[
            float, typer.Option(help="slow: share of the clients that read slowly.")
        ] = 0.25,
        pause_s: Annotated[
            float, typer.Option(help="slow, mixed: a slow client's pause between reads.")
        ] = 0.5,
        connections: Annotated[int, typer.Option(help="WebSocket connections that the lanes share.")] = 4,
        timeout: Annotated[float, typer.Option(help="Give a request up after this many seconds.")] = 30.0,
        warmup: Annotated[
            bool, typer.Option(help="Wait for readiness and send a few unmeasured requests.")
        ] = False,
        ready_s: Annotated[
            float, typer.Option(help="With --warmup: fail if the server is not ready within so many seconds.")
        ] = 60.0,
        slo_ttft_ms: Annotated[
            float, typer.Option(help="Good: first token within this. 0: any.")
        ] = preset.slo_ttft_ms,
        slo_gap_ms: Annotated[float, typer.Option(help="Good: every gap within this. 0: any.")] = 0.0,
        slo_total_ms: Annotated[
            float, typer.Option(help="Good: whole answer within this. 0: any.")
        ] = preset.slo_total_ms,
        price_per_hour: Annotated[
            float, typer.Option(help="Price of all its devices for an hour. 0: what its metrics say.")
        ] = 0.0,
        api_key: Annotated[str | None, typer.Option(envvar="DEGAS_API_KEY", help="Key to send.")] = None,
        api_key_env: Annotated[
            str | None, typer.Option(help="Name of the variable that holds the key to send.")
        ] = None,
        json_path: Annotated[
            Path | None, typer.Option("--json", help="Write the result here as JSON.")
        ] = None,
        html_path: Annotated[
            Path | None, typer.Option("--html", help="Write a self-contained page here.")
        ] = None,
        i_own_this_host: Annotated[
            bool, typer.Option(help="Allow a target that is not this machine.")
        ] = False,
    ) -> None:
        scenario = Scenario(
            url=url, kind=kind, transport=transport, rate=rate, seconds=seconds, max_requests=max_requests,
            in_flight=in_flight, seed=seed, processes=processes, pictures=pictures, picture_px=picture_px,
            picture_height_px=picture_height_px, min_tokens=min(min_tokens, max_tokens), max_tokens=max_tokens, turns=turns,
            think_s=think_s, burst=burst, prompt_tokens=prompt_tokens, slow_share=slow_share, pause_s=pause_s,
            connections=connections, warmup_requests=WARMUP_REQUESTS if warmup else 0, request_timeout_s=timeout,
            ready_s=ready_s, model=model, price_per_hour=price_per_hour, api_key=_key(api_key, api_key_env),
            salt=f"{time.time_ns():x}", slo=Slo(slo_ttft_ms, slo_gap_ms, slo_total_ms), i_own_this_host=i_own_this_host,
        )  # fmt: skip
        raise typer.Exit(run_scenario(scenario, images=images, json_path=json_path, html_path=html_path))

    command.__doc__ = preset.help
    return command


for _kind, _preset in PRESETS.items():
    app.command(_kind)(_command(_kind, _preset))


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="The JSON of one run.")],
    second: Annotated[Path, typer.Argument(help="The JSON of another, compared with the first.")],
    html_path: Annotated[
        Path | None, typer.Option("--html", help="Write a self-contained page here.")
    ] = None,
) -> None:
    """Put two runs side by side: latencies, rates, errors."""
    try:
        runs = read_report(first), read_report(second)
    except (OSError, ValueError) as error:
        _fail(str(error))
        raise typer.Exit(2) from None
    console = Console()
    console.print(compared_table(*runs))
    if html_path is not None:
        html_path.write_text(compared_page(*runs))
        console.print(f"page: {html_path}")


def run_scenario(
    scenario: Scenario, *, images: str = "auto", json_path: Path | None = None, html_path: Path | None = None
) -> int:
    """Run, print and write; the exit code is 0 when at least one request ended well and nothing cut the run short."""
    console = Console()
    takes_images = {"yes": True, "no": False, "auto": None}
    try:
        if images not in takes_images:
            raise ScenarioError(f"--images must be yes, no or auto, not {images!r}")
        fitted = on_loop(fit(scenario, takes_images=takes_images[images]))
        result = _run_watched(fitted, Console(stderr=True))
    except ScenarioError as error:
        _fail(str(error))
        return 2
    console.print(terminal_report(result))
    if json_path is not None:
        json_path.write_text(json.dumps(to_json(result), indent=1) + "\n")
        console.print(f"JSON: {json_path}")
    if html_path is not None:
        html_path.write_text(html_report(result))
        console.print(f"page: {html_path}")
    served = result.all.ok + (result.all.left if scenario.kind == "cancels" else 0)
    return 0 if served and result.stopped is None else 1


def _key(key: str | None, variable: str | None) -> str | None:
    """The key itself, from an option or a variable that the user named."""
    if variable is None:
        return key
    found = os.environ.get(variable)
    if not found:
        _fail(f"--api-key-env: the variable {variable} is not set")
        raise typer.Exit(2)
    return found


def _fail(message: str) -> None:
    Console(stderr=True).print(f"[red]degas loadtest:[/red] {message}", highlight=False, soft_wrap=True)


def _run_watched(scenario: Scenario, console: Console) -> Result:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeElapsedColumn(),
    )
    several = scenario.processes > 1
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        counts = f"{scenario.processes} processes" if several else "warming up"
        bar = progress.add_task("load", total=None if several else scenario.seconds, counts=counts)

        def show(elapsed_s: float, result: Result) -> None:
            counts = f"{result.all.ok} ok, {result.all.errors.total()} failed"
            progress.update(bar, completed=min(elapsed_s, scenario.seconds), counts=counts)

        return run_metered(scenario, show)


if __name__ == "__main__":
    app()
