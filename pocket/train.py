"""Owns a training run of pocket: schedule, checkpoints, shipped weights; runs as `python -m pocket.train`.

One compute thread and one drawing process. Every batch, noise draw and rate follows from the seed, the step and
the length of the run, so a resumed run equals an uninterrupted one.
"""

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor

from pocket.batches import BatchPlan, Feed
from pocket.initial import Trainee, initialise
from pocket.network import Mlp, NetworkConfig, RegionConfig, TextConfig, VisionConfig
from pocket.objective import Weights, compute_losses
from pocket.optimizer import Optimizer
from pocket.tokenizer import TOKENIZER_CONFIG, VOCAB_SIZE, build_tokenizer

WEIGHTS_FOLDER = Path(__file__).parent.parent / "worker" / "pocket" / "weights"
POCKET = NetworkConfig(
    text=TextConfig(dim=192, ff_dim=768, n_layers=4, vocab_size=VOCAB_SIZE, max_context=512, n_heads=3, n_kv_heads=3),
    vision=VisionConfig(
        enc_dim=160, enc_n_layers=4, enc_ff_dim=640, enc_n_heads=5, proj_out_dim=192, crop_size=98, max_crops=6,
        overlap_margin=1, proj_inner_dim=384,
    ),
    region=RegionConfig(dim=192, coord_feat_dim=64, size_feat_dim=128, inner_dim=128),
    tokenizer=TOKENIZER_CONFIG,
)  # fmt: skip
ENCODER_SHARE = (
    0.25  # of the steps train the encoder alone: there is nothing to say about shapes not yet seen
)
_WARMUP_STEPS = 60
_DECAY_SHARE = 0.35
_EXACT_GELU_SHARE = 0.8  # of the steps take the quicker form; the last ones the released model's


def load_weights(path: Path, trainee: Trainee) -> None:
    """Set the network from shipped weights; the auxiliary heads, which are not shipped, stay as they are."""
    named = {name.removeprefix("model."): held for name, held in load_file(path).items()}
    trainee.network.load_state_dict({name: held.float() for name, held in named.items()})


def schedule(progress: float, step: int, peak: float, encoder_share: float) -> tuple[float, Weights]:
    """Learning rate and loss weights at a share of the run."""
    warm = min(1.0, (step + 1) / _WARMUP_STEPS)
    cool = min(1.0, (1.0 - progress) / _DECAY_SHARE)
    # Bins are blurred widely at first, so that a near miss still pulls the right way.
    blur = 3.0 * 10.0 ** max(0.0, 1.0 - progress / 0.6)
    weights = Weights(
        language=float(progress >= encoder_share),
        region=0.6 + 0.3 * min(1.0, progress / 0.6),
        auxiliary=0.8 if progress < 0.5 else max(0.2, 0.8 - 1.5 * (progress - 0.5)),
        blur_bins=blur,
    )
    return peak * warm * max(0.01, cool), weights


def save_weights(path: Path, state: dict[str, Tensor], prefix: str, dtype: torch.dtype) -> None:
    """Write the network's weights under their released names."""
    start = f"{prefix}.network."
    named = {
        f"model.{name.removeprefix(start)}": held.to(dtype).contiguous()
        for name, held in state.items()
        if name.startswith(start)
    }
    _write(path, lambda part: save_file(named, part))


def _write(path: Path, write: Any) -> None:
    part = path.with_suffix(".part")
    write(part)
    os.replace(part, path)


def save_checkpoint(folder: Path, optimizer: Optimizer, progress: dict[str, Any]) -> None:
    """Write everything a run needs to go on; the json names the tensors' file, so the pair changes at once."""
    tensors = folder / f"state-{progress['step']}.safetensors"
    save_file(optimizer.state, tensors)
    _write(
        folder / "progress.json",
        lambda part: part.write_text(json.dumps({**progress, "state": tensors.name})),
    )
    for old in folder.glob("state-*.safetensors"):
        if old != tensors:
            old.unlink()


def load_checkpoint(folder: Path, optimizer: Optimizer) -> dict[str, Any] | None:
    """Take up the run in a folder; its progress, or None where there is none."""
    path = folder / "progress.json"
    if not path.exists():
        return None
    progress: dict[str, Any] = json.loads(path.read_text())
    optimizer.restore(load_file(folder / progress["state"]))
    return progress


def prepare(folder: Path, config: NetworkConfig, seed: int) -> tuple[Path, Path]:
    """Write config.json and tokenizer.json into a folder unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    config_path, tokenizer_path = folder / "config.json", folder / "tokenizer.json"
    if not tokenizer_path.exists():
        build_tokenizer(seed).save(str(tokenizer_path))
    config_path.write_text(json.dumps(config.as_released("bfloat16"), indent=1) + "\n")
    return config_path, tokenizer_path


def run(
    folder: Path,
    out: Path | None = None,
    steps: int = 5000,
    seed: int = 1,
    minutes: float | None = None,
    peak: float = 3e-3,
    device: str = "cpu",
    encoder_share: float = ENCODER_SHARE,
    config: NetworkConfig = POCKET,
    plan: BatchPlan | None = None,
    save_every_s: float = 120.0,
    quiet: bool = False,
    log_every: int = 25,
    stop_after: int | None = None,
    start: Path | None = None,
    begin: float = 0.5,
) -> list[dict[str, float]]:
    """Train until `steps` and return what was logged; `minutes` or `stop_after` steps interrupt it, to be resumed.

    With `start`, a model.safetensors, the run is the rest of a longer one from its share `begin` on: no encoder phase, and
    the schedule from there. Give it a seed of its own, or it sees the first run's pictures again. Raises ValueError for a
    `begin` that is no share.
    """
    if not 0.0 <= begin < 1.0:
        raise ValueError(
            f"begin is {begin:g}; 0 to below 1 would work, such as 0.65, from where the rate only falls"
        )
    torch.set_num_threads(1)
    encoder_share = 0.0 if start else encoder_share
    plan = plan or BatchPlan(seed, encoder_batches=round(encoder_share * steps))
    if start is not None and not (folder / "tokenizer.json").exists():
        folder.mkdir(
            parents=True, exist_ok=True
        )  # the weights know only the tokenizer that they were trained with
        (folder / "tokenizer.json").write_text((start.parent / "tokenizer.json").read_text())
    config_path, tokenizer_path = prepare(folder, config, seed)
    trainee = Trainee(config)
    initialise(trainee, seed)
    if start is not None:
        load_weights(start, trainee)
    trainee.to(device, torch.bfloat16)
    optimizer = Optimizer(trainee)
    progress = load_checkpoint(folder, optimizer) or {"step": 0, "elapsed_s": 0.0}
    step, started = int(progress["step"]), time.monotonic()
    feed = Feed(step, plan, config_path, tokenizer_path)
    logged: list[dict[str, float]] = []
    recent: list[dict[str, Tensor]] = []
    last_save = started

    def elapsed_s() -> float:
        return float(progress["elapsed_s"]) + time.monotonic() - started

    def keep() -> None:
        save_checkpoint(
            folder, optimizer, {"step": step, "elapsed_s": elapsed_s(), "steps": steps, "seed": seed}
        )
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / "tokenizer.json").write_text(tokenizer_path.read_text())
            prepare(out, config, seed)
            which = "master" if step >= steps else "average"
            save_weights(out / "model.safetensors", optimizer.state, which, torch.bfloat16)

    columns = (
        TextColumn("pocket"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.description}"),
    )  # fmt: skip
    try:
        with Progress(*columns, disable=quiet) as bar, (folder / "log.jsonl").open("a") as log:
            task = bar.add_task("", total=steps, completed=step)
            last = steps if stop_after is None else min(steps, stop_after)
            while step < last and (minutes is None or time.monotonic() - started < minutes * 60):
                waiting = feed.num_ready == 0
                batch = {name: torch.from_numpy(held.copy()).to(device) for name, held in feed.take().items()}
                done = step / steps if start is None else begin + (1.0 - begin) * step / steps
                rate, weights = schedule(done, step, peak, encoder_share)
                Mlp.approximate = "none" if done < _EXACT_GELU_SHARE else "tanh"
                noise = torch.Generator().manual_seed(seed * 1_000_003 + step)
                loss, figures = compute_losses(trainee.network, trainee.heads, batch, weights, noise)
                loss.backward()
                optimizer.step(step, rate)
                step += 1
                recent.append({**figures, "starved": torch.tensor(float(waiting))})
                if len(recent) == log_every or step == last:
                    means = {n: float(torch.stack([r[n].float() for r in recent]).mean()) for n in recent[0]}
                    line = {"step": step, "elapsed_s": round(elapsed_s(), 1), "rate": rate, **means}
                    logged.append(line)
                    log.write(json.dumps({k: round(v, 5) for k, v in line.items()}) + "\n")
                    log.flush()
                    recent.clear()
                    told = f"language {means['language']:.3f} miss {means['miss']:.4f} cells {means['cell_right']:.3f}"
                    bar.update(task, description=told)
                bar.update(task, completed=step)
                if time.monotonic() - last_save > save_every_s:
                    keep()
                    last_save = time.monotonic()
        keep()
    finally:
        Mlp.approximate = "tanh"
        feed.close()
    return logged


def main(
    steps: Annotated[int, typer.Option(help="length of the whole run")] = 5000,
    minutes: Annotated[float | None, typer.Option(help="stop after this long; run again to go on")] = None,
    seed: Annotated[int, typer.Option(help="seed of weights, scenes and noise")] = 1,
    folder: Annotated[Path, typer.Option(help="checkpoints; a run found here is taken up")] = Path(".pocket"),
    out: Annotated[Path, typer.Option(help="where the finished weights go")] = WEIGHTS_FOLDER,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    peak: Annotated[float, typer.Option(help="highest learning rate")] = 3e-3,
    start: Annotated[Path | None, typer.Option(help="go on from these weights (model.safetensors)")] = None,
    begin: Annotated[
        float, typer.Option(help="with --start: share of the schedule that is taken to be done")
    ] = 0.5,
) -> None:
    """Train pocket from nothing, or go on where a run stopped, or from finished weights."""
    run(folder, out, steps, seed, minutes, peak, device, start=start, begin=begin)


if __name__ == "__main__":
    typer.run(main)
