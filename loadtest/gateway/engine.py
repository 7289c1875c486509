"""Owns a mock engine that speaks the worker's wire: a token for each sequence at a fixed rate. Its own process, main thread.

`python -m degas.rooms loadtest.gateway.engine ENDPOINT COUNTERS STEPS_PER_S GROUPS`. One step is one frame with one token for
each sequence of its group, as a worker sends it. A token's text says its step, so that a client finds out when it was sent.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Final

import zmq

from loadtest.gateway.counters import STEPS, Counters
from shared import protocol as wire
from shared.errors import FinishReason

MODEL: Final = "mock"
FIRST_ID: Final = 256
MAX_SEQUENCES: Final = 16384
_BEAT_S: Final = 0.5
_MARKS: Final = ("<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, as most small models have it: both stacks render it."""


def token_text(step: int) -> str:
    """A word and a blank, as most tokens of English text are."""
    return f" {step % STEPS:04d}"


def tokenizer_json() -> bytes:
    """Byte-level BPE: an id a byte, one for every number of a step, and the template's marks."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    alphabet = [chr(byte) if byte in printable else chr(next(hidden)) for byte in range(256)]
    words = ["\u0120" + token_text(step)[1:] for step in range(STEPS)]
    vocab = {text: token_id for token_id, text in enumerate([*alphabet, *words])}
    marks = [
        {
            "id": len(vocab) + number,
            "content": mark,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for number, mark in enumerate(_MARKS)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    layout: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": marks,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    return json.dumps(layout).encode()


class Engine:
    """See the module."""

    def __init__(self, endpoint: str, counters: Counters, steps_per_s: float, num_groups: int) -> None:
        self._counters = counters
        self._period_s = 1 / steps_per_s
        self._groups: list[dict[int, list[int]]] = [
            {} for _ in range(num_groups)
        ]  # id → [next index, max tokens]
        self._num_submitted = 0
        self._step = 0
        self._epoch = os.getpid()
        self._peer = b""
        self._tokenizer = tokenizer_json()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.sndhwm = 0
        self._socket.bind(endpoint)

    def run(self) -> None:
        """Until it is killed, or its parent is gone."""
        parent = os.getppid()
        due_s, beat_s = time.monotonic(), 0.0
        while os.getppid() == parent:
            now_s = time.monotonic()
            if now_s >= beat_s:
                beat_s = now_s + _BEAT_S
                self._send(wire.Beat(self._epoch, self._step, 0, 0, 1, 1))
            if now_s >= due_s:
                due_s = max(due_s + self._period_s, now_s)
                self._send_step()
            if self._socket.poll(max(0, int((due_s - time.monotonic()) * 1000))):
                self._receive()
            else:
                time.sleep(max(0.0, due_s - time.monotonic()))

    def _send(self, message: wire.FromWorker, *payloads: bytes) -> None:
        if self._peer:
            self._socket.send_multipart([self._peer, wire.encode(message), *payloads])

    def _receive(self) -> None:
        while self._socket.poll(0):
            self._peer, frame, *_ = self._socket.recv_multipart()
            message = wire.decode_from_gateway(frame)
            if isinstance(message, wire.Submit):
                group = self._groups[self._num_submitted % len(self._groups)]
                group[message.sequence_id] = [0, message.max_tokens]
                self._num_submitted += 1
            elif isinstance(message, wire.Cancel):
                for group in self._groups:
                    for sequence_id in message.sequence_ids:
                        group.pop(sequence_id, None)
            elif isinstance(message, wire.Hello):
                self._send(self._ready(), self._tokenizer, CHAT_TEMPLATE.encode())

    def _ready(self) -> wire.Ready:
        most = 1 << 30
        num_ids = FIRST_ID + STEPS + len(_MARKS)
        card = wire.ModelCard(MODEL, "llama", most, num_ids, None, [], default_max_tokens=16)
        limits = wire.Limits(MAX_SEQUENCES, 0, 1 << 20, 16, 1 << 16, most, progress_timeout_s=30.0)
        return wire.Ready(wire.PROTOCOL_VERSION, wire.schema_hash(), self._epoch, card, limits, "mock")

    def _send_step(self) -> None:
        step = self._step
        self._step += 1
        group = self._groups[step % len(self._groups)]
        if not group:
            return
        ids = list(group)
        first = [state[0] for state in group.values()]
        finishes = []
        for sequence_id, state in list(group.items()):
            state[0] += 1
            if state[0] >= state[1]:
                finishes.append(wire.Finish(sequence_id, FinishReason.LENGTH, 8, state[1]))
                del group[sequence_id]
        outputs = wire.StepOutputs(
            self._epoch,
            step,
            wire.pack_i64(ids),
            wire.pack_i32(first),
            wire.pack_i32([FIRST_ID + step % STEPS] * len(ids)),
            finishes,
        )
        self._counters.on_step(step, time.monotonic_ns(), len(ids))
        self._send(outputs)


def main(arguments: list[str]) -> None:
    """Run one engine."""
    endpoint, counters, steps_per_s, num_groups = arguments
    Engine(endpoint, Counters(Path(counters)), float(steps_per_s), int(num_groups)).run()


if __name__ == "__main__":
    main(sys.argv[1:])
