"""The table of faults: one fault for real, and the table's own rules; all of them are `degas faults`."""

from __future__ import annotations

import asyncio
import json

import pytest
from rich.console import Console

from loadtest.chaos.fault_list import catalogue, choose
from loadtest.chaos.fault_requests import bad_bodies, gif, png
from loadtest.chaos.faults import Fault, Found, Size, counted, do, fault_table


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_device_error_done_for_real() -> None:
    (fault,) = choose(["device-error"])
    outcome = do(fault, Size(streams=8))
    assert not outcome.broken and len(outcome.found) == 3
    untimed = [one for one in outcome.found if one.took_s is None]
    assert all(one.kept for one in untimed), outcome.to_json()
    assert "4 device_error" in outcome.found[0].saw


def test_every_fault_has_a_name_of_its_own_and_its_words() -> None:
    faults = catalogue()
    names = [fault.name for fault in faults]
    assert len(set(names)) == len(names) >= 20
    assert all(fault.what and fault.needs in ("sim", "pocket") for fault in faults)
    assert [fault.name for fault in choose(["nan", "flood"])] == ["nan", "flood"]
    with pytest.raises(ValueError, match="'none' is no fault; there are: leaves"):
        choose(["none"])
    with pytest.raises(ValueError, match="--streams is 3; 8 to 1000 would work"):
        Size(streams=3).check()


async def _kept(size: Size) -> list[Found]:
    return [Found.within("quick", 0.5, 1.0, "it was"), Found("clean", "it is", True)]


async def _late(size: Size) -> list[Found]:
    return [Found.within("quick", 2.0, 1.0), Found.within("quick and right", 0.1, 1.0, also=False)]


async def _raises(size: Size) -> list[Found]:
    await asyncio.sleep(0)
    raise RuntimeError("no service\nstarts here")


async def _finds_nothing(size: Size) -> list[Found]:
    return []


def test_a_promise_is_kept_in_time_and_a_fault_that_cannot_be_done_is_said() -> None:
    outcomes = [do(Fault(name, name, hurt), Size()) for name, hurt in (
        ("kept", _kept), ("late", _late), ("raises", _raises), ("finds nothing", _finds_nothing),
    )]  # fmt: skip
    assert [outcome.kept for outcome in outcomes] == [True, False, False, False]
    assert [one.kept for one in outcomes[1].found] == [False, False]
    assert outcomes[2].broken == "RuntimeError: no service\nstarts here"
    json.dumps([outcome.to_json() for outcome in outcomes])
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(fault_table(outcomes))
    text = console.export_text()
    assert "NOT DONE" in text and "500 ms" in text and "2.0 s" in text and "no service" in text


def test_words_are_counted() -> None:
    assert counted(["a", "b", "a"]) == "2 a, 1 b" and counted([]) == "none"


def test_hostile_input_is_what_it_says() -> None:
    assert len(bad_bodies()) > 50
    pillow = pytest.importorskip("PIL.Image")
    import io

    animation = pillow.open(io.BytesIO(gif(7)))
    assert animation.n_frames == 7 and animation.size == (1, 1)
    assert pillow.open(io.BytesIO(png(3, 2))).getpixel((2, 1)) == 128
