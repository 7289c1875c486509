"""The prefix cache by example: full pages, found again by everything that their contents depend on."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.worker.schedule.examples import sequence
from worker.schedule.pages import PagePool
from worker.schedule.prefix_cache import PrefixCache
from worker.schedule.sequence import Picture, Run, Sequence

PROMPT = list(range(20, 31))  # eleven tokens: two full pages of four, and three


@pytest.fixture
def pool() -> PagePool:
    return PagePool(20, 4)


@pytest.fixture
def cache(pool: PagePool) -> PrefixCache:
    return PrefixCache(pool)


def remember(cache: PrefixCache, pool: PagePool, seq: Sequence) -> list[int]:
    seq.pages = [pool.take() for _ in range(pool.pages_for(len(seq.tokens)))]
    pages = list(seq.pages)
    cache.insert(seq, len(seq.tokens))
    cache.release(seq)
    cache.check()
    pool.check()
    return pages


def picture(digest: bytes, position: int = 1, num_tokens: int = 5) -> Picture:
    return Picture((Run(position, num_tokens, 0),), [], [], digest)


def test_full_pages_are_found_again_and_the_rest_is_computed(cache: PrefixCache, pool: PagePool) -> None:
    pages = remember(cache, pool, sequence(PROMPT))
    again = sequence(PROMPT)
    assert cache.match(again) == 8 and again.pages == pages[:2]
    assert pool.num_cached == 0 and pool.num_allocated == 2
    assert (cache.num_hit_tokens, cache.num_query_tokens) == (8, 11)


def test_a_prompt_keeps_one_token_to_compute(cache: PrefixCache, pool: PagePool) -> None:
    remember(cache, pool, sequence(PROMPT[:8]))
    assert cache.match(sequence(PROMPT[:8])) == 4, "the last position's logits are what the prefill is for"


def test_a_common_beginning_is_shared_up_to_where_prompts_part(cache: PrefixCache, pool: PagePool) -> None:
    remember(cache, pool, sequence(PROMPT))
    assert cache.match(sequence([*PROMPT[:6], 90, 91, 92, 93])) == 4
    assert cache.match(sequence([90, *PROMPT])) == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"tenant": "a"}, {"tenant": "b"}),
        (
            {"blocks": [(0, 6)], "pictures": [picture(b"x")]},
            {"blocks": [(0, 6)], "pictures": [picture(b"y")]},
        ),
        ({"blocks": [(0, 6)]}, {"blocks": []}),
        # Nothing of the picture is on the first page, which depends on it all the same.
        (
            {"blocks": [(0, 9)], "pictures": [picture(b"x", 5)]},
            {"blocks": [(0, 9)], "pictures": [picture(b"y", 5)]},
        ),
        ({"pictures": [picture(b"x", 0, 2)]}, {"pictures": [picture(b"y", 0, 2)]}),
    ],
    ids=["tenant", "picture", "direction", "block", "causal picture"],
)
def test_what_a_page_depends_on_tells_it_apart(
    cache: PrefixCache, pool: PagePool, one: dict[str, Any], other: dict[str, Any]
) -> None:
    remember(cache, pool, sequence(PROMPT, **one))
    assert cache.match(sequence(PROMPT, **other)) == 0
    assert cache.match(sequence(PROMPT, **one)) == 8


def test_the_least_lately_used_pages_are_forgotten_first_the_deepest_before(
    cache: PrefixCache, pool: PagePool
) -> None:
    old = remember(cache, pool, sequence(PROMPT))
    remember(cache, pool, sequence([*range(60, 71)]))
    assert cache.evict(1) == 1
    again = sequence(PROMPT)
    assert cache.match(again) == 4 and again.pages == old[:1]
    cache.release(again)
    assert cache.evict(99) == 3 and pool.num_free == pool.total
    cache.check()


def test_pages_of_a_faulty_row_are_not_to_be_found(cache: PrefixCache, pool: PagePool) -> None:
    seq = sequence(PROMPT)
    seq.pages = [pool.take() for _ in range(3)]
    cache.insert(seq, 8)
    cache.forget(seq)
    cache.release(seq)
    assert cache.match(sequence(PROMPT)) == 0 and pool.num_free == pool.total


def test_of_several_pictures_the_common_ones_are_found_again(cache: PrefixCache, pool: PagePool) -> None:
    one, two, other = picture(b"one", 0, 4), picture(b"two", 4, 4), picture(b"other", 4, 4)
    pages = remember(cache, pool, sequence(PROMPT, pictures=[one, two]))
    again = sequence(PROMPT, pictures=[one, other])
    assert cache.match(again) == 4 and again.pages == pages[:1]
    swapped = [picture(b"two", 0, 4), picture(b"one", 4, 4)]
    assert cache.match(sequence(PROMPT, pictures=swapped)) == 0
    assert cache.match(sequence(PROMPT, pictures=[one, two])) == 8


def given(cache: PrefixCache, pool: PagePool, seq: Sequence, *numbers: int) -> list[int]:
    """Pages of a sequence as another worker computed them."""
    pages = [pool.take() for _ in numbers]
    for number, page in zip(numbers, pages, strict=True):
        cache.adopt(seq, number, page)
    cache.check()
    pool.check()
    return pages


def test_pages_that_were_given_are_found_and_held_by_nobody_before(
    cache: PrefixCache, pool: PagePool
) -> None:
    seq = sequence(PROMPT)
    assert cache.num_here(seq) == 0
    pages = given(cache, pool, seq, 0, 1)
    assert pool.num_allocated == 0 and cache.num_here(seq) == 2
    assert cache.match(seq) == 8 and seq.pages == pages


def test_what_is_needed_soon_is_forgotten_last_and_its_end_first(cache: PrefixCache, pool: PagePool) -> None:
    mine, other = sequence(PROMPT), sequence([90, *PROMPT], number=1)
    mine_pages = given(cache, pool, mine, 0, 1)
    given(cache, pool, other, 0)
    cache.touch(mine, 2)
    assert cache.evict_other(frozenset(mine.page_keys)), "the other's"
    assert not cache.evict_other(frozenset(mine.page_keys)) and cache.num_here(mine) == 2
    assert cache.evict(1) == 1 and cache.num_here(mine) == 1
    assert cache.match(mine) == 4 and mine.pages == mine_pages[:1]


def test_given_pages_are_discarded_unless_somebody_holds_them(cache: PrefixCache, pool: PagePool) -> None:
    seq, reader = sequence(PROMPT), sequence(PROMPT[:6], number=1)
    given(cache, pool, seq, 0, 1)
    assert cache.match(reader) == 4
    cache.discard(seq, 0, 2)
    cache.check()
    pool.check()
    assert cache.num_here(seq) == 1 and pool.num_cached == 0
