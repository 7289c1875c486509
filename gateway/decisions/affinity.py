"""Owns where a request finds its pictures' features and its prompt's pages again, among several workers. Pure; gateway's loop.

Rendezvous hashing (Thaler and Ravishankar, 1998): every gateway ranks the workers alike for the same content without
knowing of the others, and a worker that comes or goes moves its own content only. Loads are bounded as in consistent hashing
with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018): a worker that is busier than the mean by a factor is passed over.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

HEAD_TOKENS: Final = (
    256  # of a prompt, which say where it belongs: a system prompt, a conversation's beginning
)
HEAD_STEP: Final = 64  # shorter prompts belong nowhere: computing them again costs less than a queue
BUSY_FACTOR: Final = 1.25
SPARE_ROWS: Final = 0.25  # share of its rows up to which no worker counts as busy


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that could take the request: a name that all gateways know it by, its requests, its rows."""

    name: str
    num_active: int
    max_rows: int


def content_key(tenant: str, digests: Sequence[bytes], prompt_ids: Sequence[int]) -> bytes | None:
    """What a request shares with those it should meet on the same worker; None where that does not matter.

    Caches are kept apart by tenant, so the key is as well. `digests` are the pictures'.
    """
    if digests:
        return hashlib.blake2b(b"\0".join((tenant.encode(), *digests)), digest_size=16).digest()
    num_head = min(len(prompt_ids), HEAD_TOKENS) // HEAD_STEP * HEAD_STEP
    if not num_head:
        return None
    head = array("q", prompt_ids[:num_head]).tobytes()
    return hashlib.blake2b(tenant.encode() + b"\0" + head, digest_size=16).digest()


def home(key: bytes, candidates: Sequence[Candidate]) -> int | None:
    """The place of the worker to prefer; None if those that come first for this content are all busy."""
    mean = (sum(candidate.num_active for candidate in candidates) + 1) / len(candidates)
    best: tuple[bytes, int] | None = None
    for place, candidate in enumerate(candidates):
        if candidate.num_active + 1 > max(BUSY_FACTOR * mean, SPARE_ROWS * candidate.max_rows, 1):
            continue
        rank = hashlib.blake2b(candidate.name.encode(), key=key, digest_size=8).digest(), place
        if best is None or rank > best:
            best = rank
    return None if best is None else best[1]
