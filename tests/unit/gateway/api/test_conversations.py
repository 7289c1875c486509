"""What `previous_response_id` can continue: bounded, by tenant, oldest forgotten first."""

from __future__ import annotations

from typing import Any

from gateway.api.conversations import Conversations, Turn
from gateway.api.prompts import ImagePart, ImageUrl, Message, TextPart
from gateway.generation import End, Usage
from shared.errors import FinishReason


def turn(text: str = "hi", image_bytes: int = 0) -> Turn:
    """A turn of a known size."""
    picture = ImagePart(image_url=ImageUrl(url="x" * image_bytes))
    return Turn((Message(role="user", content=[TextPart(text=text), picture]),))


def test_turns_belong_to_their_tenant() -> None:
    held = Conversations()
    held.remember("a", "resp_1", turn())
    assert held.recall("a", "resp_1") is not None
    assert held.recall("b", "resp_1") is None


def test_the_oldest_goes_first_by_count_and_use() -> None:
    held = Conversations(max_turns=2)
    held.remember("", "1", turn())
    held.remember("", "2", turn())
    assert held.recall("", "1") is not None  # used, so younger than 2
    held.remember("", "3", turn())
    assert held.recall("", "2") is None
    assert held.recall("", "1") is not None and held.recall("", "3") is not None


def test_a_tenant_with_much_makes_room_for_the_others() -> None:
    """By number and by bytes: whoever holds most forgets its own oldest, not another's."""
    held = Conversations(max_turns=10, max_bytes=2000)
    held.remember("few", "mine", turn(image_bytes=100))
    for number in range(40):
        held.remember("many", str(number), turn(image_bytes=20))
    for number in range(40):
        held.remember("large", str(number), turn(image_bytes=600))
    assert held.recall("few", "mine") is not None
    assert held.recall("many", "39") is not None and held.recall("many", "20") is None
    assert held.recall("large", "39") is not None and held.recall("large", "20") is None
    assert len(held) <= 10 and held.size_bytes <= 2000


def test_bytes_are_bounded_and_counted_back() -> None:
    held = Conversations(max_bytes=1000)
    for number in range(50):
        held.remember("", str(number), turn(image_bytes=300))
        assert held.size_bytes <= 1000
    assert len(held) == 3
    held.remember("", "huge", turn(image_bytes=5000))
    assert held.recall("", "huge") is None and len(held) == 3
    held.remember("", "49", turn(image_bytes=200))  # the same id again replaces, and is counted once
    kept = [found for name in ("47", "48", "49") if (found := held.recall("", name)) is not None]
    assert len(kept) == 3 and held.size_bytes == sum(found.size_bytes for found in kept)


def test_calls_results_and_thinking_count() -> None:
    call = {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "status": "completed"}
    thought: dict[str, Any] = {
        "type": "reasoning",
        "content": [{"type": "reasoning_text", "text": "h" * 500}],
    }
    held = Conversations()
    output = [thought, {**call, "arguments": '{"a": "%s"}' % ("x" * 1000)}]
    held.remember_answer("", "resp_1", turn(), End(FinishReason.STOP, Usage()), output)
    assert held.size_bytes >= 1500
    said = Message(role="tool", content="r" * 300, tool_call_id="c")
    assert (
        Turn(
            (said,),
        ).size_bytes
        >= 300
    )


def test_a_call_that_was_cut_off_is_not_gone_on_with() -> None:
    held = Conversations()
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a', "status": "incomplete"}
    held.remember_answer("", "resp_1", turn(), End(FinishReason.LENGTH, Usage()), [call])
    kept = held.recall("", "resp_1")
    assert kept is not None and [m.role for m in kept.messages] == ["user"]


def test_failed_turns_are_not_kept() -> None:
    held = Conversations()
    answer = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "yes"}]}
    for reason in FinishReason:
        held.remember_answer("", reason.value, turn(), End(reason, Usage()), [answer])
    assert {reason for reason in FinishReason if held.recall("", reason.value)} == {
        FinishReason.STOP,
        FinishReason.LENGTH,
        FinishReason.DEADLINE,
    }
    kept = held.recall("", "stop")
    assert kept is not None and [m.text() for m in kept.messages] == ["hi", "yes"]
