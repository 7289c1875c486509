"""Owns transformers as a peer: `generate` on a static batch, or its continuous batching. Main thread of its process.

`--continuous` chooses the second. Imports torch and transformers only: it may run in another environment.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from loadtest.peers.side import Run, Spec, Stamp, read_clocks, serve, timed_run

RESULT_TIMEOUT_S = 60.0


class TransformersSide:
    """transformers' `generate`: batched, greedy, with the cache that is the quicker here."""

    version = f"transformers {transformers.__version__}"

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        # What a GGUF file holds is expanded.
        place = (folder.parent, {"gguf_file": folder.name}) if folder.is_file() else (folder, {})
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            place[0], dtype=dtype, **place[1]
        ).eval()
        self._model.generation_config.eos_token_id = (
            None  # cheaper than forbidding the end by `min_new_tokens`
        )
        self.cache = "dynamic"

    def warm(self, prompts: list[list[int]], new_tokens: int) -> str:
        """Try both caches, each twice (the first run warms up), and keep the quicker."""
        rates = {}
        for cache in ("dynamic", "static"):
            self.cache = cache
            self.run(prompts, min(8, new_tokens))
            rates[cache] = self.run(prompts, new_tokens).tokens_per_cpu_s
        self.cache = max(rates, key=lambda cache: rates[cache])
        return f"{self.cache} cache"

    def run(self, prompts: list[list[int]], new_tokens: int) -> Run:
        """Decode `new_tokens` for every prompt, greedily. Prompts are equally long."""
        stamps: list[Stamp] = []

        def stamp(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            """A stopping criterion that never stops: called after each step."""
            stamps.append(read_clocks())
            return torch.zeros(ids.shape[0], dtype=torch.bool)

        start = read_clocks()
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,
                use_cache=True,
                cache_implementation=None if self.cache == "dynamic" else self.cache,
                disable_compile=True,
                stopping_criteria=[stamp],
            )
        tokens = out[:, ids.shape[1] :].tolist()
        return timed_run(tokens, start, stamps[0], stamps[-1])


class ContinuousSide:
    """transformers' continuous batching: one manager for all runs, requests added together."""

    version = f"transformers {transformers.__version__} continuous batching"

    def __init__(self, folder: Path, dtype: torch.dtype, max_rows: int, row_tokens: int) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        # What a GGUF file holds is expanded.
        place = (folder.parent, {"gguf_file": folder.name}) if folder.is_file() else (folder, {})
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            place[0], dtype=dtype, **place[1]
        ).eval()
        # Sized for the workload, because by default it takes most of the memory on a CPU.
        page_tokens = 32
        pages = max_rows * (-(-row_tokens // page_tokens) + 1)
        self._manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=row_tokens, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=page_tokens,
                num_blocks=pages,
                max_batch_tokens=max_rows * row_tokens,
                allow_block_sharing=False,
            ),
        )
        self._manager.start()

    def warm(self, prompts: list[list[int]], new_tokens: int) -> str:
        """Run once."""
        self.run(prompts, new_tokens)
        return ""

    def run(self, prompts: list[list[int]], new_tokens: int) -> Run:
        """Decode `new_tokens` for every prompt, greedily. Raises RuntimeError when a request fails."""
        start = read_clocks()
        ids = self._manager.add_requests(inputs=prompts, max_new_tokens=new_tokens)
        done: dict[str, list[int]] = {}
        while len(done) < len(prompts):
            result = self._manager.get_result(timeout=RESULT_TIMEOUT_S)
            if result is None:
                raise RuntimeError("continuous batching returned nothing")
            if result.error is not None:
                raise RuntimeError(f"continuous batching failed a request: {result.error}")
            if result.is_finished():
                done[result.request_id] = list(result.generated_tokens)
        return timed_run([done[name] for name in ids], start, None, read_clocks())


def make(spec: Spec) -> TransformersSide | ContinuousSide:
    """The engine that the command line names: `ContinuousSide` or `TransformersSide`."""
    torch.set_num_threads(spec.threads)
    transformers.utils.logging.disable_progress_bar()
    folder, dtype = Path(spec.folder), getattr(torch, spec.dtype)
    if "--continuous" in sys.argv:
        return ContinuousSide(folder, dtype, spec.max_rows, spec.prompt_tokens + spec.new_tokens)
    return TransformersSide(folder, dtype)


if __name__ == "__main__":
    serve(make)
