"""Owns what runs before a worker says that it is ready: every kernel once, then the graphs. Decode thread, at start.

Each kind of work that serving will meet runs over padding, which touches no live row or page. What does not fit into
the time is left out, and counted when it is met. docs/gpu.md ("Start-up") has the order and its reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import structlog
import torch

from shared.image_spec import FreeSize, ImageSpec, Sheet
from shared.pictures import LOAD_PIXELS, drawings, num_crops, num_loads
from worker.formats.source import ProgressReport
from worker.forward import ImageCrops, ImageSheet, PrefillSegment, StepTokens, chunk_spans
from worker.step.decode_graphs import Flavour
from worker.step.staging import stage_padding
from worker.step.step_sampler import Wants
from worker.step.torch_runner import TorchRunner

log = structlog.get_logger()

PHASE = "warm up"
PICTURES_S = 2.0  # of a CPU's start that pictures after the first may take
MOST_SIDES = 6  # crops along a side of the largest of them
Task = tuple[str, Callable[[], object]]


def warm_up(
    runner: TorchRunner,
    report: ProgressReport | None = None,
    *,
    budget_s: float = 120.0,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Run and capture what serving will need; returns how many tasks the time was too short for.

    Where nothing is captured, on a CPU, only pictures are: see `_pictures`. No task is begun after `budget_s`; a task that
    was begun is finished.
    """
    if runner.graphs is None:
        _pictures(runner, report, min(budget_s, PICTURES_S), clock)
        return 0
    tasks = _tasks(runner)
    started_s = clock()
    done = 0
    for done, (_, run) in enumerate(tasks, 1):
        run()
        if report is not None:
            report(PHASE, done, len(tasks))
        if clock() - started_s > budget_s:
            break
    runner.device.synchronize()
    left = len(tasks) - done
    if left:
        log.warning(
            "warm_up_cut_short", left=left, next=tasks[done][0], setting="warm_up_s", budget_s=budget_s
        )
    log.info(
        "warmed_up", tasks=done, seconds=round(clock() - started_s, 2), **runner.graph_counts.captures_total
    )
    return left


def _pictures(
    runner: TorchRunner, report: ProgressReport | None, budget_s: float, clock: Callable[[], float]
) -> None:
    """Pictures of one crop, then of more, as long as there is time: the first request's would else meet weights and memory
    that nothing has touched since they were made. A budget of 0 takes none."""
    spec = runner.model.card.image
    if spec is None or runner.model.encoder is None or not budget_s:
        return
    sizes = _picture_sizes(spec)
    started_s, of_load_s, done, loads = clock(), 0.0, 0, 0
    for done, (width, height) in enumerate(sizes, 1):
        sheets = [drawing.sheet for drawing in drawings(spec, width, height)]
        _encode(runner, sheets)
        loads += num_loads(spec, sheets)
        of_load_s = (clock() - started_s) / loads
        if report is not None:
            report(PHASE, done, len(sizes))
        if done < len(sizes):
            next_loads = num_loads(spec, [drawing.sheet for drawing in drawings(spec, *sizes[done])])
            if clock() - started_s + next_loads * of_load_s > budget_s:
                break
    if report is not None:
        report(PHASE, len(sizes), len(sizes))
    log.info("warmed_up", pictures=done, seconds=round(clock() - started_s, 3), crop_s=round(of_load_s, 4))


def _picture_sizes(spec: ImageSpec) -> list[tuple[int, int]]:
    """(width, height) of pictures with more and more crops, no two with as many; one picture where all have one."""
    side = spec.crop_size
    if isinstance(spec.rule, FreeSize):
        edge = int(LOAD_PIXELS**0.5)
        return [(edge, edge)]
    by_crops: dict[int, tuple[int, int]] = {}
    for long in range(1, MOST_SIDES + 1):
        for short in range(1, long + 1):
            size = long * side, short * side
            by_crops.setdefault(num_crops([drawing.sheet for drawing in drawings(spec, *size)]), size)
    return [by_crops[count] for count in sorted(by_crops)]


def _tasks(runner: TorchRunner) -> list[Task]:
    slot = runner.slots[0]
    context = min(runner.model.card.context_tokens, slot.shape.max_pages * runner.shape.page_tokens)
    most = min(slot.shape.step_tokens, context)
    tasks: list[Task] = [
        (f"prefill {num}", partial(_prefill, runner, num, runner.model.prefix_tokens if last else 0))
        for num, last in _prefill_sizes(most, runner.model.prefix_tokens)
    ]
    tasks += [(f"sampling {wants}", partial(_sampling, runner, wants)) for wants in _samplings(runner)]
    spec = runner.model.card.image
    if runner.model.encoder is not None and spec is not None:
        side = spec.crop_size
        sheets = [drawing.sheet for drawing in drawings(spec, side, side)]
        tasks.append(("vision encoder", partial(_encode, runner, sheets)))
    tasks += _graphs(runner)
    if runner.vision_graphs is not None:
        vision = runner.vision_graphs
        tasks += [(f"vision graph {size}", partial(_vision, runner, size)) for size in vision.sizes]
    return tasks


def _graphs(runner: TorchRunner) -> list[Task]:
    """In order of use: every stream decodes, nearly all of them by the text graphs, and every prompt is prefilled."""
    keys = runner.graph_keys()
    text: list[Task] = [
        (f"graph {key}", partial(runner.capture_graph, *key)) for key in keys if key[2] is Flavour.TEXT
    ]
    chunks: list[Task] = [
        (f"chunk graph {key}", partial(runner.capture_chunk_graph, *key)) for key in runner.chunk_graph_keys()
    ]
    others: list[Task] = [
        (f"graph {key}", partial(runner.capture_graph, *key)) for key in keys if key[2] is not Flavour.TEXT
    ]
    return text + chunks + others


def _prefill_sizes(most: int, prefix: int) -> list[tuple[int, bool]]:
    """(tokens, whether they are a picture's prefix): powers of two, for each of which cuBLAS may choose another
    kernel, up to what a step may hold, and the prefix."""
    sizes = [(most, False)]
    size = 1
    while size < most:
        sizes.append((size, False))
        size *= 2
    if 0 < prefix <= most:
        sizes.append((prefix, True))
    return sizes


def _samplings(runner: TorchRunner) -> list[Wants]:
    """Each part of eager sampling at least once."""
    spatial = "point" in runner.model.card.capabilities or "detect" in runner.model.card.capabilities
    return [
        Wants(random=True),
        Wants(random=True, adjusted=True, num_top=5),
        Wants(random=True, automata=runner.rows.automata is not None, spatial=spatial),
    ]


@torch.inference_mode()
def _prefill(runner: TorchRunner, num_tokens: int, prefix: int) -> None:
    """One chunk whose every token lies in page 0, which belongs to nobody."""
    where = runner.device.torch_device
    with runner.device.compute.use():
        positions = torch.arange(num_tokens, device=where)
        table = torch.zeros(-(-num_tokens // runner.shape.page_tokens), dtype=torch.int32, device=where)
        tokens = StepTokens(positions, positions % runner.shape.page_tokens)
        tokens.prefills.append(PrefillSegment(num_tokens, 0, prefix, table))
        spans = chunk_spans(0, 0, num_tokens, 0, prefix)
        tokens.spans = torch.tensor(spans, dtype=torch.int32, device=where)
        tokens.tables = table.unsqueeze(0)
        hidden = runner.model.forward(runner.model.embed(torch.zeros_like(positions)), tokens, runner.cache)
        runner.model.logits(hidden[torch.zeros(1, dtype=torch.int64, device=where)])


@torch.inference_mode()
def _sampling(runner: TorchRunner, wants: Wants) -> None:
    """The padding row, with and without a host's mask, as a range of the batch and as some rows of it."""
    slot = runner.slots[0]
    num = min(3, runner.shape.max_rows)
    stage_padding(slot.host, 0, num)
    with runner.device.compute.use():
        slot.packed.copy_(slot.pinned)
        index = torch.arange(num, device=runner.device.torch_device)
        slot.masks[:num].fill_(-1)
        assert slot.logits is not None and slot.hidden is not None
        for which in (slice(0, num), index):
            for words in (None, slot.masks[which]):
                runner.sampler.sample(slot, which, slot.logits[which], slot.hidden[which], words, wants)


@torch.inference_mode()
def _encode(runner: TorchRunner, sheets: Sequence[Sheet]) -> None:
    """A black picture, from its sheets to its embeddings, its crops as the loop encodes them where nothing is captured."""
    where = runner.device.torch_device
    black = [
        ImageSheet(
            torch.zeros((sheet.height, sheet.width, 3), dtype=torch.uint8, device=where),
            sheet.rows,
            sheet.cols,
        )
        for sheet in sheets
    ]
    features = runner.forward.encode_one_by_one if runner.graphs is None else None
    with runner.device.compute.use():
        runner.model.encode_images([ImageCrops(black)], features)


@torch.inference_mode()
def _vision(runner: TorchRunner, size: int) -> None:
    assert runner.vision_graphs is not None
    runner.vision_graphs.capture(size)
