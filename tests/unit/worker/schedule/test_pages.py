"""The page pool by example: taken, held, dropped, cached, evicted, and never lost (I7)."""

from __future__ import annotations

import pytest

from worker.schedule.pages import PagePool


def test_a_page_is_free_until_taken_and_again_when_its_last_holder_drops_it() -> None:
    pool = PagePool(4, 16)
    page = pool.take()
    assert page != 0, "page 0 is padding"
    pool.hold(page)
    pool.drop(page)
    assert (pool.count(page), pool.num_free, pool.num_allocated) == (1, 2, 1)
    pool.drop(page)
    assert (pool.count(page), pool.num_free) == (0, 3)
    pool.check()


def test_a_page_that_is_kept_is_cached_until_it_is_held_again_or_evicted() -> None:
    pool = PagePool(4, 16)
    page, other = pool.take(), pool.take()
    pool.drop(page, keep=True)
    pool.drop(other, keep=True)
    assert (pool.num_cached, pool.num_free, pool.num_allocated) == (2, 1, 0)
    pool.hold(page)
    pool.evict(other)
    assert (pool.num_cached, pool.num_free, pool.num_allocated) == (0, 2, 1)
    pool.check()


def test_the_last_page_of_a_prompt_is_the_first_to_be_used_again() -> None:
    pool = PagePool(5, 16)
    pages = [pool.take() for _ in range(3)]
    pool.drop_all(pages)
    assert pool.take() == pages[0]


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_pages_for_tokens(num_tokens: int, num_pages: int) -> None:
    assert PagePool(4, 16).pages_for(num_tokens) == num_pages


def test_what_is_not_there_cannot_be_taken_held_dropped_or_evicted() -> None:
    pool = PagePool(2, 16)
    page = pool.take()
    with pytest.raises(IndexError):
        pool.take()
    with pytest.raises(KeyError):
        pool.evict(page)
    pool.drop(page)
    with pytest.raises(AssertionError, match="free"):
        pool.hold(page)
    with pytest.raises(AssertionError, match="more often than held"):
        pool.drop(page)
    pool.check()


@pytest.mark.parametrize(("num_pages", "page_tokens"), [(1, 16), (4, 0)])
def test_a_pool_of_nothing_is_refused(num_pages: int, page_tokens: int) -> None:
    with pytest.raises(ValueError):
        PagePool(num_pages, page_tokens)
