"""Owns vLLM's CPU build as a peer: its offline engine, kept in this process. Main thread of its process."""

from __future__ import annotations

import os
from typing import Any

from loadtest.peers.side import Run, Spec, load_attribute, read_clocks, serve, timed_run


class VllmSide:
    """`LLM.generate` on token ids."""

    def __init__(self, spec: Spec) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that its CPU time is counted in this process
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the parent binds
        self.version = f"vllm {load_attribute('vllm', '__version__')}"
        self._sampling = load_attribute("vllm", "SamplingParams")
        self._engine: Any = load_attribute("vllm", "LLM")(
            model=spec.folder,
            dtype=spec.dtype,
            max_model_len=2048,
            max_num_seqs=spec.max_rows,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )

    def warm(self, prompts: list[list[int]], new_tokens: int) -> str:
        """Run once."""
        self.run(prompts, new_tokens)
        return ""

    def run(self, prompts: list[list[int]], new_tokens: int) -> Run:
        """Decode `new_tokens` for every prompt, greedily."""
        asked = self._sampling(
            temperature=0.0, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        start = read_clocks()
        found = self._engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False
        )
        return timed_run([list(one.outputs[0].token_ids) for one in found], start, None, read_clocks())


if __name__ == "__main__":
    serve(VllmSide)
