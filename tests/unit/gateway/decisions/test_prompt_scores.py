"""Log-probabilities of a prompt in a stream: all of them, once, with the first text or with the end."""

from __future__ import annotations

from array import array

import pytest

from gateway.core.tokens import ModelTokens
from gateway.decisions.stream import StreamState
from gateway.generation import Delta, PromptScore
from shared import protocol as wire
from shared.errors import ErrorCode, FinishReason
from tests.fake_worker import byte_tokenizer, text_ids

BYTES = ModelTokens(byte_tokenizer().to_str().encode())


def stream() -> StreamState:
    return StreamState(BYTES.detokenizer(), started_s=0.0, num_prompt=4)


def scores(first: int, *logprobs: float, top: int = 0) -> wire.PromptLogprobs:
    num = len(logprobs)
    return wire.PromptLogprobs(
        7,
        first,
        array("f", logprobs).tobytes(),
        wire.pack_i32(list(range(1, num + 1))),
        wire.pack_i32(list(range(num * top))),
        array("f", [-1.0] * (num * top)).tobytes(),
    )


def finish(reason: FinishReason = FinishReason.STOP) -> wire.Finish:
    return wire.Finish(7, reason, 4, 0)


def test_they_come_with_the_first_text_and_once() -> None:
    state = stream()
    for part in (scores(1, -0.5, top=2), scores(1, -0.5, top=2), scores(2, -1.0, -2.0, top=2)):
        state.on_prompt(part)  # the second came twice
    first = state.on_token(0, text_ids("a")[0], 1.0)
    assert isinstance(first, Delta)
    assert first.prompt == [
        PromptScore(-0.5, 1, [(0, -1.0), (1, -1.0)]),
        PromptScore(-1.0, 1, [(0, -1.0), (1, -1.0)]),
        PromptScore(-2.0, 2, [(2, -1.0), (3, -1.0)]),
    ]
    second = state.on_token(1, text_ids("b")[0], 2.0)
    assert isinstance(second, Delta) and second.prompt is None


def test_an_answer_without_a_token_has_them_at_its_end() -> None:
    state = stream()
    state.on_prompt(scores(1, -0.5, -0.25))
    last = state.on_finish(finish())
    assert last is not None and last.text == "" and last.prompt is not None and len(last.prompt) == 2
    assert state.end is not None and state.end.reason is FinishReason.STOP


def test_a_gap_ends_the_stream() -> None:
    state = stream()
    state.on_prompt(scores(3, -0.5))
    assert state.end is not None and state.end.error is not None
    assert state.end.error.code is ErrorCode.STREAM_GAP


@pytest.mark.parametrize(
    "bad",
    [
        wire.PromptLogprobs(7, 1, b"123", wire.pack_i32([1])),
        wire.PromptLogprobs(7, 1, array("f", [0.0]).tobytes(), wire.pack_i32([1, 2])),
        wire.PromptLogprobs(7, 1, array("f", [0.0]).tobytes(), wire.pack_i32([1]), wire.pack_i32([4])),
    ],
)
def test_what_does_not_fit_together_is_a_bad_frame(bad: wire.PromptLogprobs) -> None:
    with pytest.raises(ValueError, match=r"multiple|fit together|size"):
        stream().on_prompt(bad)
