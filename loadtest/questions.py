"""Owns what the load test asks: short questions, turns, long texts, schemas. A planned request in, an `Ask` out."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any, Final

from loadtest.calls import OK, Call
from loadtest.pictures import Picture
from loadtest.scenarios import Planned, Scenario

_TEXT: Final = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother area "
    "money story fact month lot right study book eye job word business issue side kind head house service friend father "
    "power hour game line end member law car city name team minute idea body back parent face level office door health"
)
WORDS: Final = tuple(_TEXT.split())
"""Common words, of which most tokenizers make one token each; a trial request measures how many."""

_SHORT: Final = (
    "What is a {a}?",
    "Say something about the {a} and the {b}.",
    "Which is larger, a {a} or a {b}?",
    "Name three things that a {a} has.",
    "Write one sentence with the word {a}.",
)
_TURNS: Final = ("Tell me about the {a}.", "And the {b}?", "Why is that so?", "Say it in other words.")
_PICTURE_TURNS: Final = ("Are you sure?", "What else is there?", "Say it in other words.", "Where is it?")
_LONG_TASK: Final = "What is the first sentence of the text above?"
_SENTENCES: Final = (
    "The {a} is near the {b}.",
    "A {a} has a {b}.",
    "Every {a} needs a {b}.",
    "I saw the {a} and the {b}.",
    "The {a} of the {b} was good.",
)
"""A model ends at once behind thousands of loose words; behind sentences it answers."""
_LONGEST_DEFAULT: Final = 2000  # tokens of a long prompt when nothing is said
_SHARE_OF_CONTEXT: Final = 0.6

SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "kind": {"type": "string", "enum": ["person", "place", "thing"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "is_large": {"type": "boolean"},
    },
    "required": ["kind", "count", "is_large"],
    "additionalProperties": False,
}
"""What a structured answer must be: short and bounded, so that a model of any quality can end it."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What one request says, before it takes an interface's form."""

    messages: tuple[tuple[str, str], ...]  # (role, text), the last one the user's
    max_tokens: int
    picture: Picture | None = None  # shown with the first message
    schema: dict[str, Any] | None = field(default=None)


def make_ask(planned: Planned, scenario: Scenario, pictures: list[Picture]) -> Ask:
    """The first, and mostly the only, request of a planned one."""
    rng = random.Random(planned.question)
    picture = pictures[planned.picture] if scenario.target.takes_images else None
    text = picture.questions[planned.question % len(picture.questions)] if picture else _fill(_SHORT, rng)
    if planned.kind == "chat" and picture is None:
        text = _TURNS[0].format(a=rng.choice(WORDS))
    if planned.kind == "long":
        begin = f"{scenario.salt} " if scenario.salt else ""
        text = f"{begin}{long_text(num_words(scenario), rng)}\n\n{text if picture else _LONG_TASK}"
    schema = SCHEMA if planned.kind == "structured" else None
    max_tokens = max(planned.max_tokens, 64) if schema else planned.max_tokens
    return Ask((("user", text),), max_tokens, picture, schema)


def next_turn(ask: Ask, answer: str, turn: int) -> Ask:
    """The request after an answer: the whole conversation so far and one more question. `turn` counts from 1."""
    texts = _PICTURE_TURNS if ask.picture else _TURNS
    rng = random.Random(answer)
    text = texts[turn % len(texts)].format(a=rng.choice(WORDS), b=rng.choice(WORDS))
    # No client keeps control characters, and the simulated model takes some of them for orders.
    said = "".join(one for one in answer if one.isprintable() or one in "\n\t")
    messages = (*ask.messages, ("assistant", said or "…"), ("user", text))
    return Ask(messages, ask.max_tokens, ask.picture, ask.schema)


def long_prompt_tokens(scenario: Scenario) -> int:
    """How many tokens a long prompt should have."""
    if scenario.prompt_tokens:
        return scenario.prompt_tokens
    context = scenario.target.context_tokens
    return min(_LONGEST_DEFAULT, int(context * _SHARE_OF_CONTEXT)) if context else _LONGEST_DEFAULT


def num_words(scenario: Scenario) -> int:
    """How many of our words make a long prompt."""
    return max(1, round(long_prompt_tokens(scenario) / (scenario.target.tokens_per_word or 1.0)))


def long_text(words: int, rng: random.Random) -> str:
    """Random sentences of about so many words: two prompts share no beginning, so no cache helps."""
    found: list[str] = []
    while len(found) < words:
        found += _fill(_SENTENCES, rng).split()
    return " ".join(found[:words])


def check_answer(call: Call, schema: dict[str, Any]) -> None:
    """Turn a good end into an error unless the answer is what the schema says, as far as names and JSON go."""
    if call.code != OK:
        return
    try:
        value = json.loads(call.text)
        has_all = isinstance(value, dict) and set(schema["required"]) <= set(value)
    except ValueError:
        has_all = False
    if not has_all:
        call.code = "json_cut" if call.is_cut else "json_invalid"
        call.message = f"the answer is {call.text[:160]!r}"


def _fill(texts: tuple[str, ...], rng: random.Random) -> str:
    return rng.choice(texts).format(a=rng.choice(WORDS), b=rng.choice(WORDS))
