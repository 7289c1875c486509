"""Owns the comparison on a GPU with transformers' continuous batching: same weights, same prompts, same run. Main thread.

`python -m loadtest.gpu.peer --shape qwen3-0.6b --rows 1,32 --out FOLDER`; docs/gpu.md says how the rates are taken.
A transformers that has no continuous batching, or cannot run it here, is printed and is no failure.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from loadtest.gpu.decode import PREFILL_TOKENS, WARM_STEPS, make_runner, run_rows
from loadtest.gpu.devices import measure_bandwidth, open_device
from loadtest.gpu.random_models import random_model
from worker.device.contract import Device


def run_degas(
    device: Device, shape: str, rows: list[int], context: int, steps: int, folder: Path
) -> dict[int, float]:
    """Tokens a second by row count; the weights are left in `folder` as a checkpoint."""
    dtype = torch.bfloat16 if device.torch_device.type == "cuda" else torch.float32
    bytes_per_s = measure_bandwidth(device.torch_device, 64 << 20)
    made = random_model(shape, device.torch_device, dtype, folder=folder)
    spare = -(-max(rows) * context // (PREFILL_TOKENS - max(rows))) + WARM_STEPS + 3
    runner, _ = make_runner(made, device, rows, 2, context + steps + spare)
    found: dict[int, float] = {}
    for count in rows:
        figures = run_rows(
            runner,
            made,
            count,
            2,
            context=context,
            steps=steps,
            bytes_per_s=bytes_per_s,
            sampled=False,
            shape=shape,
            path="fused",
        )
        found[count] = count / figures.step_ms * 1e3
    return found


class ContinuousBatching:
    """transformers' own, through `generate_batch`. Raises RuntimeError when there is none or it fails."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import transformers

        self.version = str(transformers.__version__)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        load: Any = transformers.AutoModelForCausalLM
        self._model: Any = (
            load.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device).eval()
        )
        if not hasattr(self._model, "generate_batch"):
            raise RuntimeError(f"transformers {self.version} has no generate_batch")
        self._takes = inspect.signature(self._model.generate_batch).parameters
        self._settings: Any = transformers.GenerationConfig
        config: Any = getattr(transformers, "ContinuousBatchingConfig", None)
        # On a GPU transformers chooses its cache size; on a CPU it would take all memory.
        self._config = config(num_blocks=8, max_batch_tokens=64) if config and device.type == "cpu" else None
        if config is None and device.type == "cpu":
            raise RuntimeError("a smoke run needs ContinuousBatchingConfig, to bound its memory")

    def run(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Tokens a second of all rows together."""
        settings = self._settings(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        wanted: dict[str, Any] = {
            "record_timestamps": True,
            "progress_bar": False,
            "max_new_tokens": new_tokens,
        }
        given = {name: value for name, value in wanted.items() if name in self._takes}
        if self._config is not None:
            given["continuous_batching_config"] = self._config
        started_s = time.perf_counter()
        results = list(self._model.generate_batch(prompts, generation_config=settings, **given).values())
        total_s = time.perf_counter() - started_s
        errors = [result.error for result in results if getattr(result, "error", None)]
        if errors or len(results) < len(prompts):
            raise RuntimeError(
                f"{len(results)} of {len(prompts)} requests ended, {len(errors)} in errors: {errors[:1]}"
            )
        stamps = [getattr(result, "timestamps", None) or [] for result in results]
        if all(len(row) > 1 for row in stamps):
            from_s = max(row[0] for row in stamps)
            to_s = min(row[-1] for row in stamps)  # from here on fewer rows decode
            counted = sum(sum(from_s < at <= to_s for at in row) for row in stamps)
            if counted > len(prompts) and to_s > from_s:
                return float(counted / (to_s - from_s))
        print("  no timestamps: the rate holds prefill and start-up too")
        return float(sum(len(result.generated_tokens) for result in results) / total_s)


def main(
    shape: Annotated[str, typer.Option(help="Shape of the random model.")] = "qwen3-0.6b",
    rows: Annotated[str, typer.Option(help="Batch sizes, comma separated.")] = "1,32",
    context: Annotated[int, typer.Option(help="Tokens of context a row.")] = 850,
    steps: Annotated[int, typer.Option(help="Steps measured.")] = 120,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("gpu-results"),
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny shape on the CPU.")] = False,
) -> None:
    """Measure both, print the ratios, write `peer.json`."""
    out.mkdir(parents=True, exist_ok=True)
    device = open_device(smoke=smoke)
    if smoke:
        shape, rows, context, steps = "tiny-qwen3", "2", 20, 3
    counts = [int(number) for number in rows.split(",")]
    record: dict[str, Any] = {"shape": shape, "context": context, "steps": steps}
    with tempfile.TemporaryDirectory(prefix="degas-peer-") as name:
        with torch.inference_mode():
            degas = run_degas(device, shape, counts, context, steps, Path(name))
        record["degas_tokens_per_s"] = degas
        print("Degas tokens/s:", {count: round(rate) for count, rate in degas.items()}, flush=True)
        gc.collect()
        if device.torch_device.type == "cuda":
            torch.cuda.empty_cache()
        theirs: dict[int, float] = {}
        try:
            peer = ContinuousBatching(Path(name), device.torch_device)
            record["transformers"] = peer.version
            generator = torch.Generator().manual_seed(1)
            for count in counts:
                prompts = torch.randint(8, 290, (count, context), generator=generator).tolist()
                peer.run(prompts, min(8, steps))  # the first run compiles and captures
                theirs[count] = peer.run(prompts, steps)
                print(
                    f"{shape}, {count} rows: Degas {degas[count]:.0f} tokens/s, transformers {peer.version} "
                    f"{theirs[count]:.0f}, ratio {degas[count] / theirs[count]:.2f}",
                    flush=True,
                )
        except Exception as error:  # another version's API, a missing package: the rest of the run goes on
            record["unavailable"] = f"{type(error).__name__}: {str(error)[:500]}"
            print(f"transformers' continuous batching does not run here: {record['unavailable']}")
        record["transformers_tokens_per_s"] = theirs
    (out / "peer.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    typer.run(main)
