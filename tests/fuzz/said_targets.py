"""Owns the fuzzing of what models say, which is anybody's text, and of requests over gRPC."""

from __future__ import annotations

import asyncio
import random
from typing import Any, Final

from google.protobuf.message import DecodeError
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from gateway.decisions.answer_parts import DIALECTS, AnswerReader, ThinkingTags
from gateway.decisions.outlines import Outline, OutlineMarks
from gateway.generation import RequestError
from gateway.transport.rpc_requests import read_request
from tests.fuzz.mutations import mutated_bytes
from tests.fuzz.targets import Make, Target, bytes_of
from tests.unit.gateway.api.fake_core import FakeCore

_DIALECTS: Final = (None, *DIALECTS.values())
_TAGS: Final = ThinkingTags("<think>", "</think>")
_SAID: Final = (
    b'<think>so</think>ok<tool_call>{"name": "f", "arguments": {"a": [1, "}"]}}</tool_call>\n<tool_call>{"name": "g"}</tool_call>',
    b'[TOOL_CALLS]f{"a": {"b": "\\u00e9"}}[TOOL_CALLS]g[ARGS]{}',
    b"<|tool_call_start|>[f(a=1, b=[True, None, 'x']), g()]<|tool_call_end|>done",
    b'<|tool_call|>[{"name": "f", "arguments": {}}, {"name": "f", "arguments": {"a": -1.5e3}}]<|/tool_call|>',
    b'<|python_tag|>{"name": "f", "parameters": {"a": "b"}}; {"name": "g", "parameters": {}}',
    b"[f(a={'x': (1, 2)}, b=-3), a.b(c='\\'')]",
)
_MARKS: Final = (b"<think>", b"</think>", b"<tool_call>", b"</tool_call>", b"[TOOL_CALLS]", b"[ARGS]", b"<|tool_call_start|>", b"<|python_tag|>", b'{"name": ', b'"arguments": {', b"f(", b")]", b"}}", b"9" * 400, b"1e999", b"[" * 300, b"(" * 300, b"-" * 300)  # fmt: skip
_PATH: Final = ("M", "L", "C", "Z", "h", "-", "12", "960", "7" * 30, "٣", "", " ", "A", "é", "0", "Q")
_NUM_REGULAR: Final = 2  # ids that stand for a coordinate and a size


def _answers(rng: random.Random, donors: list[Any]) -> bytes:
    others = [donor.encode(errors="surrogatepass") for donor in donors if isinstance(donor, str)]
    return mutated_bytes(rng.choice(_SAID), rng, [*_MARKS, *others])


def _answer(data: bytes) -> object:
    """An answer in one of the dialects, in pieces: nothing that a model says is refused."""
    chosen = sum(data)
    text = data.decode(errors="replace")
    reader = AnswerReader(_DIALECTS[chosen % len(_DIALECTS)], _TAGS, thinks_first=chosen % 5 == 0)
    size = 1 + len(data) % 7
    for at in range(0, len(text), size):
        reader.feed(text[at : at + size])
    return reader.close()


def _outline(data: bytes) -> object:
    """Ids, and the values of those that are places, as a worker sends them."""
    outline = Outline(OutlineMarks(0, 1, lambda token_id: _PATH[token_id - _NUM_REGULAR]))
    values: tuple[list[float], ...] = ([0.5], [0.25, 2.0], [], [float("nan")], [float("-inf"), 0.0])
    for index, byte in enumerate(data):
        token_id = byte % (_NUM_REGULAR + len(_PATH))
        outline.take(token_id, values[byte % len(values)] if token_id < _NUM_REGULAR else None, index)
    return None


def _rpc_request() -> pb.GenerateRequest:
    params = pb.SamplingParams(
        temperature=0.5,
        top_p=0.9,
        max_tokens=5,
        stop=["x"],
        logit_bias={5: 1.0},
        n=2,
        json_schema='{"type": "object"}',
    )
    return pb.GenerateRequest(request_id="r", text="hi", sampling_params=params)  # fmt: skip


def _rpc_sound() -> tuple[bytes, ...]:
    text = _rpc_request()
    ids = pb.GenerateRequest(sampling_params=pb.SamplingParams(logprobs=2, seed=3, stop_token_ids=[7]))
    ids.tokenized.input_ids.extend([1, 2, 3])
    shown = pb.GenerateRequest(
        text="<image>what?", media_refs=pb.MediaRefs(items=[pb.MediaRef(url="data:,")])
    )
    return tuple(one.SerializeToString() for one in (text, ids, shown))


def said_targets() -> list[Target]:
    """Answers of models, outlines, requests over gRPC."""

    core, loop = FakeCore(), asyncio.Runner()

    def generate(data: bytes) -> object:
        return loop.run(read_request(core, pb.GenerateRequest.FromString(data), "r", "t"))

    outlines = (bytes([0, 0, 1, 2, 8, 8, 3, 7, 8, 9, 5]), bytes([0, 0, 1, 2, 8, 8, 4, *[8] * 6, 5]))
    make: Make = _answers
    return [
        Target("answers", make, _answer, ()),
        Target("outlines", bytes_of(outlines), _outline, ()),
        Target("grpc", bytes_of(_rpc_sound()), generate, (RequestError, DecodeError)),
    ]
