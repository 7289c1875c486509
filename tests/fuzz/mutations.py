"""Owns making odd inputs of sound ones: damaged bytes, and JSON with strange values in strange places. Pure, seeded.

Hypothesis draws what is put in (`donors`), a random number makes a hundred inputs of it: drawing each input from
Hypothesis is forty times as slow (docs/lab-notes.md).
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any, Final

Place = tuple[Any, Any]  # a container and the key of a value in it

ODD_VALUES: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1, 2**31, -(2**31) - 1, 2**63, -(2**63) - 1, 2**64, 10**400, 0.5, -0.0, 1e308, 5e-324,
    "", " ", "\0", "\ud800", "\U0010ffff", "é" * 300, "a" * 5000, "user", "assistant", "auto", "none", "json_schema",
    "data:,", "data:image/png;base64,AAAA", "http://example.invalid/x", "../../etc", "<|im_end|>", "{{ 1 }}", "{%", "(", "[a-",
    [], {}, [[]], [None], {"": None}, {"type": None}, {"$ref": "#"}, [{}] * 50, {"a": {"a": {"a": {}}}},
)  # fmt: skip
_LITERALS: Final = (
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"-0",
    b"0x1",
    b'"\\ud800"',
    b'"\\u0000"',
    b"01",
    b"1.",
    b"'x'",
)
_BYTES: Final = (0x00, 0x7F, 0x80, 0xC0, 0xC1, 0xFF, 0x22, 0x5C, 0x7B, 0x5B)
_DEEP: Final = 3000


def mutated_bytes(data: bytes, rng: random.Random, donors: list[bytes]) -> bytes:
    """A few bytes changed, inserted, removed, doubled, swapped with a donor's, or cut."""
    made = bytearray(data)
    for _ in range(1 + int(rng.expovariate(0.7))):
        at = rng.randrange(len(made) + 1)
        match rng.randrange(8):
            case 0 if made:
                made[min(at, len(made) - 1)] = rng.choice(_BYTES)
            case 1 if made:
                made[min(at, len(made) - 1)] ^= 1 << rng.randrange(8)
            case 2:
                made[at:at] = bytes(rng.choice(_BYTES) for _ in range(rng.randint(1, 8)))
            case 3:
                del made[at : at + rng.randint(1, 16)]
            case 4:
                made[at:at] = made[at : at + rng.randint(1, 64)]
            case 5:
                donor = rng.choice(donors) if donors else b""
                made[at : at + len(donor)] = donor
            case 6:
                del made[at:]
            case _:
                made[at : at + 4] = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1)).to_bytes(
                    4, rng.choice(("big", "little"))
                )
    return bytes(made)


def mutated_json(value: Any, rng: random.Random, donors: list[Any]) -> bytes:
    """A sound JSON value with some of it replaced, removed, doubled, renamed or nested; sometimes not quite JSON."""
    made = copy.deepcopy(value)
    for _ in range(1 + int(rng.expovariate(0.9))):
        made = _changed(made, rng, donors)
    data = json.dumps(made, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    chance = rng.random()
    if chance < 0.05:
        return _with_literal(data, rng)
    if chance < 0.1:
        return mutated_bytes(data, rng, [])
    if chance < 0.11:
        deep = rng.choice((b"[", b'{"a":'))
        return deep * rng.randint(1, _DEEP) + data
    if chance < 0.13:  # the same name twice
        return data.replace(b"{", b"{" + data[1 : data.find(b",") + 1], 1) if b"," in data else data
    return data


def _changed(value: Any, rng: random.Random, donors: list[Any]) -> Any:
    places = list(_places(value))
    if not places:
        return rng.choice(donors) if donors else rng.choice(ODD_VALUES)
    holder, key = rng.choice(places)
    match rng.randrange(8):
        case 0 | 1 | 2:
            holder[key] = copy.deepcopy(rng.choice(ODD_VALUES))
        case 3 if donors:
            holder[key] = copy.deepcopy(rng.choice(donors))
        case 4:
            if isinstance(holder, dict):
                del holder[key]
            else:
                holder.pop(key)
        case 5 if isinstance(holder, list):
            holder.extend(copy.deepcopy(holder[key]) for _ in range(rng.randint(1, 20)))
        case 5:
            holder[str(rng.choice(ODD_VALUES))[:40]] = holder.pop(key)
        case 6:
            other, its_key = rng.choice(places)
            holder[key] = copy.deepcopy(other[its_key])
        case _:
            holder[key] = [holder[key]] if rng.random() < 0.5 else {"type": holder[key]}
    return value


def _places(value: Any) -> Iterator[Place]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield value, key
        yield from _places(inner)


def _with_literal(data: bytes, rng: random.Random) -> bytes:
    """A value replaced by a word that JSON has no room for."""
    at = data.rfind(b":", 0, rng.randint(1, len(data)))
    end = min((place for place in (data.find(b",", at), data.find(b"}", at)) if place > 0), default=len(data))
    return data[: at + 1] + rng.choice(_LITERALS) + data[end:]
