"""Owns `degas bench …`: what can be measured on this machine, each as a command. Runs in the main thread."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from loadtest.bench.gateway_cost import gateway
from loadtest.bench.options import BatchSizes, JsonFlag, Profile, Rounds, Seconds, whole
from loadtest.bench.peer_commands import engine, serve
from loadtest.bench.quality_command import command as quality
from loadtest.bench.shown import (
    accuracy_table,
    decode_table,
    first_token_table,
    loop_table,
    structured_table,
)
from loadtest.tables import of_objects, show

app = typer.Typer(
    no_args_is_help=True, help="Measure parts of Degas; every figure in the docs has its command here."
)

app.command(name="quality")(quality)
app.command()(gateway)
app.command()(engine)
app.command()(serve)


@app.command()
def loop(
    device: Annotated[str, typer.Option(help="Only 'sim' for now: steps held for a GPU's time.")] = "sim",
    profile: Profile = "b200",
    rows: BatchSizes = "1,8,32",
    seconds: Seconds = 4.0,
    depth: Annotated[int, typer.Option(help="Steps in flight of the pipelined run, 2 to 4.")] = 2,
    picture: Annotated[
        Path | None, typer.Option(help="Draw both timelines of the last batch size as SVG.")
    ] = None,
    structured: Annotated[
        str,
        typer.Option(help="Instead: throughput with these per cent of requests constrained (0,20,80,100)."),
    ] = "",
    as_json: JsonFlag = False,
) -> None:
    """Blocking against pipelined decoding: step time, host time, bubble and gain, beside the published rows."""
    from loadtest.bench.loop import measure_row
    from loadtest.bench.timeline import draw

    if device != "sim":
        raise typer.BadParameter("only the simulated device has fixed step times", param_hint="--device")
    if structured:
        _structured(
            structured, profile, max(int(number) for number in rows.split(",")), seconds, as_json=as_json
        )
        return
    measured = [measure_row(int(number), profile, seconds, depth) for number in rows.split(",")]
    done = [row for row, _ in measured]
    if picture is not None:
        row, recordings = measured[-1]
        gpu = f"{profile.upper()} step times held in real time, {row.rows} streams to real clients"
        picture.write_text(draw(recordings, f"{gpu}: degas bench loop --profile {profile} --rows {row.rows}"))
    show(loop_table(done, profile), [row.to_json() for row in done], as_json=as_json)


@app.command()
def cancels(
    count: Annotated[
        int, typer.Option(help="Sequences submitted over the wire; about half are cancelled.")
    ] = 100_000,
    hang_ups: Annotated[int, typer.Option(help="HTTP streams whose client just leaves.")] = 1000,
    as_json: JsonFlag = False,
) -> None:
    """Random cancels against a real worker: is every page, row, thread and descriptor back where it was?"""
    from loadtest.bench.cancels import run_cancels

    report = run_cancels(count, hang_ups=hang_ups)
    found = report.to_json()
    show(of_objects("sequences that were cancelled, and what they left", [found]), [found], as_json=as_json)
    raise typer.Exit(0 if report.is_clean else 1)


@app.command()
def chaos(
    model: Annotated[str, typer.Option(help="sim, the simulated device, or pocket.")] = "sim",
    clients: Annotated[int, typer.Option(help="Clients that ask all the time, 1 to 2000.")] = 200,
    seconds: Annotated[float, typer.Option(help="How long they ask.")] = 40.0,
    kill_every: Annotated[float, typer.Option(help="Seconds from one kill of the worker to the next.")] = 7.0,
    stops: Annotated[int, typer.Option(help="Kills that are a SIGSTOP instead.")] = 1,
    hang_ups: Annotated[float, typer.Option(help="Share of requests whose client just leaves.")] = 0.1,
    tokens: Annotated[int, typer.Option(help="Tokens of an answer, half to twice as many.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the clients' habits.")] = 1,
    as_json: JsonFlag = False,
) -> None:
    """Kill the worker under load, again and again: what clients are told, what is served, and what is left behind."""
    from loadtest.bench.chaos import Plan, run_chaos
    from loadtest.peers.process import end_on_sigterm

    end_on_sigterm()
    plan = Plan(model, clients, seconds, kill_every, stops, hang_ups, tokens, seed)
    try:
        report = run_chaos(plan)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    show(report.table(), [report.to_json()], as_json=as_json)
    raise typer.Exit(0 if report.is_clean else 1)


@app.command()
def ttft(
    profile: Profile = "b200",
    rows: Annotated[int, typer.Option(help="Background streams.")] = 16,
    probes: Annotated[int, typer.Option(help="Requests timed in each round.")] = 60,
    rounds: Rounds = 3,
    as_json: JsonFlag = False,
) -> None:
    """Time to first token under load: blocking, pipelined, and pipelined with late launch, turn about."""
    from loadtest.bench.first_token import measure

    done = measure(profile, rows, probes, rounds)
    show(first_token_table(done, rows, profile), [mode.to_json() for mode in done], as_json=as_json)


@app.command()
def flood(
    profile: Profile = "b200",
    rows: Annotated[int, typer.Option(help="Sequences the worker runs at once.")] = 8,
    queue: Annotated[int, typer.Option(help="Requests that may wait.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 16,
    seconds: Seconds = 4.0,
    rounds: Rounds = 2,
    as_json: JsonFlag = False,
) -> None:
    """Short requests at 1, 2, 5 and 10 times what can be served: goodput, time to first token, refusals."""
    from loadtest.bench.flood import FACTORS, flood_table, measure

    done = measure(
        profile=profile,
        rows=rows,
        queue=queue,
        tokens=tokens,
        seconds=seconds,
        rounds=rounds,
        factors=FACTORS,
    )
    title = f"{rows} rows, queue of {queue}, {tokens} tokens, {profile}"
    show(flood_table(done, title), [row.to_json() for row in done], as_json=as_json)
    raise typer.Exit(1 if any(row.keeps_promise is False for row in done) else 0)


@app.command()
def scaling(
    workers: Annotated[int, typer.Option(help="Workers beside one.")] = 3,
    gateways: Annotated[int, typer.Option(help="Gateways before them.")] = 2,
    profile: Profile = "rtx3090",
    rows: Annotated[int, typer.Option(help="Sequences each worker runs at once.")] = 8,
    queue: Annotated[int, typer.Option(help="Requests that may wait for each worker.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 16,
    seconds: Seconds = 4.0,
    rounds: Rounds = 3,
    factors: Annotated[str, typer.Option(help="Multiples of the saturated rate; empty: none.")] = "2,5,10",
    as_json: JsonFlag = False,
) -> None:
    """Several workers beside one: requests a second, and what their gateways do with 2, 5 and 10 times as many."""
    from loadtest.bench.flood import flood_table
    from loadtest.bench.scaling import Size, measure
    from loadtest.peers.process import end_on_sigterm

    end_on_sigterm()
    multiples = tuple(float(number) for number in whole("--factors", factors))
    try:
        done = measure(Size(workers, gateways, rows, queue, tokens, profile, seconds, rounds, multiples))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    show(done.table(), [done.to_json()], as_json=as_json)
    if done.rows and not as_json:
        Console().print(flood_table(done.rows, f"{workers} workers, {gateways} gateways, {profile}"))
    raise typer.Exit(0 if done.is_kept else 1)


@app.command()
def decode(
    rows: BatchSizes = "1,8,32",
    new_tokens: Annotated[int, typer.Option(help="Tokens each row decodes.")] = 64,
    repeats: Annotated[int, typer.Option(help="Turns each side gets.")] = 5,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of both sides.")] = "float32",
    as_json: JsonFlag = False,
) -> None:
    """The embedded model's decode speed on this CPU beside transformers' generate at equal shape."""
    import torch

    from loadtest.bench.pocket import measure_decode

    done = [
        measure_decode(int(number), new_tokens, repeats, getattr(torch, dtype)) for number in rows.split(",")
    ]
    show(decode_table(done, dtype), done, as_json=as_json)


@app.command()
def pocket(
    scenes: Annotated[int, typer.Option(help="Held-out scenes; about 13 questions each.")] = 300,
    seed: Annotated[int | None, typer.Option(help="Another unseen seed.")] = None,
    small: Annotated[bool, typer.Option(help="Also small things, with many crops and with one.")] = False,
    talks: Annotated[
        int, typer.Option(help="Also conversations about so many pairs of scenes; some 50 questions each.")
    ] = 0,
    device: Annotated[str, typer.Option(help="The worker's.")] = "cpu",
    as_json: JsonFlag = False,
) -> None:
    """Accuracy of the embedded model on scenes it has never seen, through a real gateway and worker."""
    from loadtest.bench.pocket import measure_accuracy

    result = measure_accuracy(scenes, seed, small=small, num_talks=talks, device=device)
    show(accuracy_table(result), [result], as_json=as_json)


@app.command()
def stages(
    model: Annotated[
        str,
        typer.Option(
            help="What is served: pocket, or a folder of a model, with eyes for pictures. Empty: pocket, or a random model "
            "for long prompts."
        ),
    ] = "",
    streams: Annotated[int, typer.Option(help="Streams of text at once.")] = 4,
    askers: Annotated[
        int, typer.Option(help="Clients that ask about a new picture, or with a new prompt, each time.")
    ] = 4,
    prefill: Annotated[
        int, typer.Option(help="Tokens of long prompts, which are asked in place of pictures.")
    ] = 0,
    tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 64,
    seconds: Seconds = 8.0,
    rounds: Rounds = 3,
    threads: Annotated[
        int, typer.Option(help="Compute threads of each side, shared out where it is two.")
    ] = 2,
    as_json: JsonFlag = False,
) -> None:
    """One worker beside an encoder, or a prefill worker, and a decoder with the same threads in all, turn about."""
    from loadtest.bench.stages import StagesLoad, measure, stages_table

    load = StagesLoad(
        model, streams, askers, tokens, prefill, seconds=seconds, rounds=rounds, threads=threads
    )
    try:
        done = measure(load)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    show(stages_table(done, load), [row.to_json() for row in done], as_json=as_json)


@app.command()
def pictures(
    megapixels: Annotated[str, typer.Option(help="Sizes of JPEGs: some of 0.5, 2, 12.")] = "0.5,2,12",
    models: Annotated[
        str, typer.Option(help="Whose crops: some of moondream, pocket, smolvlm, qwen2.5-vl.")
    ] = "moondream,pocket,smolvlm,qwen2.5-vl",
    rounds: Annotated[int, typer.Option(help="Turns each way gets.")] = 7,
    processor: Annotated[
        bool, typer.Option(help="Also measure transformers' fast processors, where a model has one.")
    ] = True,
    processor_python_: Annotated[
        str,
        typer.Option("--processor-python", help="Python of their environment; empty: make one in the cache."),
    ] = "",
    as_json: JsonFlag = False,
) -> None:
    """Prepared pictures a second and core, from data URL to crops, beside decoding all pixels and transformers, turn about."""
    from loadtest.bench.picture_peer import PEERS, Processor, processor_python
    from loadtest.bench.pictures import measure, pictures_table
    from loadtest.gateway.environment import ReferenceError

    names = models.split(",")
    sizes = [float(size) for size in megapixels.split(",")]
    try:
        if processor and set(PEERS) & set(names):
            python = processor_python_ or str(processor_python(lambda line: typer.echo(line, err=True)))
            with Processor(python) as peer:
                done = measure(sizes, names, rounds, peer)
        else:
            done = measure(sizes, names, rounds)
    except (ValueError, ReferenceError) as error:
        raise typer.BadParameter(str(error)) from None
    show(pictures_table(done), [row.to_json() for row in done], as_json=as_json)


@app.command(name="first-picture")
def first_picture(
    shape: Annotated[
        str, typer.Option(help="Random weights: smolvlm-256m, or tiny for a smoke run.")
    ] = "smolvlm-256m",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of both sides.")] = "bfloat16",
    threads: Annotated[int, typer.Option(help="Compute threads of both sides.")] = 2,
    rounds: Rounds = 5,
    as_json: JsonFlag = False,
) -> None:
    """Time to first token of a question about a picture, beside transformers on the same weights, turn about."""
    import torch

    from loadtest.bench.first_picture import first_picture_table, measure

    try:
        done = measure(shape, getattr(torch, dtype), threads, rounds)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    show(first_picture_table(done), [done.to_json()], as_json=as_json)


def _structured(shares: str, profile: str, rows: int, seconds: float, *, as_json: bool) -> None:
    """Throughput as the share of constrained requests grows: automata on the device, and masks by the host."""
    from loadtest.bench.structured import measure

    done = measure([int(share) for share in shares.split(",")], profile, rows, seconds, rounds=2)
    show(structured_table(done, rows, profile), [share.to_json() for share in done], as_json=as_json)
