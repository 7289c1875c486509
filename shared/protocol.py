"""Owns every gateway⇄worker message, the protocol's version and its codec. Imported by every process.

Fields are appended with defaults, never reordered or removed. On the wire a message is `[message, payload, payload, …]`:
pixels and tokenizer files ride as raw frames behind it, in the order it names them. Integers of rows are packed
little-endian (`pack_i32`, `pack_i64`).
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from typing import Final

import msgspec

from shared.errors import ErrorCode, FinishReason
from shared.image_spec import ClipLayout as ClipLayout
from shared.image_spec import ClipSize as ClipSize
from shared.image_spec import ClipSpec as ClipSpec
from shared.image_spec import EdgeTiles as EdgeTiles
from shared.image_spec import FreeSize as FreeSize
from shared.image_spec import FreeTiles as FreeTiles
from shared.image_spec import ImageInput as ImageInput
from shared.image_spec import ImageLayout as ImageLayout
from shared.image_spec import ImageSpec as ImageSpec
from shared.image_spec import OneCrop as OneCrop
from shared.image_spec import OverlappingTiles as OverlappingTiles
from shared.image_spec import PanAndScan as PanAndScan
from shared.image_spec import PicturePart, Rule
from shared.image_spec import RatioTiles as RatioTiles
from shared.image_spec import Sheet as Sheet
from shared.message_parts import ELEMENT_BYTES as ELEMENT_BYTES
from shared.message_parts import FeatureFormat as FeatureFormat
from shared.message_parts import Finish as Finish
from shared.message_parts import Grammar as Grammar
from shared.message_parts import Limits as Limits
from shared.message_parts import ModelCard as ModelCard
from shared.message_parts import PageFormat as PageFormat
from shared.message_parts import Part as Part
from shared.message_parts import PrefillAt as PrefillAt
from shared.message_parts import PromptLogprobs as PromptLogprobs
from shared.message_parts import PromptValue as PromptValue
from shared.message_parts import Sampling as Sampling
from shared.message_parts import ThinkingBudget as ThinkingBudget
from shared.message_parts import Timing as Timing
from shared.message_parts import TokenLogprobs as TokenLogprobs
from shared.message_parts import TokenValues as TokenValues

PROTOCOL_VERSION: Final = 4

if sys.byteorder != "little":  # pragma: no cover - no such machine runs torch today
    raise ImportError("the wire format is little-endian and packs arrays in native order")


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Parent of every top-level message: tagged by its class name."""


# ---------------------------------------------------------------- gateway → worker


class Hello(Message, frozen=True):
    """First message on a connection, resent until `Ready` arrives. The worker answers `Ready` or `Fatal`."""

    protocol_version: int
    schema_hash: str
    gateway_id: str
    lease_s: float = 5.0


class Submit(Message, frozen=True):
    """Ask for one sequence. Answered by `StepOutputs` rows ending in a `Finish`, or by one `Rejected`."""

    epoch: int
    sequence_id: int
    request_id: str
    prompt: bytes  # packed int32 token ids, without the pictures' positions
    max_tokens: int
    sampling: Sampling = Sampling()
    images: list[ImageInput] = []
    stop_ids: list[int] = []
    task: str = "text"  # text | detect | point | reason | segment
    max_objects: int = 0
    tenant: str = ""
    priority: int = 0  # lower runs first
    deadline_s: float = 0.0  # from receipt; 0: none
    grammar: Grammar | None = None
    ignore_eos: bool = False  # benchmarks: run to max_tokens whatever the model says
    thinking: ThinkingBudget | None = None
    values: list[PromptValue] = []  # of the prompt's coordinate and size ids
    # Pictures, by their places in `images`, that come encoded: one frame (positions, columns) each in place of its sheets.
    encoded: list[int] = []
    encoded_as: FeatureFormat | None = None
    prefill_at: PrefillAt | None = None  # None: the worker computes the prompt itself


class Encode(Message, frozen=True):
    """Ask a worker with the role `encode` for one picture's features; its sheets follow. Answered by one `Features`."""

    epoch: int
    job_id: int  # unlike every `sequence_id` of the same gateway; `Cancel` takes it
    image: ImageInput
    tenant: str = ""  # features are kept by tenant


class Prefill(Message, frozen=True):
    """One worker asks another, with the role `prefill`, for pages of a prompt of its tenant: `Pages` come, then the `Finish`
    of this sequence in a `StepOutputs`, or one `Rejected`. `Cancel` takes its `job_id`."""

    epoch: int
    job_id: int
    prompt: bytes  # packed int32 token ids: whole pages of them
    first_page: int = 0  # pages before it are not wanted
    tenant: str = ""
    priority: int = 0
    deadline_s: float = 0.0  # from receipt; 0: none


class Cancel(Message, frozen=True):
    """Stop these sequences. Unknown ids are ignored: the finish may have crossed this message on the wire."""

    epoch: int
    sequence_ids: list[int]


class Ping(Message, frozen=True):
    """The gateway's heartbeat: extends its lease."""

    epoch: int
    sent_s: float = 0.0


class Drain(Message, frozen=True):
    """Refuse new sequences, finish running ones within `deadline_s`, then exit zero."""

    deadline_s: float = 30.0


class Trace(Message, frozen=True):
    """Record the next `num_steps` steps; the worker answers with `TraceChunk`."""

    num_steps: int = 200


# ---------------------------------------------------------------- worker → gateway


class Ready(Message, frozen=True):
    """Answer to `Hello`. Two payload frames follow: tokenizer.json and the chat template (either may be empty)."""

    protocol_version: int
    schema_hash: str
    epoch: int
    model: ModelCard
    limits: Limits
    device: str
    startup_s: dict[str, float] = {}
    role: str = "all"  # all | encode | decode | prefill
    features: FeatureFormat | None = (
        None  # what a worker gives (encode) or takes (decode) of encoded pictures; None: neither
    )
    pages: PageFormat | None = None  # the pages that it gives (prefill) or takes (decode); None: neither


class StepOutputs(Message, frozen=True):
    """Everything one step produced for one gateway: one token per row, and the sequences that ended.

    `sequence_ids` is packed int64; `first_index` and `token_ids` packed int32, all of equal length.
    `first_index[i]` is the index of the row's token among the sequence's generated tokens, from 0: a
    gap or a repeat is therefore seen.
    """

    epoch: int
    step: int
    sequence_ids: bytes
    first_index: bytes
    token_ids: bytes
    finishes: list[Finish] = []
    values: list[TokenValues] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[PromptLogprobs] = []  # of prompts, before their first token


class Rejected(Message, frozen=True):
    """A `Submit` that never became a sequence. Terminal."""

    epoch: int
    sequence_id: int
    code: ErrorCode
    message: str
    param: str = ""
    retry_after_s: float = 0.0


class Features(Message, frozen=True):
    """Answer to `Encode`: one payload frame with (positions, columns) of the picture, row-major; none beside a `code`."""

    epoch: int
    job_id: int
    format: FeatureFormat | None = None
    code: ErrorCode | None = None
    message: str = ""


class Pages(Message, frozen=True):
    """Consecutive pages of a prompt, for whoever sent a `Prefill`: one payload frame, `page_bytes` a page, in order."""

    epoch: int
    job_id: int
    first: int  # number of the first of them among the prompt's pages
    keys: bytes  # of each page the 16 bytes that stand for its tenant and all tokens up to its end
    checksum: int  # CRC-32 of the frame


class Fatal(Message, frozen=True):
    """The worker ends, or refuses this gateway. Every sequence in flight is lost."""

    epoch: int
    code: ErrorCode
    message: str


class Beat(Message, frozen=True):
    """Progress heartbeat, sent by the decode thread itself: a loop that hangs falls silent.

    `metrics` holds cumulative counters and gauges by name without prefix (`worker.loop.metrics` lists them);
    `histograms` cumulative bucket counts in the order of `HISTOGRAM_BUCKETS_S`, then the sum.
    """

    epoch: int
    step: int
    num_running: int
    num_waiting: int
    free_pages: int
    total_pages: int
    draining: bool = False
    metrics: dict[str, float] = {}
    histograms: dict[str, list[float]] = {}
    drain_rate: float = 0.0  # sequences finished per second, over the last seconds
    expected_s: float = (
        0.0  # how long the loop may now be silent because its steps are slow, without being hung
    )
    num_gateways: int = 1  # connected gateways that have sent requests: they share the places


class TraceChunk(Message, frozen=True):
    """Chrome-trace events of a recording as one JSON payload frame behind this message."""

    epoch: int
    num_steps: int


FromGateway = Hello | Submit | Encode | Prefill | Cancel | Ping | Drain | Trace
FromWorker = Ready | StepOutputs | Rejected | Features | Pages | Fatal | Beat | TraceChunk

HISTOGRAM_BUCKETS_S: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip

MAX_MESSAGE_BYTES: Final = 4 << 20
MAX_TEMPLATE_CHARS: Final = 256 << 10  # of all chat templates of a model together
MAX_PAYLOAD_BYTES: Final = 64 << 20

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
"""Encode one message to msgpack bytes."""

NO_MESSAGE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises for bytes that are no message: also for text that is no UTF-8, and for what is nested too deeply."""

decode_from_gateway = msgspec.msgpack.Decoder(FromGateway).decode
"""Decode a gateway's message. Raises one of `NO_MESSAGE`."""

decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
"""Decode a worker's message. Raises one of `NO_MESSAGE`."""


def schema_hash() -> str:
    """A hash over every message's name, field names, order and types: equal only for wire-equal programs."""
    lines = [f"{code.name}={code.value}" for enum in (ErrorCode, FinishReason) for code in enum]
    for parent in (Message, Part, PicturePart, Rule):
        for cls in sorted(parent.__subclasses__(), key=lambda cls: cls.__name__):
            fields = (f"{name}:{cls.__annotations__[name]}" for name in cls.__struct_fields__)
            lines.append(f"{parent.__name__}.{cls.__name__}({','.join(fields)})")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def pack_i32(values: list[int]) -> bytes:
    """Pack integers as little-endian int32. Raises OverflowError outside int32."""
    return array("i", values).tobytes()


def unpack_i32(data: bytes) -> array[int]:
    """Unpack little-endian int32. Raises ValueError when the length is not a multiple of 4."""
    values = array("i")
    values.frombytes(data)
    return values


def pack_i64(values: list[int]) -> bytes:
    """Pack integers as little-endian int64. Raises OverflowError outside int64."""
    return array("q", values).tobytes()


def unpack_i64(data: bytes) -> array[int]:
    """Unpack little-endian int64. Raises ValueError when the length is not a multiple of 8."""
    values = array("q")
    values.frombytes(data)
    return values
