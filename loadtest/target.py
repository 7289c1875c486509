"""Owns what is asked of the target before anything is measured: readiness, model, what it takes, its prices. One task."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, replace
from typing import Any, Final

import aiohttp

from loadtest.bodies import build_body
from loadtest.pictures import draw_picture
from loadtest.questions import Ask, long_prompt_tokens, long_text
from loadtest.scenarios import Planned, Scenario, ScenarioError, Target
from loadtest.sse import key_headers
from loadtest.surfaces import read_refusal

_READY_POLL_S: Final = 0.1
_TRIAL_WORDS: Final = 60
_ANSWER_S: Final = 30.0
_MAX_METRICS_BYTES: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class Meter:
    """Readings of a target's metrics; None: it does not say."""

    joules: float | None = None
    in_flight: float | None = None  # requests under way
    price_per_hour: float | None = None  # of all its devices together


def client_session(scenario: Scenario) -> aiohttp.ClientSession:
    """A session for the few requests that are not measured."""
    timeout = aiohttp.ClientTimeout(total=_ANSWER_S, sock_connect=5.0)
    return aiohttp.ClientSession(timeout=timeout, headers=key_headers(scenario.api_key))


async def wait_until_ready(scenario: Scenario, session: aiohttp.ClientSession) -> None:
    """Ask until the server says that it is ready. Raises `ScenarioError` after `ready_s`: figures of a server that
    is still starting would be figures of nothing."""
    url = scenario.base_url + "/readyz"
    deadline_s = time.monotonic() + scenario.ready_s
    while True:
        try:
            async with session.get(url) as response:
                if response.status in (200, 401, 403, 404):  # a server without that page is taken as ready
                    return
                found = f"status {response.status}"
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            found = type(error).__name__
        if time.monotonic() >= deadline_s:
            raise ScenarioError(
                f"{url} was not ready within {scenario.ready_s:g} s (last answer: {found}); nothing was measured. "
                "Raise --ready-s if the server needs longer to start"
            )
        await asyncio.sleep(_READY_POLL_S)


async def fit(scenario: Scenario, *, takes_images: bool | None = None) -> Scenario:
    """The scenario with a model that the target has and with questions that it takes.

    `takes_images` overrides what the target says; other servers than Degas say nothing and get texts. Raises
    `ScenarioError` when the target does not answer, has no such model, or the model has none of the asked interfaces.
    """
    scenario.check()
    async with client_session(scenario) as session:
        if scenario.warmup_requests:
            await wait_until_ready(scenario, session)
        listed = await _models(scenario, session)
        name, entry = await _choose(scenario, session, listed)
        target = _read(entry) if "capabilities" in entry else _foreign(entry)
        if takes_images is not None:
            target = replace(target, takes_images=takes_images)
        elif target.takes_images and "chat" in target.surfaces:
            # A model may take pictures at some doors only, such as detection.
            takes = await _takes_pictures(replace(scenario, model=name), session)
            target = replace(target, takes_images=takes)
        fitted = replace(scenario, model=name, target=target)
        if not fitted.surfaces:
            found = ", ".join(target.surfaces) or "nothing that streams text"
            raise ScenarioError(
                f"--transport {scenario.transport}: {name} answers {found} only; try --transport sse"
            )
        if fitted.kind == "chat" and not {"chat", "responses"} & set(target.surfaces):
            raise ScenarioError(
                f"chat: {name} has no chat template; `degas loadtest short` asks it for completions"
            )
        if fitted.kind in ("long", "mixed"):
            target = replace(target, tokens_per_word=await _tokens_per_word(fitted, session))
            fitted = replace(fitted, target=target)
            _check_long(fitted)
        meter = await read_meter(fitted, session)
        return replace(fitted, target=replace(fitted.target, price_per_hour=meter.price_per_hour or 0.0))


async def read_meter(scenario: Scenario, session: aiohttp.ClientSession) -> Meter:
    """What the target's metrics say of cost, energy and requests under way; empty where they are not to be read."""
    try:
        async with session.get(scenario.base_url + "/metrics") as response:
            if response.status != 200:
                return Meter()
            data = await response.content.read(_MAX_METRICS_BYTES)
    except (aiohttp.ClientError, OSError, TimeoutError):
        return Meter()
    return Meter(
        joules=_sum_of(data, b"degas_worker_energy_joules_total"),
        in_flight=_sum_of(data, b"degas_requests_in_flight"),
        price_per_hour=_sum_of(data, b"degas_worker_price_per_hour"),
    )


def _sum_of(data: bytes, name: bytes) -> float | None:
    """The sum of a metric's samples; None where it has none. Only for names without labels that hold spaces."""
    values: list[float] = []
    for line in data.split(b"\n"):
        if line.startswith((name + b"{", name + b" ")):
            try:
                values.append(float(line.rsplit(b" ", 1)[1]))
            except ValueError:
                continue
    return sum(values) if values else None


async def _models(scenario: Scenario, session: aiohttp.ClientSession) -> list[dict[str, Any]]:
    url = scenario.base_url + "/v1/models"
    try:
        async with session.get(url) as response:
            if response.status in (401, 403):
                code, said = read_refusal(await response.read(), response.status)
                raise ScenarioError(f"{url}: {said or code}; give the key with --api-key-env NAME")
            if response.status != 200:
                return []
            body = await response.json(content_type=None)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise ScenarioError(
            f"{url} does not answer ({error or type(error).__name__}); is the server up?"
        ) from None
    except ScenarioError:  # a ValueError as well
        raise
    except ValueError:
        return []
    data = body.get("data") if isinstance(body, dict) else None
    return [one for one in data or [] if isinstance(one, dict) and isinstance(one.get("id"), str)]


async def _choose(
    scenario: Scenario, session: aiohttp.ClientSession, listed: list[dict[str, Any]]
) -> tuple[str, dict[str, Any]]:
    """The model to name in requests, and what the server says of it."""
    wanted = scenario.model
    if wanted is None:
        if not listed:
            raise ScenarioError(
                f"{scenario.base_url}/v1/models lists no model: give --model, or --warmup to wait until one is served"
            )
        return listed[0]["id"], listed[0]
    for one in listed:
        if one["id"] == wanted:
            return wanted, one
    try:
        async with session.get(
            f"{scenario.base_url}/v1/models/{wanted}"
        ) as response:  # another name for one of them
            if response.status == 200 and isinstance(found := await response.json(content_type=None), dict):
                return wanted, found
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
        pass
    if listed:
        names = ", ".join(one["id"] for one in listed[:8])
        raise ScenarioError(f"--model {wanted} is not served there; there are: {names}")
    return wanted, {}


def _read(entry: dict[str, Any]) -> Target:
    """What Degas says of a model."""
    capabilities = set(entry.get("capabilities") or ())
    takes_images = bool(entry.get("takes_images"))
    surfaces: list[str] = []
    if takes_images and "query" in capabilities:
        surfaces.append("query")
    if "chat" in capabilities:
        surfaces += ["chat", "responses"]
    elif "completions" in capabilities:
        surfaces.append("completions")
    context = entry.get("context_tokens")
    return Target(
        family=str(entry.get("family") or ""),
        takes_images=takes_images,
        surfaces=tuple(surfaces),
        context_tokens=context if isinstance(context, int) else 0,
    )


def _foreign(entry: dict[str, Any]) -> Target:
    """Another server of OpenAI's interface: chat over SSE, texts only. vLLM and others say the context."""
    context = next(
        (entry[name] for name in ("max_model_len", "context_length") if isinstance(entry.get(name), int)), 0
    )
    return Target(is_degas=False, takes_images=False, surfaces=("chat",), context_tokens=context)


async def _takes_pictures(scenario: Scenario, session: aiohttp.ClientSession) -> bool:
    """Whether a question about a picture is accepted in a chat; a refusal for other reasons shows in the run itself."""
    picture = draw_picture(scenario.seed)
    planned = Planned(0, 0.0, "chat", 0, 0, 1)
    body = build_body(planned, Ask((("user", picture.questions[0]),), 1, picture), scenario.model)
    headers = {"Content-Type": "application/json"}
    url = scenario.base_url + "/v1/chat/completions"
    try:
        async with session.post(url, data=body, headers=headers) as response:
            refused = response.status in (400, 415, 422, 501)
            return not (refused and read_refusal(await response.read(), response.status)[0] == "unsupported")
    except (aiohttp.ClientError, OSError, TimeoutError):
        return True


async def _tokens_per_word(scenario: Scenario, session: aiohttp.ClientSession) -> float:
    """How many tokens a word of ours has, by the usage of two answers whose prompts differ by so many words."""
    few, many = [
        await _prompt_tokens(scenario, session, long_text(words, random.Random(words)))
        for words in (2, _TRIAL_WORDS)
    ]
    if few is None or many is None or many <= few:
        return 1.3  # English, with most tokenizers
    return (many - few) / (_TRIAL_WORDS - 2)


async def _prompt_tokens(scenario: Scenario, session: aiohttp.ClientSession, text: str) -> int | None:
    surface = "chat" if "chat" in scenario.target.surfaces else "completions"
    body: dict[str, Any] = {"model": scenario.model, "max_tokens": 1}
    path = "/v1/completions"
    if surface == "chat":
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": text}]
    else:
        body["prompt"] = text
    try:
        async with session.post(scenario.base_url + path, json=body) as response:
            if response.status == 200:
                usage = (await response.json(content_type=None)).get("usage")
                found = usage.get("prompt_tokens") if isinstance(usage, dict) else None
                return found if isinstance(found, int) else None
            said = read_refusal(await response.read(), response.status)
            if response.status in (429, 503):
                return None
            raise ScenarioError(f"a trial request was refused: {said[0]}: {said[1]}")
    except ScenarioError:  # a ValueError as well
        raise
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, AttributeError):
        return None


def _check_long(scenario: Scenario) -> None:
    context, asked = scenario.target.context_tokens, long_prompt_tokens(scenario)
    if context and asked + scenario.max_tokens > context:
        raise ScenarioError(
            f"--prompt-tokens {asked} and --max-tokens {scenario.max_tokens} exceed the context of "
            f"{scenario.model}, {context}; a safe value is {max(1, int(context * 0.6) - scenario.max_tokens)}"
        )
