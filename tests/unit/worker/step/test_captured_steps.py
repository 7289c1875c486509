"""Captured steps on a device that records and replays as a GPU does: graph = eager = sequential, token for token (I8)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loadtest.gpu.random_models import random_model
from shared.errors import ErrorCode
from shared.protocol import Sampling, Submit, pack_i32
from tests.two_sheets import image_crops
from tests.unit.worker.loop.simulation import EPOCH, GATEWAY, Stream
from tests.unit.worker.step.graph_device import GraphDevice, RecordedGraph
from tests.unit.worker.step.test_torch_runner import GOLDEN, Harness, load, mixture
from worker.device.choices import without
from worker.device.contract import CaptureBroken, Event
from worker.device.cpu import CpuDevice, CpuEvent, CpuStream
from worker.forward import ImageCrops
from worker.loop.inbox import Received
from worker.models.moondream import Moondream
from worker.schedule.plan import StepPlan, StepResult
from worker.step.chunk_graphs import ChunkGraphs
from worker.step.contract import DeviceTimes, GraphCounts
from worker.step.decode_graphs import Flavour, bucket_sizes
from worker.step.features import FeatureCache
from worker.step.graph_table import EAGER_RUNS_BEFORE_CAPTURE
from worker.step.picture_encoder import TorchEncoder, blank
from worker.step.slot import Slot
from worker.step.step_forward import StepForward
from worker.step.torch_runner import TorchRunner
from worker.step.vision_graphs import VisionGraphs, cut_pieces, piece_sizes
from worker.step.warm_up import warm_up

Submits = list[tuple[Submit, list[bytes]]]


@pytest.fixture(scope="module", autouse=True)
def torch_alone() -> Iterator[None]:
    """Models are made without the compiled CPU operations, which no recording of torch's would show."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.native.library.load", lambda: None)
        yield


@pytest.fixture(scope="module")
def model() -> Moondream:
    made = load(GOLDEN)
    assert isinstance(made, Moondream)
    made.card = msgspec.structs.replace(made.card, context_tokens=832)  # captured attention spans all of it
    made.looks = False  # as on a GPU
    return made


@pytest.fixture(scope="module")
def tiny() -> Moondream:
    torch.set_num_threads(1)
    with torch.inference_mode():
        made = random_model("tiny-moondream", torch.device("cpu"), torch.float32).model
    assert isinstance(made, Moondream)
    made.looks = False
    return made


def alone(model: Moondream, submits: Submits) -> list[Stream]:
    """Each by itself, eagerly, one step at a time."""
    return [
        Harness(model, depth=1, max_rows=1, cache=False, late=False).answer([submit])[0] for submit in submits
    ]


def agree(found: list[Stream], expected: list[Stream]) -> None:
    for one, other in zip(expected, found, strict=True):
        assert other.tokens == one.tokens, one.submit.task
        assert np.allclose(other.values, one.values)
        assert one.finish is not None and other.finish is not None
        assert other.finish.reason is one.finish.reason


def text(num: int, max_tokens: int, vocab: int, **sampling: Any) -> Submits:
    """Text rows of different lengths, half of them drawn."""
    made: Submits = []
    for number in range(num):
        prompt = [3 + (7 * number + i) % (vocab - 8) for i in range(1 + 9 * number)]
        settings = Sampling(temperature=0.8 * (number % 2), top_p=0.9, seed=number, **sampling)
        made.append(
            (Submit(EPOCH, number, str(number), pack_i32(prompt), max_tokens, settings, ignore_eos=True), [])
        )
    return made


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_captured_equals_sequential(model: Moondream, temperature: float) -> None:
    """Text, captions, points and boxes together; constraints on the device and by host masks; mixed steps."""
    submits = mixture(model, seed=3, temperature=temperature)
    expected = alone(model, submits)
    for depth, max_rows, automata in ((2, 6, temperature > 0), (3, 3, temperature == 0)):
        device = GraphDevice()
        harness = Harness(model, depth=depth, max_rows=max_rows, automata=automata, device=device)
        runner = harness.runner
        assert runner.graphs is not None
        assert runner.capture_graphs() == len(runner.graph_keys()) == len(device.graphs)
        with torch.inference_mode():
            assert runner.vision_graphs is not None and runner.vision_graphs.capture(1)
        agree(harness.answer(submits), expected)
        assert device.replayed
        runner.graph_counts.eager_steps_total.pop("vision", None)
        assert not runner.graphs.counts.eager_steps_total


@pytest.mark.slow
def test_what_start_up_left_out_is_captured_later_without_running_twice(model: Moondream) -> None:
    submits = mixture(model, seed=5, temperature=0.8)
    device = GraphDevice()
    harness = Harness(model, depth=2, max_rows=6, device=device)
    agree(harness.answer(submits), alone(model, submits))
    graphs = harness.runner.graphs
    assert graphs is not None
    assert set(graphs.counts.captures_total) == {"late"} and device.replayed
    assert device.num_warm_ups == 0
    assert sum(graphs.counts.eager_steps_total.values()) >= EAGER_RUNS_BEFORE_CAPTURE


@pytest.mark.slow
def test_a_refused_capture_costs_time_and_no_token(tiny: Moondream) -> None:
    submits = text(3, 12, 300, logit_bias={})
    device = GraphDevice(refuses=lambda number: number % 2 == 1)
    harness = Harness(tiny, depth=2, max_rows=4, device=device)
    graphs = harness.runner.graphs
    assert graphs is not None
    harness.runner.capture_graphs()
    assert graphs.counts.captures_total == {"failed": 9, "startup": 9}
    agree(harness.answer(submits), alone(tiny, submits))
    assert sum(graphs.counts.eager_steps_total.values()) > EAGER_RUNS_BEFORE_CAPTURE, "it is not tried again"
    assert graphs.counts.captures_total["failed"] == 9


@pytest.mark.slow
def test_a_prompt_that_finds_no_memory_ends_alone(tiny: Moondream, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator refuses one prompt's eager prefill; rows that decode in the same step go on by their graph."""
    submits = text(3, 12, 300)
    expected = alone(tiny, submits)
    harness = Harness(tiny, depth=2, max_rows=4, device=GraphDevice())
    runner = harness.runner
    runner.capture_graphs()
    prefill = runner.forward.prefill

    def refuse_once(slot: Slot, plan: StepPlan, graphs: ChunkGraphs | None, bucket: int) -> None:
        if plan.decode and any(chunk.seq.sequence_id == 99 for chunk in plan.chunks):
            raise torch.OutOfMemoryError("CUDA out of memory")
        prefill(slot, plan, graphs, bucket)

    monkeypatch.setattr(runner.forward, "prefill", refuse_once)
    large: tuple[Submit, list[bytes]] = (
        Submit(EPOCH, 99, "99", pack_i32([5] * 40), 9, Sampling(), ignore_eos=True),
        [],
    )
    streams = harness.begin(submits)
    while not all(stream.tokens for stream in streams):
        harness.engine.tick()
    shed = harness.answer([large])[0]
    agree(streams, expected)
    assert shed.finish is not None and shed.finish.code is ErrorCode.OUT_OF_MEMORY and not shed.tokens


@pytest.mark.slow
def test_a_text_batch_replays_graphs_without_the_region_model(tiny: Moondream) -> None:
    device = GraphDevice()
    harness = Harness(tiny, depth=2, max_rows=4, device=device)
    runner = harness.runner
    runner.capture_graphs()
    by_flavour = {
        flavour: graph for (_, _, flavour), graph in zip(runner.graph_keys(), device.graphs, strict=True)
    }
    keys = dict(zip(device.graphs, runner.graph_keys(), strict=True))
    assert by_flavour[Flavour.TEXT].num_operations < by_flavour[Flavour.FULL].num_operations - 10
    harness.answer(text(3, 6, 300))
    assert {keys[graph][2] for graph in device.replayed} == {Flavour.TEXT}
    device.replayed.clear()
    harness.answer(text(3, 6, 300, num_logprobs=2))
    assert {keys[graph][2] for graph in device.replayed} == {Flavour.GATED}


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [{"num_logprobs": 3}, {"frequency_penalty": 1.5}, {"min_tokens": 4}])
def test_gated_rows_get_what_they_get_alone(tiny: Moondream, sampling: dict[str, Any]) -> None:
    """Rows that need eager sampling beside rows that do not, joining while others decode."""
    other = Submit(EPOCH, 9, "9", pack_i32([5, 6, 7] * 20), 9, Sampling(**sampling), ignore_eos=True)
    submits = [*text(2, 14, 300), (other, [])]
    device = GraphDevice()
    harness = Harness(tiny, depth=2, max_rows=4, device=device, mixed_tokens=20)
    harness.runner.capture_graphs()
    agree(harness.answer(submits), alone(tiny, submits))


@pytest.mark.slow
def test_one_gated_row_leaves_the_others_in_their_graph(
    model: Moondream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row with log-probabilities beside text, points and boxes whose automata live on the device: text rows are
    sampled by the captured step, the gated row and the spatial ones behind it; nobody's tokens or states change."""
    submits = mixture(model, seed=7, temperature=0.8)[:4]
    first = submits[0][0]
    settings = msgspec.structs.replace(first.sampling, num_logprobs=2)
    submits[0] = (msgspec.structs.replace(first, sampling=settings), submits[0][1])
    expected = alone(model, submits)
    behind: list[tuple[int, int]] = []
    launch = TorchRunner.launch_sampling

    def watched(
        self: TorchRunner, slot_number: int, plan: StepPlan, picks: list[int], *, masked: bool
    ) -> None:
        slot = self.slots[slot_number]
        if slot.left_out and not plan.chunks:
            behind.append((len(slot.left_out), len(plan.decode)))
        launch(self, slot_number, plan, picks, masked=masked)

    monkeypatch.setattr(TorchRunner, "launch_sampling", watched)
    harness = Harness(model, depth=2, max_rows=6, device=GraphDevice())
    agree(harness.answer(submits), expected)
    assert any(num_behind < num_rows for num_behind, num_rows in behind), "text rows stayed in the graph"
    assert harness.runner.graph_counts.eager_steps_total.get("gated")


@pytest.mark.slow
def test_padding_writes_to_no_live_page(tiny: Moondream) -> None:
    device = GraphDevice()
    harness = Harness(tiny, depth=1, max_rows=4, device=device, cache=False)
    runner = harness.runner
    runner.capture_graphs()
    mark = 12345.0  # not NaN: the torch path multiplies what lies beyond a row's length by 0
    for memory in (*runner.cache.keys, *runner.cache.values):
        with torch.inference_mode():
            memory[1:] = mark
    harness.answer(text(3, 5, 300))  # three rows in a bucket of four
    lines = sum(len(prompt) // 4 + 5 - 1 for prompt in (s.prompt for s, _ in text(3, 5, 300)))
    for memory in (*runner.cache.keys, *runner.cache.values):
        written = (memory[1:].flatten(0, 1) != mark).all(-1).all(-1)
        assert int(written.sum()) == lines


class Counted(TorchDispatchMode):
    """Counts operations that are queued outside of replays."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def silent_replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Replays under which `Counted` is not told of anything: on a GPU each is one launch."""
    counted = [0]
    replay = RecordedGraph.replay

    def quiet(self: RecordedGraph) -> None:
        from torch.utils._python_dispatch import _disable_current_modes

        counted[0] += 1
        with _disable_current_modes():
            replay(self)

    monkeypatch.setattr(RecordedGraph, "replay", quiet)
    yield counted


@pytest.mark.slow
def test_an_unchanged_batch_is_one_upload_one_replay_one_download(
    tiny: Moondream, silent_replays: list[int]
) -> None:
    device = GraphDevice()
    harness = Harness(tiny, depth=2, max_rows=4, device=device)
    harness.runner.capture_graphs()
    events = device.num_events
    engine = harness.engine
    for submit, frames in text(3, 40, 300):
        harness.outbox.streams[GATEWAY, submit.sequence_id] = Stream(submit)
        harness.inbox.put(Received(GATEWAY, submit, frames))
    for _ in range(6):
        engine.tick()
    silent_replays[0] = 0
    steps = engine.metrics.steps_total
    counted = Counted()
    with counted:
        for _ in range(10):
            engine.tick()
    assert engine.metrics.steps_total - steps == silent_replays[0] == 10
    views = {"slice", "select", "view", "detach", "alias"}
    assert [name for name in counted.names if name not in views] == ["copy_"] * 20
    assert device.num_events == events, "events are made at start"


@pytest.mark.slow
def test_inputs_are_uploaded_beside_the_step_before_and_waited_for(
    tiny: Moondream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order on the streams: upload, its event, the compute stream waits, the replay. The same tokens either way."""
    told: list[str] = []

    class Uploads(CpuStream):
        def record(self, event: Event | None = None) -> CpuEvent:
            told.append("record")
            return super().record(event)

        @contextmanager
        def use(self) -> Iterator[None]:
            told.append("begin")
            yield
            told.append("end")

    class Compute(CpuStream):
        def wait(self, event: Event) -> None:
            told.append("wait")

    submits = text(1, 6, 300)
    expected = alone(tiny, submits)
    replay = RecordedGraph.replay

    def watched(self: RecordedGraph) -> None:
        told.append("replay")
        replay(self)

    monkeypatch.setattr(RecordedGraph, "replay", watched)
    for off in ([], ["upload_aside"]):
        device = GraphDevice()
        device.uploads, device.compute = Uploads(late=True), Compute(late=True)
        harness = Harness(tiny, depth=2, max_rows=1, device=device)
        for key in harness.runner.graph_keys():
            if key[2] is Flavour.TEXT:
                harness.runner.capture_graph(*key)
        told.clear()
        with without(*off):
            agree(harness.answer(submits), expected)
        steps = " ".join(told)
        assert steps.count("replay") >= 5
        assert steps.count("begin end record wait replay") == (0 if off else steps.count("replay"))


@pytest.mark.slow
def test_decode_rows_of_a_mixed_step_leave_before_its_chunks_end(
    tiny: Moondream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their outputs are on the host when the chunks begin, and their tokens are out when the loop waits for those."""
    submits = text(3, 12, 300)
    expected = alone(tiny, submits)
    harness = Harness(tiny, depth=2, max_rows=4, device=GraphDevice(), mixed_tokens=20)
    prefill, wait = StepForward.prefill, TorchRunner.wait
    mixed, sent = [], []

    def watched(
        self: StepForward, slot: Slot, plan: StepPlan, graphs: ChunkGraphs | None, bucket: int
    ) -> None:
        if plan.decode:
            num = len(plan.decode)
            mixed.append(slot.early_rows)
            if slot.early_rows:
                assert torch.equal(slot.host_outputs[:num], slot.outputs[:num])
        prefill(self, slot, plan, graphs, bucket)

    def waiting(self: TorchRunner, slot_number: int, plan: StepPlan) -> StepResult:
        if plan.chunks and plan.decode:
            for row, seq in enumerate(plan.decode):
                if seq.finish is None or seq.num_generated:
                    stream = harness.outbox.streams[GATEWAY, seq.sequence_id]
                    sent.append(self.slots[slot_number].host_outputs_np[row, 0] in stream.tokens)
        return wait(self, slot_number, plan)

    monkeypatch.setattr(StepForward, "prefill", watched)
    monkeypatch.setattr(TorchRunner, "wait", waiting)

    def staggered() -> list[Stream]:
        streams = harness.begin(submits[:2])
        while not all(stream.tokens for stream in streams):
            harness.engine.tick()
        return [*streams, *harness.answer(submits[2:])]

    agree(staggered(), expected)
    assert mixed and all(mixed) and sent and all(sent)
    with without("early_copy"):
        mixed.clear()
        monkeypatch.setattr(TorchRunner, "wait", wait)
        harness = Harness(tiny, depth=2, max_rows=4, device=GraphDevice(), mixed_tokens=20)
        agree(staggered(), expected)
        assert mixed and not any(mixed)


@pytest.mark.slow
def test_a_late_host_leaves_the_device_idle_not_busy(
    tiny: Moondream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host takes 7 s before it queues a step's upload and 5 s after; the step itself takes 1 s."""
    now = [0.0]
    monkeypatch.setattr("worker.device.cpu.time.perf_counter", lambda: now[0])
    upload, replay, times = Slot.upload, RecordedGraph.replay, TorchRunner.device_times

    def late(self: Slot, words: int | None = None) -> None:
        now[0] += 7
        upload(self, words)
        now[0] += 5

    def slow(self: RecordedGraph) -> None:
        now[0] += 1
        replay(self)

    seen = []

    def watched(self: TorchRunner, slot_number: int) -> DeviceTimes:
        seen.append(times(self, slot_number))
        return seen[-1]

    harness = Harness(tiny, depth=1, max_rows=1, device=GraphDevice())
    for key in harness.runner.graph_keys():
        if key[2] is Flavour.TEXT:
            harness.runner.capture_graph(*key)
    monkeypatch.setattr(Slot, "upload", late)
    monkeypatch.setattr(RecordedGraph, "replay", slow)
    monkeypatch.setattr(TorchRunner, "device_times", watched)
    harness.answer(text(1, 6, 300))
    assert [(t.busy_s, t.idle_s) for t in seen[1:]] == [(1.0, 12.0)] * 5


def test_vision_graphs_equal_the_encoder(tiny: Moondream) -> None:
    """Pictures of 1, 3 and 5 crops at once, cut into captured pieces and an eager rest."""
    generator = torch.Generator().manual_seed(1)
    side, window = 70, 70 - 28

    def picture(tiles_h: int, tiles_w: int) -> ImageCrops:
        height, width = tiles_h * window + 28, tiles_w * window + 28

        def pixels(*shape: int) -> torch.Tensor:
            return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator)

        return image_crops(pixels(side, side), pixels(height, width), tiles_h, tiles_w)

    pictures = [picture(1, 1), picture(1, 2), picture(2, 2)]
    with torch.inference_mode():
        expected = [tiny.encode_images([one])[0] for one in pictures]
        device = GraphDevice()
        counts = GraphCounts()
        graphs = VisionGraphs(device, tiny.vision, 6, counts)
        assert graphs.capture(4) and graphs.capture(2)
        found = tiny.encode_images(pictures, graphs.features)
        again = tiny.encode_images(pictures[::-1], graphs.features)[::-1]
    assert [graph.num_operations > 10 for graph in device.graphs] == [True, True]
    assert counts.eager_steps_total == {"vision": 2} and len(device.replayed) == 2 * 2
    for one, two, three in zip(found, again, expected, strict=True):
        torch.testing.assert_close(one, three)
        torch.testing.assert_close(two, three)


def test_an_encoder_by_graphs_gives_what_a_picture_is_encoded_to(tiny: Moondream) -> None:
    """The role encode where steps are captured: graphs at start, features copied out."""
    assert tiny.card.image is not None
    device = GraphDevice()
    encoder = TorchEncoder(tiny, device, weights="w", feature_bytes=0, step_crops=2)
    assert encoder.graph_counts.captures_total == {"startup": len(device.graphs)} and device.graphs
    shown = blank(tiny.card.image)
    shown.frames = [bytes(range(256)) * (len(frame) // 256 + 1) for frame in shown.frames]
    shown.frames = [
        frame[: sheet.height * sheet.width * 3]
        for frame, sheet in zip(shown.frames, shown.sheets, strict=True)
    ]
    data = encoder.encode("t", shown, lambda: None)
    assert device.replayed
    with torch.inference_mode():
        expected = tiny.encode_images([FeatureCache(tiny, 0, CpuDevice())._upload(shown, 0)])[0]
    found = torch.frombuffer(bytearray(data), dtype=expected.dtype).view(-1, encoder.format.columns)
    torch.testing.assert_close(found, expected)


def test_pieces_cover_every_number_of_crops() -> None:
    sizes = piece_sizes(13, 26)
    assert sizes == [26, *range(13, 0, -1)] and piece_sizes(13, 13) == list(range(13, 0, -1))
    for num in range(1, 80):
        assert sum(cut_pieces(num, sizes)) == num
        assert set(cut_pieces(num, sizes)) <= set(sizes), "no number of crops runs outside the graphs"
        assert sum(cut_pieces(num, [7, 2])) == num
    assert cut_pieces(40, sizes) == [26, 13, 1]
    assert cut_pieces(3, []) == [3]


@pytest.mark.parametrize("max_rows", [1, 3, 8, 32, 70, 128])
def test_buckets_hold_every_batch(max_rows: int) -> None:
    sizes = bucket_sizes(max_rows)
    assert sizes == sorted(set(sizes)) and sizes[-1] == max_rows


@pytest.fixture
def looking(tiny: Moondream) -> Iterator[Moondream]:
    """A model that makes the host wait in the region model: a recording of it breaks off midway."""
    tiny.looks = True
    yield tiny
    tiny.looks = False


def test_a_recording_that_breaks_off_at_start_up_is_fatal(looking: Moondream) -> None:
    """The recording device notices what CUDA would: here the region model's look at the batch."""
    device = GraphDevice()
    harness = Harness(looking, depth=1, max_rows=1, device=device)
    with pytest.raises(CaptureBroken, match="makes the host wait"):
        harness.runner.capture_graphs()
    assert device.capture_broke
    with pytest.raises(CaptureBroken):
        warm_up(harness.runner)


@pytest.mark.slow
def test_after_a_broken_late_recording_nothing_is_captured_any_more(looking: Moondream) -> None:
    """The batch goes on eagerly with the same tokens, and no further recording is begun."""
    submits = text(3, 20, 300, num_logprobs=1)  # gated steps look at the batch
    device = GraphDevice()
    harness = Harness(looking, depth=2, max_rows=4, device=device)
    looking.looks = False
    expected = alone(looking, submits)
    looking.looks = True
    agree(harness.answer(submits), expected)
    counts = harness.runner.graph_counts.captures_total
    assert device.capture_broke and counts["failed"] == 1
    begun = counts.get("late", 0)
    looking.looks = False  # from here on every recording would succeed
    agree(harness.answer(text(3, 20, 300)), alone(looking, text(3, 20, 300)))
    assert harness.runner.graph_counts.captures_total.get("late", 0) == begun


@pytest.mark.slow
def test_warm_up_leaves_no_trace_and_covers_what_serving_meets(tiny: Moondream) -> None:
    other = Submit(EPOCH, 9, "9", pack_i32([5, 6, 7] * 20), 9, Sampling(num_logprobs=2), ignore_eos=True)
    submits = [*text(3, 12, 300), (other, [])]
    device = GraphDevice()
    harness = Harness(tiny, depth=2, max_rows=2, device=device)
    seen: list[tuple[str, float, float]] = []
    assert warm_up(harness.runner, lambda *told: seen.append(told)) == 0
    assert [done for _, done, _ in seen] == list(range(1, len(seen) + 1)) and seen[-1][1] == seen[-1][2]
    agree(harness.answer(submits), alone(tiny, submits))
    counts = harness.runner.graph_counts
    assert counts.eager_steps_total == {} and set(counts.captures_total) == {"startup"}
    rows = harness.runner.rows
    assert rows.counts is not None and rows.bias is not None
    assert all(not memory[:-1].any() for memory in (rows.counts, rows.bias))


def test_warm_up_ends_when_its_time_is_up(tiny: Moondream) -> None:
    harness = Harness(tiny, depth=1, max_rows=1, device=GraphDevice())
    times = iter([0.0, 1.0, 2.0, 3.5, 4.0])
    seen: list[float] = []
    left = warm_up(
        harness.runner, lambda _, done, __: seen.append(done), budget_s=3.0, clock=lambda: next(times)
    )
    assert seen == [1, 2, 3] and left > 10
