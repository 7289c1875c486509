"""The real runner on the CPU, with the reference's small checkpoint and with the embedded model: depth, batch,
slots and caches change no token (I8)."""

from __future__ import annotations

import hashlib
import random
import time
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
import torch
from PIL import Image

from shared.protocol import FeatureFormat, ImageInput, OverlappingTiles, Sampling, Submit, pack_i32
from shared.tiling import canvas_for
from tests.two_sheets import image_input
from tests.unit.worker.loop.simulation import EPOCH, GATEWAY, RecordingOutbox, Stream, punctual_masks
from worker.device.contract import Device
from worker.device.cpu import CpuDevice
from worker.formats.open_source import open_source
from worker.loop.engine import Engine
from worker.loop.inbox import Inbox, Outbox, Prefills, Received
from worker.loop.page_export import PageExport
from worker.loop.page_intake import PageIntake
from worker.models.contract import Model
from worker.models.registry import load_model
from worker.schedule.automaton_places import AutomatonPlaces, TableLimits
from worker.schedule.limits import SchedulerLimits
from worker.schedule.pages import PagePool
from worker.schedule.prefix_cache import PrefixCache
from worker.schedule.scheduler import Scheduler
from worker.step.page_store import TorchPages
from worker.step.staging import StepShape
from worker.step.torch_runner import TorchRunner

GOLDEN = Path(__file__).parents[3] / "data" / "golden_moondream"


POCKET = Path(__file__).parents[4] / "worker" / "pocket" / "weights"


def load(folder: Path) -> Model:
    torch.set_num_threads(1)
    with torch.inference_mode():
        return load_model(open_source(folder), torch.device("cpu"), torch.float32, lambda *_: None)


@pytest.fixture(scope="module")
def model() -> Model:
    return load(GOLDEN)


@pytest.fixture(scope="module", params=[GOLDEN, POCKET], ids=["golden", "pocket"])
def either(request: pytest.FixtureRequest) -> Model:
    return load(request.param)


class Harness:
    """An engine over a TorchRunner whose events look late, so that it runs as deep as it may."""

    def __init__(
        self,
        model: Model,
        *,
        depth: int,
        max_rows: int = 4,
        num_pages: int = 600,
        cache: bool = True,
        late: bool = True,
        automata: bool = True,
        device: Device | None = None,
        mixed_tokens: int = 1600,
        format: FeatureFormat | None = None,
        prefills: Prefills | None = None,
        pages_to: Outbox | None = None,
    ) -> None:
        """`prefills`: where it asks for pages; `pages_to`: it has the role prefill, and this is all that hears of it."""
        pool = PagePool(num_pages, 16)
        self.scheduler = scheduler = Scheduler(
            SchedulerLimits(
                max_rows=max_rows,
                step_tokens=1600,
                mixed_tokens=mixed_tokens,
                max_sequence_tokens=model.card.context_tokens,
            ),
            pool,
            PrefixCache(pool) if cache else None,
            AutomatonPlaces(TableLimits()) if automata else None,
        )
        with torch.inference_mode():
            self.runner = TorchRunner(
                model,
                device or CpuDevice(events_look_late=late),
                StepShape(
                    max_rows=max_rows,
                    max_sequence_tokens=model.card.context_tokens,
                    step_tokens=1600,
                    page_tokens=16,
                    num_pages=num_pages,
                    vocab_size=model.card.vocab_size,
                    num_slots=max(2, depth),
                ),
                format=format,
            )
        self.store = TorchPages(model, self.runner.cache, self.runner.device, weights="w")
        intake: PageIntake | None = None
        if prefills is not None:
            assert scheduler.cache is not None
            intake = PageIntake(
                prefills,
                self.store,
                scheduler,
                scheduler.cache,
                time.perf_counter,
                wait_s=600.0,
                max_bytes=1 << 30,
            )
        self.inbox: Inbox = SimpleQueue()
        self.outbox = RecordingOutbox()
        self.engine = Engine(
            scheduler,
            self.runner,
            model.card,
            inbox=self.inbox,
            outbox=pages_to or self.outbox,
            clock=time.perf_counter,
            epoch=EPOCH,
            depth=depth,
            masks=punctual_masks(),
            format=format,
            intake=intake,
            export=PageExport(pages_to, self.store, EPOCH) if pages_to is not None else None,
        )

    def begin(self, submits: list[tuple[Submit, list[bytes]]]) -> list[Stream]:
        streams = []
        for submit, frames in submits:
            stream = Stream(submit)
            self.outbox.streams[GATEWAY, submit.sequence_id] = stream
            self.inbox.put(Received(GATEWAY, submit, frames))
            streams.append(stream)
        return streams

    def answer(self, submits: list[tuple[Submit, list[bytes]]]) -> list[Stream]:
        streams = self.begin(submits)
        while self.engine.tick() or not self.inbox.empty():
            pass
        assert not self.engine.scheduler.has_work
        assert all(stream.finish is not None for stream in streams), [s.rejected for s in streams]
        return streams


def picture(number: int, model: Model) -> tuple[ImageInput, list[bytes]]:
    spec = model.card.image
    assert spec is not None
    image = Image.open(GOLDEN / f"image{number}.png").convert("RGB")
    assert isinstance(spec.rule, OverlappingTiles)
    canvas_size = canvas_for(image.height, image.width, crop_size=spec.crop_size, rule=spec.rule)
    tiles_h, tiles_w, height, width = canvas_size
    whole = np.asarray(image.resize((spec.crop_size, spec.crop_size), Image.Resampling.LANCZOS)).tobytes()
    canvas = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)).tobytes()
    digest = hashlib.sha256(whole + canvas).digest()
    side, tiles = spec.crop_size, (tiles_h, tiles_w)
    return image_input(1, spec.crop_tokens, side, digest, tiles, (height, width)), [whole, canvas]


def mixture(model: Model, *, seed: int, temperature: float) -> list[tuple[Submit, list[bytes]]]:
    rng = random.Random(seed)
    submits = []
    templates = model.card.templates
    for sequence_id, task in enumerate(["text", "detect", "text", "point", "caption", "text"]):
        image, frames = picture(rng.choice([0, 1]), model)
        words = [rng.randrange(50, 300) for _ in range(rng.randint(1, 6))]
        if task == "caption":
            body, task = templates["caption_short"], "text"
        elif task == "text":
            body = templates["query_prefix"] + words + templates["query_suffix"]
        else:
            body = templates[f"{task}_prefix"] + words + templates[f"{task}_suffix"]
        submit = Submit(
            epoch=EPOCH,
            sequence_id=sequence_id,
            request_id=str(sequence_id),
            prompt=pack_i32([model.card.bos_id or 0, *body]),
            max_tokens=20,
            sampling=Sampling(temperature=temperature, top_p=0.9, seed=rng.randrange(1 << 60)),
            images=[image],
            task=task,
            max_objects=3,
        )
        submits.append((submit, frames))
    return submits


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_pipelined_batched_and_cached_output_equals_one_by_one(either: Model, temperature: float) -> None:
    model = either
    submits = mixture(model, seed=3, temperature=temperature)
    alone: list[Stream] = []
    for submit in submits:
        alone += Harness(model, depth=1, max_rows=1, cache=False, late=False).answer([submit])
    for depth, max_rows in ((1, 6), (2, 6), (2, 2), (3, 4)):
        together = Harness(model, depth=depth, max_rows=max_rows, automata=max_rows != 2).answer(submits)
        for one, other in zip(alone, together, strict=True):
            assert other.tokens == one.tokens, (depth, max_rows, one.submit.task)
            assert np.allclose(other.values, one.values)
            assert one.finish is not None and other.finish is not None
            assert other.finish.reason is one.finish.reason


@pytest.mark.slow
def test_golden_greedy_ids(model: Model) -> None:
    golden = np.load(GOLDEN / "golden.npz")
    image, frames = picture(0, model)
    prompt = [0, *golden["image0.query_tokens"].tolist()]
    submit = Submit(
        epoch=EPOCH,
        sequence_id=1,
        request_id="1",
        prompt=pack_i32(prompt),
        max_tokens=24,
        images=[image],
        ignore_eos=True,
    )
    (stream,) = Harness(model, depth=2).answer([(submit, frames)])
    assert stream.tokens == golden["image0.greedy_ids"].tolist()


@pytest.mark.slow
def test_penalties_bias_and_logprobs_count_tokens_in_flight(model: Model) -> None:
    base = Submit(
        epoch=EPOCH,
        sequence_id=0,
        request_id="0",
        prompt=pack_i32([0, 60, 61, 62]),
        max_tokens=16,
        ignore_eos=True,
    )

    def run(depth: int, **sampling: object) -> Stream:
        settings = Sampling(**sampling)  # type: ignore[arg-type]
        submit = Submit(EPOCH, 0, "0", base.prompt, base.max_tokens, settings, ignore_eos=True)
        return Harness(model, depth=depth).answer([(submit, [])])[0]

    plain = run(2)
    assert len(set(plain.tokens)) < 16, "the random model repeats itself, or this test shows nothing"
    for depth in (1, 2):
        spread = run(depth, frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=50.0)
        assert len(set(spread.tokens)) == 16
    assert run(1, repetition_penalty=1.3).tokens == run(2, repetition_penalty=1.3).tokens
    forced = run(2, logit_bias={77: 1e4})
    assert set(forced.tokens) == {77}
    banned = run(2, suppress_ids=plain.tokens[:1])
    assert plain.tokens[0] not in banned.tokens
