"""Owns llama.cpp as a peer: its C interface through llama-cpp-python, one decode call a step. Main thread of its process.

Sampling is the arg-max of the logits in place, cheaper than the library's own chain over the whole vocabulary.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import numpy as np

from loadtest.peers.side import Run, Spec, read_clocks, serve, timed_run

MAX_STEP_TOKENS = 2048  # as `degas_peer` has it


class LlamaCppSide:
    """One context with a sequence for each row."""

    def __init__(self, spec: Spec) -> None:
        library: Any = importlib.import_module("llama_cpp")
        self._library = library
        self.version = f"llama.cpp (llama-cpp-python {library.__version__})"
        if not spec.gguf:
            raise ValueError("llama.cpp needs a GGUF file")
        library.llama_backend_init()
        model_params = library.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = library.llama_model_load_from_file(spec.gguf.encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {spec.gguf}")
        params = library.llama_context_default_params()
        row_tokens = spec.prompt_tokens + spec.new_tokens
        params.n_seq_max = spec.max_rows
        params.n_ctx = spec.max_rows * (-(-row_tokens // 256) * 256)  # per sequence in multiples of 256
        params.n_batch = max(spec.max_rows * spec.prompt_tokens, 64)
        params.n_ubatch = min(params.n_batch, MAX_STEP_TOKENS)
        params.n_threads = params.n_threads_batch = spec.threads
        self._context = library.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self._vocab_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        self._batch = library.llama_batch_init(params.n_batch, 0, 1)

    def warm(self, prompts: list[list[int]], new_tokens: int) -> str:
        """Run once."""
        self.run(prompts, min(8, new_tokens))
        return ""

    def run(self, prompts: list[list[int]], new_tokens: int) -> Run:
        """Decode `new_tokens` for every prompt, greedily. Raises RuntimeError when llama.cpp does."""
        start = read_clocks()
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), False)
        self._batch.n_tokens = 0
        for row, prompt in enumerate(prompts):
            for position, token_id in enumerate(prompt):
                self._put(row, position, token_id, is_last=position == len(prompt) - 1)
        tokens: list[list[int]] = [[token_id] for token_id in self._decode(len(prompts))]
        first = read_clocks()
        for step in range(new_tokens - 1):
            self._batch.n_tokens = 0
            for row, prompt in enumerate(prompts):
                self._put(row, len(prompt) + step, tokens[row][-1], is_last=True)
            for row, token_id in enumerate(self._decode(len(prompts))):
                tokens[row].append(token_id)
        return timed_run(tokens, start, first, read_clocks())

    def _put(self, row: int, position: int, token_id: int, *, is_last: bool) -> None:
        batch, place = self._batch, self._batch.n_tokens
        batch.token[place] = token_id
        batch.pos[place] = position
        batch.n_seq_id[place] = 1
        batch.seq_id[place][0] = row
        batch.logits[place] = is_last
        batch.n_tokens += 1

    def _decode(self, rows: int) -> list[int]:
        """One forward over the batch; the greedy token of each row, in order."""
        code = self._library.llama_decode(self._context, self._batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        # The logits of the tokens that asked for them lie one after another, in the batch's order.
        found = ctypes.cast(self._library.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        logits = np.ctypeslib.as_array(found, (rows, self._vocab_size))
        return [int(token_id) for token_id in logits.argmax(axis=1)]


if __name__ == "__main__":
    serve(LlamaCppSide)
