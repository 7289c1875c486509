"""Owns `degas bench decode` and `degas bench pocket`: the embedded model's speed and its accuracy. Main thread.

Speed stands beside transformers' `generate` on a model of equal shape (Phi has Moondream's text block: parallel
residuals, one LayerNorm, half-rotary attention), turn about in the same process on one compute thread.
"""

from __future__ import annotations

import asyncio
import base64
import io
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import aiohttp
import msgspec
import torch

from loadtest.bench.decode import OURS, THEIRS, decode_figures
from loadtest.bench.processes import serving
from loadtest.peers.degas_peer import DegasSide
from loadtest.peers.transformers_peer import TransformersSide
from pocket.answerer import TorchAnswerer
from pocket.answers import Reply, Request
from pocket.evaluate import UNSEEN_SEED, Answerer, evaluate, evaluate_small

WEIGHTS = Path(str(files("worker") / "pocket" / "weights"))


def write_phi(folder: Path, text: dict[str, Any], dtype: torch.dtype) -> int:
    """A random Phi checkpoint of the text model's shape; returns its number of parameters."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    config = PhiConfig(
        hidden_size=text["dim"],
        intermediate_size=text["ff_dim"],
        num_hidden_layers=text["n_layers"],
        num_attention_heads=text["n_heads"],
        num_key_value_heads=text.get("n_kv_heads", text["n_heads"]),
        vocab_size=text["vocab_size"],
        max_position_embeddings=2048,
        partial_rotary_factor=0.5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = PhiForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())


def measure_decode(rows: int, new_tokens: int, repeats: int, dtype: torch.dtype) -> dict[str, Any]:
    """Decode rates at `rows` rows: medians, and the median of the neighbouring runs' ratios."""
    torch.set_num_threads(1)
    text = msgspec.json.decode((WEIGHTS / "config.json").read_bytes())["config"]["text"]
    generator = torch.Generator().manual_seed(1)

    def draw() -> list[list[int]]:
        ids: list[list[int]] = torch.randint(20, text["vocab_size"], (rows, 48), generator=generator).tolist()
        return ids

    with tempfile.TemporaryDirectory(prefix="degas-bench-") as name:
        num_parameters = write_phi(Path(name), text, dtype)
        theirs = TransformersSide(Path(name), dtype)
    ours = DegasSide(WEIGHTS, dtype, rows, 48 + new_tokens, 48, 2)
    ours.run(draw(), new_tokens)
    theirs.warm(draw(), new_tokens)
    rounds = [
        {OURS: ours.run(draw(), new_tokens), THEIRS: theirs.run(draw(), new_tokens)} for _ in range(repeats)
    ]
    return {
        "rows": rows,
        "dtype": str(dtype).removeprefix("torch."),
        "text_parameters": num_parameters,
        **decode_figures(rounds),
    }


class ServedModel:
    """The embedded model as clients meet it: Moondream's HTTP routes, many requests in flight."""

    def __init__(self, url: str, in_flight: int = 16) -> None:
        self._url = url
        self._in_flight = in_flight

    def answer_all(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies in order. Raises RuntimeError when a request is refused."""
        return asyncio.run(self._answer_all(requests))

    async def _answer_all(self, requests: Sequence[Request]) -> list[Reply]:
        urls: dict[int, str] = {}
        gate = asyncio.Semaphore(self._in_flight)
        async with aiohttp.ClientSession() as session:

            async def ask(request: Request) -> Reply:
                async with gate:
                    if id(request.image) not in urls:
                        buffer = io.BytesIO()
                        request.image.save(buffer, "PNG")
                        encoded = base64.b64encode(buffer.getvalue()).decode()
                        urls[id(request.image)] = f"data:image/png;base64,{encoded}"
                    return await self._ask(session, request, urls[id(request.image)])

            return list(await asyncio.gather(*map(ask, requests)))

    async def _ask(self, session: aiohttp.ClientSession, request: Request, image_url: str) -> Reply:
        field = {"query": "question", "caption": "length", "detect": "object", "point": "object"}[
            request.task
        ]
        body = {"image_url": image_url, field: request.text}
        async with session.post(f"{self._url}/v1/{request.task}", json=body) as response:
            answer = await response.json()
            if response.status != 200:
                raise RuntimeError(f"{request.task} {request.text!r}: {answer}")
        if request.task == "detect":
            return [(b["x_min"], b["y_min"], b["x_max"], b["y_max"]) for b in answer["objects"]]
        if request.task == "point":
            return [(p["x"], p["y"]) for p in answer["points"]]
        return str(answer["answer" if request.task == "query" else "caption"])


def measure_accuracy(
    num_scenes: int, seed: int | None, *, small: bool, flags: Sequence[str] = (), device: str = "cpu"
) -> dict[str, Any]:
    """Accuracy on held-out scenes through a real gateway and worker; `small` adds small things in big pictures,
    with many crops and (with the trainer's own forward) with the single global one. `flags`: more settings of the worker."""
    with serving(["--device", device, *flags]) as (url, _):
        served = cast(Answerer, ServedModel(url))  # only `answer_all` is called
        result = evaluate(served, num_scenes, UNSEEN_SEED if seed is None else seed)
        if small:
            result["small_many_crops"] = evaluate_small(served, num_scenes // 2)
    if small:
        result["small_one_crop"] = evaluate_small(TorchAnswerer(WEIGHTS, torch.float32, 1), num_scenes // 2)
    return result
