"""Owns log-probabilities of prompts as interfaces tell them: what may be asked for, and vLLM's form of it. Gateway's loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final

from msgspec import Meta

from gateway.api.answers import Spelling, finite
from gateway.api.parameters import MAX_TOP_LOGPROBS, Json, invalid
from gateway.api.prompts import Prompt
from gateway.generation import PromptScore, RequestError, TokenTexts
from shared.errors import ErrorCode

MAX_ENTRIES: Final = 32_768
"""Log-probabilities in one answer, over all its prompts: they are spelt out on the loop, at some 2 µs each."""

NumScores = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]


def check_scores(prompts: Sequence[Prompt], num_top: int, count: int, param: str) -> None:
    """`num_top` log-probabilities beside its own are wanted for each token of these prompts. Raises `RequestError`."""
    if any(prompt.images for prompt in prompts):
        message = (
            f"{param}: log-probabilities of a prompt with pictures are not computed; leave one of them out"
        )
        raise RequestError(ErrorCode.UNSUPPORTED, message, param=param)
    num_tokens = sum(len(prompt.ids) for prompt in prompts) * count
    if num_tokens * (num_top + 1) > MAX_ENTRIES:
        most = MAX_ENTRIES // max(1, num_tokens) - 1
        if most < 0:
            raise invalid(f"{num_tokens} prompt tokens; at most {MAX_ENTRIES} can be scored at once", param)
        message = f"{num_tokens} prompt tokens have {MAX_ENTRIES} log-probabilities at most; ask for {most} or fewer each"
        raise invalid(message, param)


def prompt_logprobs(
    ids: Sequence[int], scores: Sequence[PromptScore], num_top: int, tokens: TokenTexts
) -> list[Json | None]:
    """vLLM's form: for each token a dict of token ids, its own and the most likely ones; null for the first."""
    told: list[Json | None] = [None]
    for token_id, score in zip(ids[1:], scores, strict=False):
        entries = [(token_id, score.logprob, score.rank)]
        entries += [(other, logprob, rank) for rank, (other, logprob) in enumerate(score.top[:num_top], 1)]
        place: Json = {}
        for other, logprob, rank in entries:
            told_of = {"logprob": finite(logprob), "rank": rank, "decoded_token": tokens.token_text(other)}
            place.setdefault(str(other), told_of)
        told.append(place)
    return told


def echoed_logprobs(
    echo: str, ids: Sequence[int], scores: Sequence[PromptScore], num_top: int, spelling: Spelling
) -> Json:
    """The older form, as completions have it for their answers. `spelling` stands behind the echo afterwards."""
    texts, offsets = [], []
    for token_id in ids:
        text, start = spelling.step(token_id)
        # A special token shows in a prompt that was given as text; a first space may be left out of one that was not.
        if spelling.offset == start and text and echo.startswith(text, start):
            spelling.offset = start + len(text)
        elif not start and text.startswith(" ") and not echo.startswith(" "):
            text = text[1:]
            spelling.offset = len(text)
        texts.append(text)
        offsets.append(start)
    spelling.offset = len(echo)
    likely: list[Json | None] = [None]
    for token_id, text, score in zip(ids[1:], texts[1:], scores, strict=False):
        place: Json = {}
        for other, logprob in [*score.top[:num_top], (token_id, score.logprob)]:
            place.setdefault(text if other == token_id else spelling.alone(other), finite(logprob))
        likely.append(place)
    return {
        "tokens": texts,
        "token_logprobs": [None, *(finite(score.logprob) for score in scores[: len(ids) - 1])],
        "top_logprobs": likely,
        "text_offset": offsets,
    }
