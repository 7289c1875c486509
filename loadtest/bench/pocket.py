"""Owns `degas bench decode` and `degas bench pocket`: the embedded model's speed and its accuracy. Main thread.

Speed stands beside transformers' `generate` on a model of equal shape (Phi has Moondream's text block: parallel
residuals, one LayerNorm, half-rotary attention), turn about in the same process on one compute thread.
"""

from __future__ import annotations

import asyncio
import base64
import io
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, cast

import aiohttp
import msgspec
import torch
from PIL import Image

from loadtest.bench.decode import OURS, THEIRS, decode_figures
from loadtest.bench.processes import serving
from loadtest.peers.degas_peer import DegasSide
from loadtest.peers.transformers_peer import TransformersSide
from pocket.answerer import TorchAnswerer
from pocket.answers import Conversation, Reply, Request
from pocket.evaluate import UNSEEN_SEED, Answerer, evaluate, evaluate_small
from pocket.examine_talk import examine_talk
from pocket.network import NetworkConfig

WEIGHTS = Path(str(files("worker") / "pocket" / "weights"))
_Put = TypeVar("_Put")
_Said = TypeVar("_Said")


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
    """The embedded model as clients meet it: Moondream's HTTP routes and chat, many requests in flight."""

    def __init__(self, url: str, in_flight: int = 16) -> None:
        self._url = url
        self._in_flight = in_flight
        self._urls: dict[int, str] = {}

    def answer_all(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies in order. Raises RuntimeError when a request is refused."""
        return asyncio.run(self._all(self._ask, requests))

    def converse_all(self, conversations: Sequence[Conversation]) -> list[str]:
        """What is said to the last question of each. Raises RuntimeError when a request is refused."""
        return asyncio.run(self._all(self._converse, conversations))

    async def _all(
        self, ask: Callable[[aiohttp.ClientSession, _Put], Awaitable[_Said]], every: Sequence[_Put]
    ) -> list[_Said]:
        gate = asyncio.Semaphore(self._in_flight)
        self._urls.clear()  # of pictures known by their identity, which may be another's once they are gone
        async with aiohttp.ClientSession() as session:

            async def one(put: _Put) -> _Said:
                async with gate:
                    return await ask(session, put)

            return list(await asyncio.gather(*map(one, every)))

    async def _ask(self, session: aiohttp.ClientSession, request: Request) -> Reply:
        field = {"query": "question", "caption": "length", "detect": "object", "point": "object"}[
            request.task
        ]
        body = {"image_url": self._data_url(request.image), field: request.text}
        answer = await self._post(session, request.task, body)
        if request.task == "detect":
            return [(b["x_min"], b["y_min"], b["x_max"], b["y_max"]) for b in answer["objects"]]
        if request.task == "point":
            return [(p["x"], p["y"]) for p in answer["points"]]
        return str(answer["answer" if request.task == "query" else "caption"])

    async def _converse(self, session: aiohttp.ClientSession, turns: Conversation) -> str:
        messages: list[dict[str, Any]] = []
        for turn in turns:
            shown = [
                {"type": "image_url", "image_url": {"url": self._data_url(image)}} for image in turn.images
            ]
            messages.append({"role": "user", "content": [*shown, {"type": "text", "text": turn.text}]})
            if turn.answer:
                messages.append({"role": "assistant", "content": turn.answer})
        answer = await self._post(session, "chat/completions", {"messages": messages, "temperature": 0})
        return str(answer["choices"][0]["message"]["content"])

    async def _post(self, session: aiohttp.ClientSession, route: str, body: dict[str, Any]) -> dict[str, Any]:
        async with session.post(f"{self._url}/v1/{route}", json=body) as response:
            answer: dict[str, Any] = await response.json()
            if response.status != 200:
                raise RuntimeError(f"{route}: {answer}")
        return answer

    def _data_url(self, image: Image.Image) -> str:
        if id(image) not in self._urls:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            self._urls[id(image)] = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        return self._urls[id(image)]


def measure_accuracy(
    num_scenes: int,
    seed: int | None,
    *,
    small: bool,
    num_talks: int = 0,
    flags: Sequence[str] = (),
    device: str = "cpu",
) -> dict[str, Any]:
    """Accuracy on held-out scenes through a real gateway and worker; `small` adds small things in big pictures,
    with many crops and (with the trainer's own forward) with the single global one; `num_talks` pairs of scenes are
    asked about in conversations. `flags`: more settings of the worker."""
    with serving(["--device", device, *flags]) as (url, _):
        talks = ServedModel(url)
        served = cast(Answerer, talks)  # only `answer_all` is called
        result = evaluate(served, num_scenes, UNSEEN_SEED if seed is None else seed)
        if small:
            result["small_many_crops"] = evaluate_small(served, num_scenes // 2)
        if num_talks:
            vision = NetworkConfig.read(WEIGHTS / "config.json").vision
            result["talk"] = examine_talk(talks, num_talks, vision)
    if small:
        result["small_one_crop"] = evaluate_small(TorchAnswerer(WEIGHTS, torch.float32, 1), num_scenes // 2)
    return result
