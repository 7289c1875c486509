"""Detokenising, stop strings and the one end of a stream: every split gives what decoding at once gives."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from gateway.core.tokens import ModelTokens
from gateway.decisions.stream import Discontinuity, StopMatcher, StreamState
from gateway.generation import Delta, RequestError, SpatialObject
from shared import protocol as wire
from shared.errors import ErrorCode, FinishReason
from tests.fake_worker import VOCAB_SIZE, byte_tokenizer, text_ids

BYTES = ModelTokens(byte_tokenizer().to_str().encode())


def piece_tokenizer() -> ModelTokens:
    """As SentencePiece models have it: ▁ for space, byte fallback, a leading space stripped."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for text in ("▁", "▁the", "▁ca", "t", "é", "日", "本", "▁▁", "a", "b", "�"):
        vocab[text] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    return ModelTokens(tokenizer.to_str().encode())


PIECES = piece_tokenizer()
PIECE_VOCAB = 3 + 256 + 11


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=60))
def test_byte_pieces_concatenate_to_the_whole(ids: list[int]) -> None:
    detokenizer = BYTES.detokenizer()
    assert "".join(map(detokenizer.step, ids)) + detokenizer.flush() == BYTES.decode(ids)


@given(st.text(max_size=40), st.booleans())
def test_text_comes_back_and_never_as_half_a_character(text: str, shows_special: bool) -> None:
    detokenizer = BYTES.detokenizer(shown=BYTES.special_ids if shows_special else ())
    pieces = [detokenizer.step(token_id) for token_id in text_ids(text)]
    assert "�" not in "".join(pieces) or "�" in text
    assert "".join(pieces) == text and detokenizer.flush() == ""


@given(
    st.lists(
        st.one_of(st.integers(0, PIECE_VOCAB - 1), st.sampled_from([230, 155, 172, 3 + 0xE6])), max_size=40
    )
)
def test_pieces_of_other_decoders_concatenate_to_the_whole(ids: list[int]) -> None:
    detokenizer = PIECES.detokenizer()
    assert "".join(map(detokenizer.step, ids)) + detokenizer.flush() == PIECES.decode_on(ids)


def test_ids_outside_the_vocabulary_have_no_text() -> None:
    detokenizer = BYTES.detokenizer()
    assert detokenizer.step(10**6) == detokenizer.step(-1) == ""


# ---------------------------------------------------------------- stop strings


def by_character(stops: list[str], text: str) -> tuple[str, str | None]:
    """The oracle: the first position at which some stop string is complete; of several there, the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


ALPHABET = st.text("ab\n", max_size=12)


@given(
    st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    ALPHABET,
    st.lists(st.integers(0, 12), max_size=4),
)
def test_stop_strings_do_not_depend_on_the_split(stops: list[str], text: str, cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    shown, stop = "", None
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in itertools.pairwise(edges):
        piece, stop = matcher.feed(text[start:end])
        shown += piece
        if stop is not None:
            break
    else:
        shown += matcher.flush()
    assert (shown, stop) == by_character(stops, text)


def test_no_more_is_held_back_than_could_match() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.feed("the E") == ("the ", None)
    assert matcher.feed("N") == ("", None)
    assert matcher.feed("x") == ("ENx", None)


# ---------------------------------------------------------------- the state of one stream


def state(**fields: object) -> StreamState:
    return StreamState(BYTES.detokenizer(), started_s=100.0, num_prompt=5, **fields)  # type: ignore[arg-type]


def finish(num_tokens: int, reason: FinishReason = FinishReason.STOP, **fields: object) -> wire.Finish:
    return wire.Finish(1, reason, 5, num_tokens, **fields)  # type: ignore[arg-type]


def text_of(deltas: list[Delta | SpatialObject | None]) -> str:
    return "".join(delta.text for delta in deltas if isinstance(delta, Delta))


@given(
    st.text("ab é🎈", max_size=12),
    st.lists(st.text("ab é🎈", min_size=1, max_size=3), max_size=2),
)
def test_a_stream_shows_what_decoding_at_once_and_cutting_at_the_stop_shows(
    text: str, stops: list[str]
) -> None:
    stream = state(stops=stops)
    ids = text_ids(text)
    deltas: list[Delta | SpatialObject | None] = []
    for index, token_id in enumerate(ids):
        deltas.append(stream.on_token(index, token_id, 101.0))
        if stream.end is not None:
            break
    else:
        deltas.append(stream.on_finish(finish(len(ids))))
    assert (text_of(deltas), stream.end.stop_string if stream.end else "?") == by_character(stops, text)
    told = [i for delta in deltas if isinstance(delta, Delta) for i in delta.token_ids]
    assert told == ids[: len(told)]


def test_duplicates_and_gaps_are_seen_and_change_nothing() -> None:
    stream = state()
    stream.on_token(0, 75, 101.0)
    with pytest.raises(Discontinuity) as duplicate:
        stream.on_token(0, 75, 101.0)
    with pytest.raises(Discontinuity) as gap:
        stream.on_token(2, 75, 101.0)
    assert not duplicate.value.is_gap and gap.value.is_gap
    assert stream.next_index == 1 and stream.end is None


def test_nothing_follows_the_end() -> None:
    stream = state()
    stream.on_finish(finish(0))
    end = stream.end
    assert end is not None and end.reason is FinishReason.STOP
    assert stream.on_token(0, 75, 101.0) is None
    assert stream.on_finish(finish(1, FinishReason.LENGTH)) is None
    stream.fail(RequestError(ErrorCode.INTERNAL, "late"))
    stream.cancel()
    assert stream.end is end


def test_tokens_lost_before_the_finish_are_an_error_not_a_short_answer() -> None:
    stream = state()
    stream.on_token(0, 75, 101.0)
    stream.on_finish(finish(3))
    assert stream.end is not None and stream.end.error is not None
    assert stream.end.error.code is ErrorCode.STREAM_GAP


def test_a_stop_id_that_is_counted_but_not_sent_is_no_loss() -> None:
    stream = state()
    stream.on_token(0, 75, 101.0)
    stream.on_finish(finish(2))
    assert stream.end is not None and stream.end.error is None


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    stream = state()
    assert stream.on_token(0, text_ids("é")[0], 101.0) is None
    delta = stream.on_finish(finish(1, FinishReason.LENGTH))
    assert delta is not None and delta.text == "�"


def test_a_worker_error_reaches_the_end() -> None:
    stream = state()
    stream.on_finish(finish(0, FinishReason.ERROR, code=ErrorCode.NUMERICAL_ERROR, message="NaN"))
    assert stream.end is not None and stream.end.error is not None
    assert stream.end.error.code is ErrorCode.NUMERICAL_ERROR


@given(st.lists(st.tuples(*[st.floats(-0.5, 1.5)] * 4), max_size=4))
def test_boxes_are_made_of_three_tokens_and_clamped(boxes: list[tuple[float, ...]]) -> None:
    stream = state(task="detect")
    found: list[object] = []
    index = 0
    for x, y, width, height in boxes:
        for values in ([x], [y], [width, height]):
            found.append(stream.on_token(index, 5, 101.0, wire.TokenValues(1, index, values)))
            index += 1
    found.append(stream.on_token(index, 0, 101.0))
    objects = [item for item in found if isinstance(item, SpatialObject)]
    assert len(objects) == len(boxes)
    for item in objects:
        box = item.box()
        assert 0 <= box["x_min"] <= box["x_max"] <= 1 and 0 <= box["y_min"] <= box["y_max"] <= 1


def test_points_are_made_of_two_tokens() -> None:
    stream = state(task="point")
    assert stream.on_token(0, 5, 101.0, wire.TokenValues(1, 0, [0.25])) is None
    assert stream.on_token(1, 5, 101.0, wire.TokenValues(1, 1, [float("nan")])) == SpatialObject(0.25, 0.0)


def test_log_probabilities_of_bins_come_with_their_object() -> None:
    stream = state(task="detect")
    for index, one in enumerate(([0.25, 0.0], [0.5, 0.0])):
        assert (
            stream.on_token(index, 5, 101.0, wire.TokenValues(1, index, one, logprobs=[-1.0 - index, 0.0]))
            is None
        )
    box = stream.on_token(2, 6, 101.0, wire.TokenValues(1, 2, [0.1, 0.2], logprobs=[-3.0, -4.0]))
    assert isinstance(box, SpatialObject)
    assert box.scores() == {"x": -1.0, "y": -2.0, "width": -3.0, "height": -4.0}


def test_leading_space_of_an_answer_is_dropped_even_across_tokens() -> None:
    stream = state(strip_start=True)
    deltas = [stream.on_token(i, token_id, 101.0) for i, token_id in enumerate(text_ids(" \n a b"))]
    assert text_of(deltas) == "a b"


def test_logprobs_wait_for_their_text_and_none_is_lost() -> None:
    stream = state(want_logprobs=True)
    infos = []
    ids = text_ids("é!")[:2]
    for index, token_id in enumerate(ids):
        told = wire.TokenLogprobs(1, index, -0.5 * index, wire.pack_i32([7]), [-1.0])
        delta = stream.on_token(index, token_id, 101.0, None, told)
        infos += delta.logprobs or [] if isinstance(delta, Delta) else []
    last = stream.on_token(2, 0, 101.0, None, wire.TokenLogprobs(1, 2, -2.0))
    assert last is None
    rest = stream.on_finish(finish(3))
    infos += (rest.logprobs or []) if rest is not None else []
    assert [(info.token_id, info.logprob) for info in infos] == [(ids[0], 0.0), (ids[1], -0.5), (0, -2.0)]
    assert infos[0].top == [(7, -1.0)]
