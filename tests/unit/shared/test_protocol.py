"""Golden bytes of the wire: a change here is a change of the protocol, and needs a new version or an appended field."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from shared import protocol as wire
from shared.errors import ErrorCode, FinishReason

GOLDEN = [
    (wire.Hello(1, "abc", "gw", 5.0), "95a548656c6c6f01a3616263a26777cb4014000000000000"),
    (wire.Cancel(7, [1, 300]), "93a643616e63656c079201cd012c"),
    (wire.Ping(7, 1.5), "93a450696e6707cb3ff8000000000000"),
    (wire.Drain(2.0), "92a5447261696ecb4000000000000000"),
    (wire.Fatal(7, ErrorCode.DEVICE_ERROR, "x"), "94a5466174616c07ac6465766963655f6572726f72a178"),
    (
        wire.Rejected(7, 2, ErrorCode.QUEUE_FULL, "m"),
        ("97a852656a65637465640702aa71756575655f66756c6ca16da0cb0000000000000000"),
    ),
]


GOLDEN_PREFILL = "98a750726566696c6c0709c408010000000200000003a17400cb0000000000000000"


def test_golden_bytes_of_pictures_that_are_encoded_elsewhere() -> None:
    format = wire.FeatureFormat("bfloat16", 2048, "ab")
    asked = wire.Encode(7, 9, wire.ImageInput([wire.Sheet(1, 1, 8, 8)], [(1, 3)], b"d"), "t")
    assert wire.encode(asked).hex() == "95a6456e636f6465070996919401010808919201" + "03c401640000c2a174"
    answer = wire.Features(7, 9, format)
    assert wire.encode(answer).hex() == "96a8466561747572657307" + "0993a862666c6f61743136cd0800a26162c0a0"
    assert wire.decode_from_worker(wire.encode(answer)) == answer
    older = wire.Submit(1, 2, "r", b"", 3)
    short = msgspec.msgpack.encode(msgspec.msgpack.decode(wire.encode(older))[:-3])
    assert wire.decode_from_gateway(short) == older, "a request without such pictures says nothing of them"
    ready = [
        "Ready",
        4,
        "h",
        1,
        msgspec.to_builtins(wire.ModelCard("m", "f", 1, 1, 0, [])),
        [1, 1, 1, 1, 1, 1],
        "cpu",
    ]
    found = wire.decode_from_worker(msgspec.msgpack.encode(ready))
    assert isinstance(found, wire.Ready) and (found.role, found.features, found.limits.feature_bytes) == (
        "all",
        None,
        0,
    )


def test_golden_bytes_of_pages_between_workers() -> None:
    asked = wire.Prefill(7, 9, wire.pack_i32([1, 2]), 3, "t")
    assert wire.encode(asked).hex() == GOLDEN_PREFILL
    assert wire.decode_from_gateway(wire.encode(asked)) == asked
    pages = wire.Pages(7, 9, 3, b"k" * 2, 5)
    assert wire.encode(pages).hex() == "96a5506167657307090" + "3c4026b6b05"
    assert wire.decode_from_worker(wire.encode(pages)) == pages


def test_a_beat_says_how_long_the_loop_may_be_silent_and_an_older_one_says_nothing() -> None:
    beat = wire.Beat(7, 9, 1, 2, 3, 4, expected_s=1.5)
    data = wire.encode(beat)
    assert data.hex() == "9da4426561740709010203" + "04c28080cb0000000000000000cb3ff800000000000001"
    assert wire.decode_from_worker(data) == beat
    older = msgspec.msgpack.encode(msgspec.msgpack.decode(data)[:-2])
    assert wire.decode_from_worker(older) == wire.Beat(7, 9, 1, 2, 3, 4)
    limits = msgspec.msgpack.encode([8, 32, 1024, 16, 2048, 2048])
    assert msgspec.msgpack.decode(limits, type=wire.Limits).progress_timeout_s == 3.0


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=lambda m: type(m).__name__)
def test_golden_bytes(message: wire.Message, golden: str) -> None:
    assert wire.encode(message).hex() == golden


def test_step_outputs_travel_packed() -> None:
    finish = wire.Finish(5, FinishReason.STOP, 10, 3)
    message = wire.StepOutputs(
        7, 9, wire.pack_i64([5, 6]), wire.pack_i32([0, 4]), wire.pack_i32([11, 12]), [finish]
    )
    data = wire.encode(message)
    assert data.startswith(
        bytes.fromhex("9aab537465704f7574707574730709c41005000000000000000600000000000000")
    )
    back = wire.decode_from_worker(data)
    assert isinstance(back, wire.StepOutputs)
    assert wire.unpack_i64(back.sequence_ids).tolist() == [5, 6]
    assert back.finishes == [finish]


def test_an_older_peer_may_leave_out_appended_fields() -> None:
    short = msgspec.msgpack.encode(["Ping", 7])
    assert wire.decode_from_gateway(short) == wire.Ping(7, 0.0)


def test_an_older_workers_card_has_the_defaults_of_what_it_leaves_out() -> None:
    appended: dict[str, Any] = {
        "default_top_k": 20,
        "special_tokens": {"bos_token": "<s>"},
        "default_min_p": 0.1,
    }
    appended |= {"default_repetition_penalty": 1.2, "chat_templates": {"rag": "r"}, "weight_bytes": 9}
    whole = msgspec.msgpack.decode(
        msgspec.msgpack.encode(wire.ModelCard("m", "qwen3", 100, 10, 0, [1], **appended))
    )
    assert whole[-6:] == [20, {"bos_token": "<s>"}, 0.1, 1.2, {"rag": "r"}, 9]
    assert len(whole) == len(wire.ModelCard.__struct_fields__) == 24
    whole = whole[:-2]
    for left_out in (1, 2, 3, 4):
        older = msgspec.msgpack.decode(msgspec.msgpack.encode(whole[:-left_out]), type=wire.ModelCard)
        assert older.default_repetition_penalty == 1.0 and older.chat_templates == {}
        assert older.weight_bytes == 0
        assert older.default_min_p == (0.1 if left_out == 1 else 0.0)
        assert older.default_top_k == (20 if left_out < 4 else 0)
        assert older.special_tokens == ({"bos_token": "<s>"} if left_out < 3 else {})


def test_a_newer_peers_extra_fields_are_ignored() -> None:
    long = msgspec.msgpack.encode(["Ping", 7, 1.0, "new"])
    assert wire.decode_from_gateway(long) == wire.Ping(7, 1.0)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", b"\x93", msgspec.msgpack.encode(["Nope", 1]), msgspec.msgpack.encode(["Cancel", "x", []])],
)
def test_malformed_messages_raise_only_msgspec_errors(data: bytes) -> None:
    with pytest.raises((msgspec.DecodeError, msgspec.ValidationError)):
        wire.decode_from_gateway(data)


def test_directions_do_not_mix() -> None:
    with pytest.raises(msgspec.ValidationError):
        wire.decode_from_worker(wire.encode(wire.Ping(1)))


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(OverflowError):
        wire.pack_i32([1 << 31])
    with pytest.raises(ValueError, match="bytes"):
        wire.unpack_i32(b"123")


def test_schema_hash_sees_names_types_and_codes() -> None:
    assert len(wire.schema_hash()) == 16
    assert wire.schema_hash() == wire.schema_hash()
