"""Announcements: which are the same model, and what becomes of requests prepared for another."""

from __future__ import annotations

import msgspec
import pytest
from tokenizers import AddedToken

from gateway.config import load
from gateway.core.catalog import AnnouncedModel, Catalog
from gateway.generation import RequestError
from shared import protocol as wire
from shared.errors import ErrorCode
from tests.fake_worker import CARD, LIMITS, byte_tokenizer

TOKENIZER = byte_tokenizer().to_str().encode()


def announce(
    catalog: Catalog,
    card: wire.ModelCard = CARD,
    limits: wire.Limits = LIMITS,
    tokenizer: bytes = TOKENIZER,
    template: bytes = b"",
) -> AnnouncedModel:
    return catalog.announce(
        wire.Ready(wire.PROTOCOL_VERSION, "", 1, card, limits, "fake"), tokenizer, template
    )


def test_the_same_announcement_is_the_same_model() -> None:
    catalog = Catalog(load())
    first = announce(catalog, template=b"x")
    assert announce(catalog, template=b"x") is first
    assert announce(catalog, template=b"y") is not first


def test_a_request_outlives_a_restart_with_other_limits_but_no_other_tokenizer() -> None:
    catalog = Catalog(load())
    first = announce(catalog)
    second = announce(catalog, limits=msgspec.structs.replace(LIMITS, max_rows=2))
    assert second is not first and catalog.current(first) is second
    other = byte_tokenizer()
    other.add_special_tokens([AddedToken("<|new|>", special=True)])
    announce(catalog, tokenizer=other.to_str().encode())
    with pytest.raises(RequestError, match="took the name") as caught:
        catalog.current(first)
    assert caught.value.code is ErrorCode.LOADING


def test_a_request_for_other_end_marks_is_not_sent_on() -> None:
    catalog = Catalog(load())
    first = announce(catalog)
    announce(catalog, msgspec.structs.replace(CARD, eos_ids=[1]))
    with pytest.raises(RequestError):
        catalog.current(first)
