"""Owns `degas bench …`: what can be measured on this machine, each as a command. Runs in the main thread."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import typer
from rich.console import Console

from loadtest.bench.gateway_cost import gateway
from loadtest.bench.quality_command import command as quality
from loadtest.bench.shown import (
    accuracy_table,
    decode_table,
    first_token_table,
    loop_table,
    structured_table,
)
from loadtest.tables import Figures, of_objects, show

if TYPE_CHECKING:
    from loadtest.peers.file_bench import FileComparison

app = typer.Typer(
    no_args_is_help=True, help="Measure parts of Degas; every figure in the docs has its command here."
)

app.command(name="quality")(quality)
app.command()(gateway)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print a JSON list of objects instead of a table.")]
TransformersPython = Annotated[
    str, typer.Option(help="Python of transformers' environment; empty leaves it out.")
]
VllmPython = Annotated[str, typer.Option(help="Python of an environment with vLLM's CPU build.")]
Profile = Annotated[str, typer.Option(help="Whose step times: rtx3090, a100, h100, h200, b200, small.")]
BatchSizes = Annotated[str, typer.Option(help="Batch sizes, comma separated.")]
Seconds = Annotated[float, typer.Option(help="Measured time of each run.")]
Rounds = Annotated[int, typer.Option(help="Turns that each of the compared gets.")]
RandomShape = Annotated[str, typer.Option(help="Random Llama: 30m, 0.5b, or tiny for a smoke run.")]
PromptTokens = Annotated[int, typer.Option(help="Tokens in.")]
ComputeThreads = Annotated[int, typer.Option(help="Compute threads of each engine or server.")]
Cores = Annotated[
    str, typer.Option(help="Cores the engines or servers may use, comma separated; empty: any.")
]
LlamaCppPython = Annotated[str, typer.Option(help="Python with llama-cpp-python[server] and gguf.")]


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
def engine(
    gguf: Annotated[
        Path | None, typer.Option(help="Instead: this file, as it is, in Degas and llama.cpp.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Instead: this folder of Hugging Face's layout.")] = None,
    shape: RandomShape = "30m",
    rows: BatchSizes = "1,8,32",
    prompt_tokens: PromptTokens = 32,
    new_tokens: Annotated[int, typer.Option(help="Tokens out.")] = 64,
    rounds: Rounds = 5,
    threads: Annotated[
        str, typer.Option(help="Compute threads of each engine; several with --gguf and --model.")
    ] = "1",
    cores: Cores = "",
    activations: Annotated[
        Literal["auto", "int8", "exact"],
        typer.Option(help="Degas, with --gguf: what activations are multiplied as (docs/operating.md)."),
    ] = "auto",
    transformers_python: TransformersPython = sys.executable,
    vllm_python: VllmPython = "",
    llama_cpp_python: LlamaCppPython = "",
    as_json: JsonFlag = False,
) -> None:
    """Degas's engine beside transformers, vLLM and llama.cpp: the same weights, a process each, turn about."""
    from loadtest.peers.catalog import Pythons, engine_peers
    from loadtest.peers.engine_bench import Workload, measure
    from loadtest.peers.file_bench import FileWorkload, measure_file
    from loadtest.peers.process import end_on_sigterm

    asked = whole("--rows", rows), prompt_tokens, new_tokens, rounds
    counts, on_cores = whole("--threads", threads), whole("--cores", cores)
    peers, left_out = engine_peers(Pythons(transformers_python, vllm_python, llama_cpp_python))
    end_on_sigterm()
    path = gguf or model
    try:
        if path is not None:
            if gguf is not None and model is not None:
                raise ValueError("give either --gguf or --model")
            load = FileWorkload(path, *asked, counts, on_cores, activations)
            one_file = measure_file(load, peers, left_out, say=_say)
            _print_file(one_file, as_json=as_json)
            return
        if len(counts) != 1:
            raise ValueError("--threads takes several numbers with --gguf and --model only")
        done = measure(Workload(shape, *asked, counts[0], on_cores), peers, left_out, say=_say)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _print_comparison(done, as_json=as_json)


@app.command()
def serve(
    shape: RandomShape = "30m",
    in_flight: Annotated[str, typer.Option(help="Requests at once, comma separated.")] = "1,16,64",
    prompt_tokens: PromptTokens = 32,
    new_tokens: Annotated[int, typer.Option(help="Tokens out.")] = 16,
    seconds: Annotated[float, typer.Option(help="New requests are sent for so long in each turn.")] = 8.0,
    grace: Annotated[float, typer.Option(help="Seconds the last requests of a turn have to end.")] = 20.0,
    rounds: Rounds = 3,
    threads: ComputeThreads = 1,
    cores: Cores = "",
    transformers_python: TransformersPython = sys.executable,
    vllm_python: VllmPython = "",
    llama_cpp_python: LlamaCppPython = "",
    llama_server: Annotated[str, typer.Option(help="llama.cpp's own llama-server, where built.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Degas over HTTP beside `transformers serve`, vLLM and llama.cpp: short streamed requests, turn about."""
    from loadtest.peers.catalog import Pythons
    from loadtest.peers.process import end_on_sigterm
    from loadtest.peers.serve_bench import Load, measure
    from loadtest.peers.servers import known_servers

    load = Load(
        shape,
        whole("--in-flight", in_flight),
        prompt_tokens,
        new_tokens,
        seconds,
        grace,
        rounds,
        threads,
        whole("--cores", cores),
    )
    pythons = Pythons(transformers_python, vllm_python, llama_cpp_python)
    servers, left_out = known_servers(pythons, llama_server)
    end_on_sigterm()
    try:
        done = measure(load, servers, left_out, say=_say)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _print_comparison(done, as_json=as_json)


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
        str, typer.Option(help="What is served: pocket, or a folder of a model with eyes.")
    ] = "pocket",
    streams: Annotated[int, typer.Option(help="Streams of text at once.")] = 4,
    askers: Annotated[int, typer.Option(help="Clients that ask about a new picture each time.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 64,
    seconds: Seconds = 8.0,
    rounds: Rounds = 3,
    threads: Annotated[
        int, typer.Option(help="Compute threads of each side, shared out where it is two.")
    ] = 2,
    as_json: JsonFlag = False,
) -> None:
    """One worker beside an encoder and a decoder with the same threads in all, under text and pictures, turn about."""
    from loadtest.bench.stages import StagesLoad, measure, stages_table

    load = StagesLoad(model, streams, askers, tokens, seconds=seconds, rounds=rounds, threads=threads)
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


class _Comparison(Protocol):
    left_out: list[str]

    def to_json(self) -> dict[str, Any]: ...
    def table(self) -> Figures: ...


def whole(option: str, given: str) -> tuple[int, ...]:
    """Whole numbers, comma separated. Raises typer.BadParameter naming the option."""
    try:
        return tuple(int(number) for number in given.split(",") if number.strip())
    except ValueError:
        raise typer.BadParameter(f"{given!r} is not whole numbers such as 1,8", param_hint=option) from None


def _say(line: str) -> None:
    """Print progress to stderr: stdout holds only the table or the JSON."""
    print(line, file=sys.stderr, flush=True)


def _print_file(done: FileComparison, *, as_json: bool) -> None:
    show(done.table(), done.figures(), as_json=as_json)
    for line in done.left_out if not as_json else ():
        Console().print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _print_comparison(done: _Comparison, *, as_json: bool) -> None:
    show(done.table(), [done.to_json()], as_json=as_json)
    for line in done.left_out if not as_json else ():
        Console().print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _structured(shares: str, profile: str, rows: int, seconds: float, *, as_json: bool) -> None:
    """Throughput as the share of constrained requests grows: automata on the device, and masks by the host."""
    from loadtest.bench.structured import measure

    done = measure([int(share) for share in shares.split(",")], profile, rows, seconds, rounds=2)
    show(structured_table(done, rows, profile), [share.to_json() for share in done], as_json=as_json)
