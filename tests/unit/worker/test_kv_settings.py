"""What cannot be published, or not there, is refused before anything starts, and told what would do."""

from __future__ import annotations

from typing import Any

import pytest

from worker.config import ConfigError, load


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"kv_events": "5557"}, "kv_events"),
        ({"kv_events": "tcp://*"}, "a safe value is tcp://127.0.0.1:5557"),
        ({"kv_events": "http://127.0.0.1:5557"}, "no address to bind"),
        ({"kv_events": "tcp://*:5557", "prefix_cache": False}, "prefix_cache is off"),
        ({"kv_events": "tcp://*:5557", "kv_events_replay": "tcp://*:5557"}, "another port"),
        ({"kv_events": "tcp://*:5557", "kv_events_form": "json"}, "kv_events_form"),
    ],
)
def test_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(flags)


def test_off_unless_asked_for_and_taken_as_given() -> None:
    assert load({}).kv_events is None
    taken = load({"kv_events": "tcp://*:5557", "kv_events_replay": "ipc:///run/replay"})
    assert (taken.kv_events, taken.kv_events_form, taken.kv_events_topic) == ("tcp://*:5557", "arrays", "")
