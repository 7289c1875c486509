"""Captured prefill chunks, with interpreted kernels on a device that records and replays as a GPU does: graph = eager =
sequential, token for token (I8), over poisoned KV memory and poisoned graph memory."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch

from loadtest.gpu.random_models import random_model
from shared.errors import FinishReason
from shared.protocol import Sampling, Submit, pack_i32
from tests.unit.worker.loop.simulation import EPOCH, Stream
from tests.unit.worker.step.graph_device import GraphDevice
from tests.unit.worker.step.test_captured_steps import agree
from tests.unit.worker.step.test_torch_runner import Harness, picture
from worker.device.cpu import CpuDevice
from worker.forward import SPAN_TOKENS, chunk_spans
from worker.models import words
from worker.models.moondream import Moondream
from worker.schedule.plan import Chunk, StepPlan
from worker.schedule.sequence import Sequence
from worker.step import chunk_graphs, graph_table
from worker.step.chunk_graphs import ChunkGraphs, bucket_of, chunk_buckets, span_capacity
from worker.step.contract import GraphCounts
from worker.step.decode_graphs import Flavour
from worker.step.graph_table import EAGER_RUNS_BEFORE_CAPTURE, GraphTable
from worker.step.slot import Slot
from worker.step.staging import StepShape, Views, num_spans, stage_chunk_padding, stage_chunks, used_words
from worker.step.warm_up import _tasks

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of rows of padding

NAN = float("nan")
NAN_WORD = 299
Submits = list[tuple[Submit, list[bytes]]]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Moondream:
    # Made without the compiled CPU operations, which no recording of torch's would show.
    monkeypatch.setattr("worker.native.library.load", lambda: None)
    monkeypatch.setattr(
        "worker.step.chunk_graphs.LAUNCHED_BYTES", 0
    )  # interpreted kernels are slow over long prompts
    made = random_model("tiny-moondream", torch.device("cpu"), torch.float32).model
    assert isinstance(made, Moondream)
    made.card = msgspec.structs.replace(made.card, context_tokens=64)  # captured attention spans all of it
    assert isinstance(made._words, words.Table)
    made._words.tensor[NAN_WORD] = NAN
    return made


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets of few tokens, for the interpreter takes tens of milliseconds a token; captured where first met."""
    monkeypatch.setattr(chunk_graphs, "SMALL_BUCKETS", (8, 16))
    monkeypatch.setattr(chunk_graphs, "PREFIX_STEP", 4)
    monkeypatch.setattr(chunk_graphs, "MOST_CHUNKS", 3)
    monkeypatch.setattr(graph_table, "EAGER_RUNS_BEFORE_CAPTURE", 0)


def say(number: int, prompt: list[int], max_tokens: int = 2) -> tuple[Submit, list[bytes]]:
    """A text request; every other one draws its tokens."""
    sampling = Sampling(temperature=0.8 * (number % 2), top_p=0.9, seed=number)
    return Submit(EPOCH, number, str(number), pack_i32(prompt), max_tokens, sampling, ignore_eos=True), []


def show(number: int, words: list[int], model: Moondream) -> tuple[Submit, list[bytes]]:
    """A request over a picture."""
    submit, _ = say(number, [0, *words])
    image, frames = picture(0, model)
    return msgspec.structs.replace(submit, images=[image]), frames


def mixture(model: Moondream) -> list[Submits]:
    """Requests in waves; those after the first find decode rows, cached prefixes, or both."""
    long = [20 + 3 * i for i in range(33)]
    return [
        [say(0, [5, 6, 7, 8], 16), say(1, [9] * 3, 1), say(2, [11] * 5, 1), say(3, [12, 1], 1)],
        [say(4, [13, 14, NAN_WORD]), say(5, [15, 16]), say(6, long[10:21])],  # one of them not finite
        [say(7, long)],  # in chunks, with context
        [show(8, [17, 18], model)],  # a picture's prefix, then two words
        [say(9, [*long[:18], 4]), show(10, [19], model)],  # behind cached pages
    ]


def run(
    model: Moondream, waves: list[Submits], device: GraphDevice, *, depth: int
) -> tuple[Harness, list[Stream]]:
    """Each wave joins when the one before has begun to answer."""
    harness = Harness(model, depth=depth, max_rows=4, num_pages=40, device=device, mixed_tokens=17)
    for memory in (*harness.runner.cache.keys, *harness.runner.cache.values):
        memory.fill_(NAN)
    streams: list[Stream] = []
    for wave in waves:
        streams += harness.begin(wave)
        while not all(stream.tokens or stream.finish for stream in streams):
            harness.engine.tick()
    while harness.engine.tick():
        pass
    return harness, streams


def alone(model: Moondream, waves: list[Submits]) -> list[Stream]:
    """Each request by itself, eagerly, without kernels."""
    assert not model.fuses
    return [
        Harness(model, depth=1, max_rows=1, cache=False, late=False).answer([submit])[0]
        for wave in waves
        for submit in wave
    ]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """What became of every step's chunks: their tokens, how many they were, their bucket."""
    seen: list[tuple[int, int, int]] = []
    pad = ChunkGraphs.pad

    def watched(self: ChunkGraphs, slot: Slot, chunks: list[Chunk]) -> int:
        bucket = pad(self, slot, chunks)
        seen.append((sum(chunk.num_tokens for chunk in chunks), len(chunks), bucket))
        return bucket

    monkeypatch.setattr(ChunkGraphs, "pad", watched)
    return seen


@pytest.mark.slow
@pytest.mark.usefixtures("small_buckets")
def test_captured_equals_eager_equals_sequential(
    model: Moondream, served: list[tuple[int, int, int]]
) -> None:
    """Several chunks a step, more than a graph takes, chunks with context, beside decode rows and behind cached pages,
    pictures, a row that is not finite (I10)."""
    waves = mixture(model)
    expected = alone(model, waves)
    assert [s.submit.sequence_id for s in expected if s.finish and s.finish.reason is FinishReason.ERROR] == [
        4
    ]
    model.looks, model.fuses = False, True
    for depth, device in ((2, GraphDevice()), (1, GraphDevice(refuses=lambda number: True))):
        served.clear()
        harness, found = run(model, waves, device, depth=depth)
        agree(found, expected)
        assert served[0] == (14, 4, 0), "more chunks than a graph takes"
        assert served[1] == (16, 3, 16), "as many as it takes, up to its edge"
        assert {bucket for _, _, bucket in served[1:]} == {8, 16, 28}, (
            "all others by a graph, the picture too"
        )
        counts = harness.runner.graph_counts
        if depth == 2:
            assert set(counts.captures_total) == {"late"} and set(counts.eager_steps_total) == {"vision"}
        else:
            assert set(counts.captures_total) == {"failed"}
            assert counts.eager_steps_total["chunk"] == len(served) - 1


@pytest.mark.slow
@pytest.mark.usefixtures("small_buckets")
def test_a_graph_captured_at_start_serves_the_first_prompt(model: Moondream) -> None:
    expected = alone(model, [[say(0, [5, 6, 7], 1)]])
    model.looks, model.fuses = False, True
    harness = Harness(model, depth=1, max_rows=1, num_pages=10, device=GraphDevice())
    runner = harness.runner
    assert all(runner.capture_chunk_graph(slot.number, 8) for slot in runner.slots)
    for memory in (*runner.cache.keys, *runner.cache.values):
        assert not memory[1:].any(), "padding writes to page 0"
        memory.fill_(NAN)
    agree(harness.answer([say(0, [5, 6, 7], 1)]), expected)
    for memory in (*runner.cache.keys, *runner.cache.values):
        assert memory[0, 0].isfinite().all(), "what padding wrote last, over poisoned hidden states"
        assert memory[0, 1:].isnan().all()
        assert int(memory[1:].isfinite().all(-1).all(-1).sum()) == 3
    assert runner.graph_counts.captures_total == {"startup": 2}
    assert runner.graph_counts.eager_steps_total == {}


@pytest.mark.usefixtures("small_buckets")
def test_a_model_that_leaves_the_kernels_leaves_the_graphs(model: Moondream) -> None:
    """Plain attention decides on the host what each chunk sees: it must not be handed spans alone."""

    def harness() -> Harness:
        return Harness(model, depth=1, max_rows=2, num_pages=10, device=GraphDevice())

    assert harness().runner.chunk_graphs is None
    model.looks, model.fuses = False, True
    made = harness()
    model.fuses = False
    (stream,) = made.answer([say(0, [5, 6, 7])])
    assert len(stream.tokens) == 2
    assert "chunk" not in made.runner.graph_counts.eager_steps_total


@pytest.mark.usefixtures("small_buckets")
def test_start_up_captures_text_steps_first_then_chunks(model: Moondream) -> None:
    model.fuses = True
    harness = Harness(model, depth=1, max_rows=2, num_pages=10, device=GraphDevice())
    names = [name for name, _ in _tasks(harness.runner) if "graph" in name]
    kinds = [
        "chunk" if n.startswith("chunk") else "vision" if n.startswith("vision") else "decode" for n in names
    ]
    assert harness.runner.graphs is not None and harness.runner.graphs.buckets == [1, 2]
    num_text, num_chunks = 2 * 2, 2 * len(harness.runner.chunk_graphs.buckets)  # type: ignore[union-attr]
    assert kinds[:num_text] == ["decode"] * num_text
    assert all(f"{Flavour.TEXT!r}" in name for name in names[:num_text])
    assert kinds[num_text : num_text + num_chunks] == ["chunk"] * num_chunks
    assert kinds.count("decode") == 3 * num_text and kinds[-1] == "vision"


class Table(GraphTable[str]):
    """A table whose body notes that it ran."""

    def __init__(self, refuses: Callable[[int], bool] | None = None) -> None:
        self.device = GraphDevice(refuses=refuses)
        self.ran: list[str] = []
        super().__init__(self.device, self._note, lambda what: what, GraphCounts())

    def _note(self, slot: Slot, bucket: int, what: str) -> None:
        self.ran.append(what)


@pytest.fixture
def slot() -> Slot:
    return Slot(0, SHAPE, CpuDevice())


def test_what_is_met_often_is_captured_without_running_twice(slot: Slot) -> None:
    table = Table()
    for _ in range(EAGER_RUNS_BEFORE_CAPTURE):
        table.run(slot, 8, "a")
    table.run(slot, 8, "b")
    assert not table.device.graphs
    table.run(slot, 8, "a")
    table.run(slot, 8, "a")
    assert len(table.device.graphs) == 1 and table.device.num_warm_ups == 0
    assert len(table.device.replayed) == 2, "by replays alone"
    assert table.ran == [*"aaaab", "a"], "recorded once"
    assert table.counts.eager_steps_total == {"a": 4, "b": 1}
    assert table.counts.captures_total == {"late": 1}
    table.enabled = False
    table.run(slot, 8, "a")
    assert len(table.device.replayed) == 2


def test_what_the_device_refused_is_not_tried_again(slot: Slot) -> None:
    table = Table(lambda number: number == 1)
    assert not table.capture(slot, 8, "a")
    for _ in range(3 * EAGER_RUNS_BEFORE_CAPTURE):
        table.run(slot, 8, "a")
    assert table.counts.captures_total == {"failed": 1} and not table.device.graphs
    assert table.counts.eager_steps_total == {"a": 3 * EAGER_RUNS_BEFORE_CAPTURE}


def test_buckets_are_tight_where_prompts_are_short_and_where_a_picture_ends() -> None:
    large, medium = 10**10, 3 * 10**9
    assert chunk_buckets(4096, 0, large) == [16, 32, 64, 96, 128, 192, 256]
    assert chunk_buckets(4096, 0, medium)[7:] == [288, 320, 352, 384, 416]
    assert chunk_buckets(4096, 0, 1)[15:] == [576, 640, 704, 768, 864, 960, 1056]
    assert chunk_buckets(300, 0, 1)[-1] == 288
    assert chunk_buckets(4096, 730, large)[-3:] == [736, 768, 800]
    assert chunk_buckets(750, 730, large)[-2:] == [256, 736]
    assert chunk_buckets(100, 26, 1) == [16, 32, 64, 96]
    assert chunk_buckets(10, 26, 1) == []


def test_padding_pays_or_is_left_out() -> None:
    buckets = chunk_buckets(4096, 730, 10**10)
    assert [bucket_of(n, buckets) for n in (1, 16, 17, 33, 130, 256)] == [16, 16, 32, 64, 192, 256]
    assert [bucket_of(n, buckets) for n in (257, 600, 654, 655, 730, 737, 800, 801)] == [
        0, 0, 0, 736, 736, 768, 800, 0,
    ]  # fmt: skip
    assert bucket_of(5, []) == 0
    for num in range(257, 900):
        bucket = bucket_of(num, buckets)
        assert not bucket or num <= bucket <= num * 9 / 8
    buckets = chunk_buckets(4096, 0, 1)
    assert all(bucket_of(num, buckets) for num in range(1, 1057))


def test_spans_of_a_graph_hold_sixteen_chunks_however_they_fall() -> None:
    rng = random.Random(1)
    for bucket in chunk_buckets(4096, 730, 1):
        for _ in range(200):
            num = rng.randint(1, min(16, bucket))
            cuts = sorted(rng.sample(range(1, bucket), num - 1))
            sizes = [b - a for a, b in zip([0, *cuts], [*cuts, bucket], strict=True)]
            assert num_spans([chunk_of(size) for size in sizes]) <= span_capacity(bucket)
    assert span_capacity(16) == 16 and span_capacity(768) == 12 + 16


SHAPE = StepShape(
    max_rows=20, max_sequence_tokens=480, step_tokens=300, page_tokens=16, num_pages=600, vocab_size=97
)


def chunk_of(num_tokens: int, start: int = 0, page: int = 1) -> Chunk:
    tokens = list(range(3, 3 + start + num_tokens))
    seq = Sequence(b"g", 1, "r", tokens, len(tokens), 4, Sampling(), frozenset(), 0.0)
    seq.pages = list(range(page, page - (-len(tokens) // 16)))
    return Chunk(seq, start, num_tokens, True)


def test_spans_cover_each_token_once_and_the_longest_comes_first() -> None:
    for num in (1, SPAN_TOKENS, SPAN_TOKENS + 1, 5 * SPAN_TOKENS - 3):
        spans = chunk_spans(3, 10, num, 7, 5)
        assert len(spans) == num_spans([chunk_of(num)])
        covered = [(first + i, start + i) for first, n, start, _, _ in reversed(spans) for i in range(n)]
        assert covered == [(10 + i, 7 + i) for i in range(num)]
        assert all(span[1] <= SPAN_TOKENS and span[3:] == (5, 3) for span in spans)


def test_padding_of_chunks_writes_to_page_0_and_belongs_to_no_span() -> None:
    views = Views(np.full(SHAPE.num_words, -7, np.int32), SHAPE)
    chunks = [chunk_of(70, start=20), chunk_of(3, page=12)]
    samples = [chunk.seq for chunk in chunks]
    plan = StepPlan(1, [], [], chunks, samples, [0, 0], [], [], [])
    stage_chunks(views, plan, alone=True)
    stage_chunk_padding(views, chunks, 96, span_capacity(96))
    ids, positions, writes = views.chunks[:, :96]
    assert not views.chunks[:, 73:96].any() and (views.chunks[:, 96:] == -7).all()
    assert ids[:73].tolist() == [*range(23, 93), 3, 4, 5] and positions[70:73].tolist() == [0, 1, 2]
    assert writes[:70].tolist() == list(range(16 + 20, 16 + 90)) and writes[72] == 12 * 16 + 2
    assert views.spans[:3].tolist() == [[64, 6, 84, 0, 0], [0, 64, 20, 0, 0], [70, 3, 0, 0, 1]]
    assert not views.spans[3 : span_capacity(96)].any() and (views.spans[span_capacity(96) :] == -7).all()
    last_table = SHAPE.chunk_tables_start + SHAPE.max_pages + 1
    assert used_words(plan, SHAPE, 0) >= last_table, "spans and the last chunk's table are uploaded"
