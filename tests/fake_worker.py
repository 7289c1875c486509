"""A worker without a model: speaks `shared/protocol.py` over a real ZeroMQ ROUTER from a thread of its own.

How to use it::

    with FakeWorker() as worker:                  # binds ipc:// in a fresh 0700 directory
        worker.reply("Hello, wörld 🎈")           # what every later Submit is answered with
        ...                                       # point a gateway at [worker.endpoint]
        worker.submits                            # every Submit seen, worker.payloads its raw frames
        worker.cancelled                          # ids of every Cancel seen

One *tick* (`step_s`, default 1 ms) sends one `StepOutputs` a gateway with one token for each of its
sequences, as the real worker does. What a sequence says is decided when its `Submit` arrives by
`worker.script`, a function `Submit -> list[Action]` (see the `Action` classes below); `reply`,
`reply_tokens`, `reply_objects` and `reject` set the usual ones. Faults: `die()` closes the socket without a
word, `restart()` binds again under a new epoch, `freeze()`/`thaw()` stop and resume beats and tokens,
`send_raw(frames)` sends anything to every gateway, `hold()`/`release()` stop and resume tokens only.

The tokenizer (`byte_tokenizer`) has ids 0–9 special as Moondream uses them and one id a byte from 10 on, so
every non-ASCII character spans several tokens. `text_ids(text)` is its encoding, without loading anything.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil
from socket import socketpair
from types import TracebackType

import msgspec
import zmq
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from shared import protocol as wire
from shared.errors import ErrorCode, FinishReason

FIRST_BYTE_ID = 10
VOCAB_SIZE = FIRST_BYTE_ID + 256


def byte_tokenizer() -> Tokenizer:
    """A byte-level tokenizer: ids 0–9 special, id 10 + b for byte b."""
    alphabet = _byte_alphabet()
    vocab = {f"<|{i}|>": i for i in range(FIRST_BYTE_ID)}
    vocab |= {alphabet[byte]: FIRST_BYTE_ID + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(f"<|{i}|>", special=True) for i in range(FIRST_BYTE_ID)])
    return tokenizer


def _byte_alphabet() -> dict[int, str]:
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def text_ids(text: str) -> list[int]:
    """Token ids of `text`, one a byte."""
    return [FIRST_BYTE_ID + byte for byte in text.encode()]


def ids_text(token_ids: list[int]) -> str:
    """The text of ids, special ones left out."""
    return bytes(i - FIRST_BYTE_ID for i in token_ids if i >= FIRST_BYTE_ID).decode(errors="replace")


CARD = wire.ModelCard(
    model_id="fake-vl",
    family="moondream",
    context_tokens=2048,
    vocab_size=VOCAB_SIZE,
    bos_id=0,
    eos_ids=[0],
    created=1_700_000_000,
    image=wire.ImageSpec(56, 64, wire.OverlappingTiles(7, 1, 4), attends="prefix", max_images=16),
    capabilities=["chat", "query", "caption", "detect", "point", "segment"],
    templates={
        "query_prefix": [1, 8, 2],
        "query_suffix": [3],
        "reasoning_suffix": [3, 4],
        "reasoning_end": [3],
        "reasoning_close": [3],
        "reasoning_cuts": [7, 9],
        "caption_short": [1, 20, 2, 21, 3],
        "caption_normal": [1, 20, 2, 22, 3],
        "caption_long": [1, 20, 2, 23, 3],
        "detect_prefix": [1, 24, 2],
        "detect_suffix": [3],
        "point_prefix": [1, 25, 2],
        "point_suffix": [3],
        "segment_prefix": [1, 26, 2],
        "segment_suffix": [3],
    },
    suppress_ids=[3],
    default_max_tokens=64,
    weight_bytes=1234,
)
LIMITS = wire.Limits(
    max_rows=8, max_waiting=32, num_pages=1024, page_tokens=16, step_tokens=2048, max_sequence_tokens=2048
)


@dataclass(frozen=True)
class Token:
    """One token in this tick; `values` makes it a spatial token."""

    token_id: int
    values: list[float] | None = None
    value_logprobs: list[float] | None = None
    logprob: wire.TokenLogprobs | None = None


@dataclass(frozen=True)
class Wait:
    """Say nothing for so many seconds."""

    seconds: float


@dataclass(frozen=True)
class End:
    """Finish the sequence."""

    reason: FinishReason = FinishReason.STOP
    code: ErrorCode | None = None
    message: str = ""
    with_last_token: bool = False


@dataclass(frozen=True)
class Skip:
    """Leave out token indexes (a gap), or with a negative count repeat them (duplicates)."""

    count: int


@dataclass(frozen=True)
class Reject:
    """Answer the Submit with `Rejected`."""

    code: ErrorCode
    message: str = "refused by the fake worker"
    param: str = ""
    retry_after_s: float = 0.0


@dataclass(frozen=True)
class Die:
    """Close the socket without a word, as a SIGKILL would."""


Action = Token | Wait | End | Skip | Reject | Die
Script = Callable[[wire.Submit], list[Action]]


@dataclass
class Sequence:
    """One sequence's remaining script."""

    submit: wire.Submit
    actions: list[Action]
    next_index: int = 0
    not_before_s: float = 0.0
    num_sent: int = 0
    is_scored: bool = False


def prompt_scores(submit: wire.Submit) -> list[wire.PromptLogprobs]:
    """What this worker gives the tokens of a prompt: −0.25 × (place % 8), rank place % 3 + 1; the ids above it as the likeliest.
    In two parts, as of two chunks."""
    num = submit.sampling.num_prompt_logprobs
    ids = wire.unpack_i32(submit.prompt).tolist()
    if num < 0 or len(ids) < 2:
        return []
    half = max(1, len(ids) // 2)
    parts = []
    for places in (range(1, half), range(half, len(ids))):
        if places:
            top = [(ids[place] + k) % VOCAB_SIZE for place in places for k in range(num)]
            parts.append(
                wire.PromptLogprobs(
                    submit.sequence_id,
                    places[0],
                    array("f", [-0.25 * (place % 8) for place in places]).tobytes(),
                    wire.pack_i32([place % 3 + 1 for place in places]),
                    wire.pack_i32(top),
                    array("f", [-0.5 * k for _ in places for k in range(num)]).tobytes(),
                )
            )
    return parts


@dataclass
class Peer:
    """One gateway."""

    identity: bytes
    sequences: dict[int, Sequence] = field(default_factory=dict)


class FakeWorker:
    """See the module's docstring. Every public attribute may be read from the test's thread."""

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        card: wire.ModelCard = CARD,
        limits: wire.Limits = LIMITS,
        tokenizer_json: bytes | None = None,
        chat_template: bytes = b"",
        step_s: float = 0.001,
        beat_s: float = 0.1,
        epoch: int = 1,
        hello_answer: Callable[[wire.Hello], list[bytes] | None] | None = None,
        curve_server: Callable[[zmq.Socket[bytes]], None] | None = None,
    ) -> None:
        self._folder = tempfile.mkdtemp(prefix="fw") if endpoint is None else None
        self.endpoint = endpoint or f"ipc://{self._folder}/w"
        self.card, self.limits = card, limits
        self.tokenizer_json = byte_tokenizer().to_str().encode() if tokenizer_json is None else tokenizer_json
        self.chat_template = chat_template
        self.step_s, self.beat_s, self.epoch = step_s, beat_s, epoch
        self.beat_metrics: dict[str, float] = {}
        self.beat_histograms: dict[str, list[float]] = {}
        self.drain_rate = 10.0
        self.draining = False
        self.submits: list[wire.Submit] = []
        self.payloads: list[list[bytes]] = []
        self.cancelled: list[int] = []
        self.hellos: list[wire.Hello] = []
        self.num_pings = 0
        self.drained = threading.Event()
        self.script: Script = lambda _: [*map(Token, text_ids("Hello, wörld 🎈!")), End()]
        self._hello_answer = hello_answer
        self._curve_server = curve_server
        self._peers: dict[bytes, Peer] = {}
        self._commands: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._frozen = False
        self._held = False
        self._stop = threading.Event()
        self._step = 0
        self._socket: zmq.Socket[bytes] | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._thread: threading.Thread | None = None
        self._new_submit = threading.Condition()
        # Rung when the thread has something to do besides frames and time: it sleeps otherwise.
        self._bell, self._bell_ear = socketpair()
        self._bell.setblocking(False)
        self._bell_ear.setblocking(False)

    # ------------------------------------------------------------ scripting

    def reply(
        self, text: str, reason: FinishReason = FinishReason.STOP, with_last_token: bool = False
    ) -> None:
        """Answer every later Submit with this text."""
        self.reply_tokens(text_ids(text), reason, with_last_token)

    def reply_tokens(
        self, ids: list[int], reason: FinishReason = FinishReason.STOP, with_last_token: bool = False
    ) -> None:
        """Answer every later Submit with these tokens, cut at its max_tokens as a worker does."""

        def script(submit: wire.Submit) -> list[Action]:
            if len(ids) > submit.max_tokens:
                return [
                    *map(Token, ids[: submit.max_tokens]),
                    End(FinishReason.LENGTH, with_last_token=with_last_token),
                ]
            return [*map(Token, ids), End(reason, with_last_token=with_last_token)]

        self.script = script

    def reply_objects(self, objects: list[tuple[float, ...]]) -> None:
        """Answer with points (x, y) or boxes (x, y, width, height); asked for log-probabilities, with −¼ and −½ as theirs."""
        card = self.card

        def script(submit: wire.Submit) -> list[Action]:
            actions: list[Action] = []
            scores = [-0.25, -0.5] if submit.sampling.num_logprobs >= 0 else None
            for found in objects:
                actions += [Token(card.coord_id, [value], scores) for value in found[:2]]
                if len(found) == 4:
                    actions.append(Token(card.size_id, [found[2], found[3]], scores))
            return [*actions, Token(card.eos_ids[0]), End()]

        self.script = script

    def reject(self, code: ErrorCode, **fields: object) -> None:
        """Answer every later Submit with `Rejected`."""
        self.script = lambda _: [msgspec.convert({"code": code, **fields}, Reject)]

    def wait_submits(self, count: int, timeout_s: float = 10.0) -> list[wire.Submit]:
        """Block until `count` Submits have arrived. Raises TimeoutError."""
        with self._new_submit:
            if not self._new_submit.wait_for(lambda: len(self.submits) >= count, timeout_s):
                raise TimeoutError(f"{len(self.submits)} of {count} submits arrived")
            return list(self.submits)

    def wait_cancelled(self, count: int, timeout_s: float = 10.0) -> list[int]:
        """Block until `count` cancels have arrived. Raises TimeoutError."""
        with self._new_submit:
            if not self._new_submit.wait_for(lambda: len(self.cancelled) >= count, timeout_s):
                raise TimeoutError(f"{len(self.cancelled)} of {count} cancels arrived")
            return list(self.cancelled)

    @property
    def num_active(self) -> int:
        """Sequences not finished and not cancelled."""
        return sum(len(peer.sequences) for peer in self._peers.values())

    # ------------------------------------------------------------ faults

    def die(self) -> None:
        """Close the socket without a word, as a SIGKILL would; returns once it is closed."""
        self._stop.set()
        self._ring()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def restart(self, epoch: int | None = None) -> None:
        """Bind again after `die`, under a new epoch."""
        self.epoch = self.epoch + 1 if epoch is None else epoch
        self._peers = {}
        self._frozen = self._held = False
        self.start()

    def freeze(self) -> None:
        """Stop beats and tokens; the socket stays open (SIGSTOP, or a stuck device)."""
        self._frozen = True

    def thaw(self) -> None:
        """Undo `freeze`."""
        self._frozen = False
        self._ring()

    def hold(self) -> None:
        """Stop tokens; beats go on."""
        self._held = True

    def release(self) -> None:
        """Undo `hold`."""
        self._held = False
        self._ring()

    def send_raw(self, frames: list[bytes]) -> None:
        """Send these frames to every gateway seen."""

        def send() -> None:
            for identity in list(self._peers):
                self._send(identity, frames)

        with self._lock:
            self._commands.append(send)
        self._ring()

    def _ring(self) -> None:
        with suppress(BlockingIOError):  # it has been rung often enough
            self._bell.send(b"!")

    # ------------------------------------------------------------ life

    def start(self) -> FakeWorker:
        """Bind and serve. Returns self."""
        self._stop.clear()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="fake-worker", daemon=True)
        self._thread.start()
        if not started.wait(10):
            raise TimeoutError("the fake worker did not bind")
        return self

    def stop(self) -> None:
        """End the thread and remove the socket's folder."""
        self.die()
        self._context.term()
        self._bell.close()
        self._bell_ear.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> FakeWorker:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # ------------------------------------------------------------ the thread

    def _run(self, started: threading.Event) -> None:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = 100_000
        if self._curve_server is not None:
            self._curve_server(socket)
        if self.endpoint.endswith(":0"):
            port = socket.bind_to_random_port(self.endpoint.removesuffix(":0"))
            self.endpoint = self.endpoint.removesuffix(":0") + f":{port}"
        else:
            if self.endpoint.startswith("ipc://"):
                path = self.endpoint.removeprefix("ipc://")
                if os.path.exists(path):
                    os.unlink(path)
            socket.bind(self.endpoint)
        self._socket = socket
        started.set()
        next_beat_s = next_tick_s = 0.0
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._bell_ear, zmq.POLLIN)
        try:
            while not self._stop.is_set():
                is_at_work = self.num_active and not (self._frozen or self._held)
                until_s = min(next_tick_s, next_beat_s) if is_at_work else next_beat_s
                ready = dict(poller.poll(max(0, ceil((until_s - time.monotonic()) * 1000))))
                if self._bell_ear.fileno() in ready:
                    self._bell_ear.recv(4096)
                if socket in ready:
                    for _ in range(1000):
                        if not socket.poll(0):
                            break
                        self._on_frames(socket.recv_multipart())
                with self._lock:
                    commands, self._commands = self._commands, []
                for command in commands:
                    command()
                now_s = time.monotonic()
                if now_s >= next_beat_s:
                    next_beat_s = now_s + self.beat_s
                    if not self._frozen:
                        self._send_beats()
                if now_s >= next_tick_s:
                    next_tick_s = now_s + self.step_s
                    if not (self._frozen or self._held):
                        self._tick(now_s)
        finally:
            socket.close(0)
            self._socket = None

    def _on_frames(self, frames: list[bytes]) -> None:
        identity, body, *payloads = frames
        message = wire.decode_from_gateway(body)
        peer = self._peers.get(identity)
        match message:
            case wire.Hello():
                self._peers.setdefault(identity, Peer(identity))
                self.hellos.append(message)
                self._answer_hello(identity, message)
            case wire.Submit():
                if peer is None or message.epoch != self.epoch:
                    return
                with self._new_submit:
                    self.submits.append(message)
                    self.payloads.append(payloads)
                    self._new_submit.notify_all()
                peer.sequences[message.sequence_id] = Sequence(message, list(self.script(message)))
            case wire.Cancel():
                with self._new_submit:
                    self.cancelled.extend(message.sequence_ids)
                    self._new_submit.notify_all()
                for sequence_id in message.sequence_ids:
                    if peer is not None and sequence_id in peer.sequences:
                        self._finish(peer, peer.sequences[sequence_id], FinishReason.CANCELLED)
            case wire.Ping():
                self.num_pings += 1
            case wire.Drain():
                self.drained.set()
            case wire.Trace():
                chunk = wire.encode(wire.TraceChunk(self.epoch, message.num_steps))
                self._send(identity, [chunk, b'{"traceEvents":[]}'])

    def _answer_hello(self, identity: bytes, hello: wire.Hello) -> None:
        if self._hello_answer is not None:
            frames = self._hello_answer(hello)
            if frames is not None:
                self._send(identity, frames)
            return
        if hello.schema_hash != wire.schema_hash() or hello.protocol_version != wire.PROTOCOL_VERSION:
            fatal = wire.Fatal(self.epoch, ErrorCode.VERSION_SKEW, "the fake worker speaks another version")
            self._send(identity, [wire.encode(fatal)])
            return
        self._send(identity, self.ready_frames())

    def ready_frames(self) -> list[bytes]:
        """A `Ready` and its payload frames."""
        ready = wire.Ready(
            wire.PROTOCOL_VERSION,
            wire.schema_hash(),
            self.epoch,
            self.card,
            self.limits,
            "fake",
            {"load": 0.0},
        )
        return [wire.encode(ready), self.tokenizer_json, self.chat_template]

    def _send_beats(self) -> None:
        for peer in self._peers.values():
            running = min(self.num_active, self.limits.max_rows)
            beat = wire.Beat(
                self.epoch,
                self._step,
                running,
                self.num_active - running,
                self.limits.num_pages,
                self.limits.num_pages,
                draining=self.draining,
                metrics=self.beat_metrics,
                histograms=self.beat_histograms,
                drain_rate=self.drain_rate,
            )
            self._send(peer.identity, [wire.encode(beat)])

    def _tick(self, now_s: float) -> None:
        self._step += 1
        for peer in list(self._peers.values()):
            ids: list[int] = []
            first: list[int] = []
            tokens: list[int] = []
            values: list[wire.TokenValues] = []
            logprobs: list[wire.TokenLogprobs] = []
            finishes: list[wire.Finish] = []
            scores: list[wire.PromptLogprobs] = []
            for sequence in list(peer.sequences.values()):
                if now_s < sequence.not_before_s:
                    continue
                if not sequence.is_scored:
                    sequence.is_scored = True
                    scores += prompt_scores(sequence.submit)
                said = self._advance(peer, sequence, now_s, finishes)
                if said is None:
                    continue
                sequence_id = sequence.submit.sequence_id
                ids.append(sequence_id)
                first.append(sequence.next_index)
                tokens.append(said.token_id)
                if said.values is not None:
                    own = said.value_logprobs or []
                    values.append(
                        wire.TokenValues(sequence_id, sequence.next_index, said.values, logprobs=own)
                    )
                if said.logprob is not None:
                    changed = {"sequence_id": sequence_id, "token_index": sequence.next_index}
                    logprobs.append(msgspec.structs.replace(said.logprob, **changed))
                sequence.next_index += 1
                sequence.num_sent += 1
                if (
                    sequence.actions
                    and isinstance(sequence.actions[0], End)
                    and sequence.actions[0].with_last_token
                ):
                    self._end(peer, sequence, sequence.actions[0], finishes)
            if ids or finishes or scores:
                packed = wire.pack_i64(ids), wire.pack_i32(first), wire.pack_i32(tokens)
                outputs = wire.StepOutputs(
                    self.epoch, self._step, *packed, finishes, values, logprobs, scores
                )
                self._send(peer.identity, [wire.encode(outputs)])

    def _advance(
        self, peer: Peer, sequence: Sequence, now_s: float, finishes: list[wire.Finish]
    ) -> Token | None:
        """Run the script up to its next token, or its end."""
        while sequence.actions:
            match action := sequence.actions.pop(0):
                case Token():
                    return action
                case Wait():
                    sequence.not_before_s = now_s + action.seconds
                    return None
                case Skip():
                    sequence.next_index += action.count
                case End():
                    self._end(peer, sequence, action, finishes)
                    return None
                case Reject():
                    submit = sequence.submit
                    del peer.sequences[submit.sequence_id]
                    rejected = wire.Rejected(
                        self.epoch,
                        submit.sequence_id,
                        action.code,
                        action.message,
                        action.param,
                        action.retry_after_s,
                    )
                    self._send(peer.identity, [wire.encode(rejected)])
                    return None
                case Die():
                    self._stop.set()
                    return None
        return None

    def _end(self, peer: Peer, sequence: Sequence, end: End, finishes: list[wire.Finish]) -> None:
        submit = sequence.submit
        peer.sequences.pop(submit.sequence_id, None)
        num_prompt = len(submit.prompt) // 4
        num_prompt += sum(num for image in submit.images for _, num in image.runs)
        finishes.append(
            wire.Finish(
                submit.sequence_id,
                end.reason,
                num_prompt,
                sequence.num_sent,
                code=end.code,
                message=end.message,
                timing=wire.Timing(0.001, 0.002, 0.003),
            )
        )

    def _finish(self, peer: Peer, sequence: Sequence, reason: FinishReason) -> None:
        finishes: list[wire.Finish] = []
        self._end(peer, sequence, End(reason), finishes)
        outputs = wire.StepOutputs(self.epoch, self._step, b"", b"", b"", finishes)
        self._send(peer.identity, [wire.encode(outputs)])

    def _send(self, identity: bytes, frames: list[bytes]) -> None:
        if self._socket is not None:
            self._socket.send_multipart([identity, *frames])
