"""Owns videos as lists of frames beside transformers: the texts of its own processors, and pixels by a second implementation,
because its video processors want torchvision. Models are those of the picture families' oracles."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.video_utils import VideoMetadata

from gateway.api.prompts import Message, Prompt, compose_chat
from gateway.core.catalog import AnnouncedModel
from gateway.generation import ChatOptions
from shared.clips import in_words
from tests.unit.worker.models.free_oracle import MARKS, FreeOracle
from tests.unit.worker.models.picture_oracle import Expected, Gate, Oracle, data_url, scene

VIDEO = "<video>"


@dataclass(frozen=True, slots=True)
class Film:
    """Frames, and how often they were taken; 0: the client does not say."""

    frames: tuple[Image.Image, ...]
    fps: float = 0.0

    def metadata(self, usual: float) -> VideoMetadata:
        indices = list(range(len(self.frames)))
        return VideoMetadata(len(indices), fps=self.fps or usual, frames_indices=indices)


FilmTurn = tuple[str, Sequence[Film | Image.Image | str]]


def film(num: int, width: int, height: int, seed: int, fps: float = 0.0) -> Film:
    return Film(tuple(scene(width, height, seed + index) for index in range(num)), fps)


def conversation(name: str) -> list[FilmTurn]:
    match name:
        case "odd":
            return [("user", [film(3, 61, 40, 20, 2.0), "What happens?"])]
        case "slow":
            return [("user", ["Look: ", film(4, 40, 61, 30, 0.3), "and", scene(33, 20, 3), "why?"])]
        case "two":
            return [
                ("user", [film(1, 50, 50, 40), "Who?"]),
                ("assistant", ["Nobody."]),
                ("user", [film(2, 61, 40, 20, 1.0), "And now?"]),
            ]
    raise KeyError(name)


CONVERSATIONS = ("odd", "slow", "two")


def sent(turns: Sequence[FilmTurn]) -> list[Any]:
    """A conversation in the interface's form: videos of an odd number of frames as vLLM's clients send them, others as a list."""
    messages = []
    for role, parts in turns:
        content: Any = []
        for part in parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            elif isinstance(part, Image.Image):
                content.append({"type": "image_url", "image_url": {"url": data_url(part)}})
            else:
                urls = [data_url(frame) for frame in part.frames]
                rate = {"fps": part.fps} if part.fps else {}
                if len(urls) % 2:
                    whole = "data:video/jpeg;base64," + ",".join(url.partition(",")[2] for url in urls)
                    content.append({"type": "video_url", "video_url": {"url": whole}, **rate})
                else:
                    content.append({"type": "video", "video": urls, **rate})
        messages.append({"role": role, "content": content if role == "user" else parts[0]})
    return messages


def compose(model: AnnouncedModel, turns: Sequence[FilmTurn]) -> Prompt:
    """What the gateway makes of it."""
    read = msgspec.convert(sent(turns), list[Message])
    return asyncio.run(compose_chat(Gate(), model, read, ChatOptions()))  # type: ignore[arg-type]


# ---------------------------------------------------------------- theirs


def rendered(oracle: Oracle, turns: Sequence[FilmTurn]) -> str:
    def told(part: Film | Image.Image | str) -> dict[str, str]:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        return {"type": "video" if isinstance(part, Film) else "image"}

    messages = [{"role": role, "content": [told(part) for part in parts]} for role, parts in turns]
    text: str = oracle.tokenizer.apply_chat_template(
        messages, chat_template=oracle.template, tokenize=False, add_generation_prompt=True
    )
    return text


def expected(family: str, oracle: Oracle, turns: Sequence[FilmTurn]) -> Expected:
    """What transformers makes of a conversation with films."""
    parts = [part for _, own in turns for part in own if not isinstance(part, str)]
    films = [part for part in parts if isinstance(part, Film)]
    text = rendered(oracle, turns)
    if isinstance(oracle, FreeOracle):
        return _free(family, oracle, text, parts, films)
    text, pixels = _crops(family, oracle, text, parts)
    ids = oracle.tokenizer(text, add_special_tokens=False)["input_ids"]
    inputs: dict[str, Any] = {"pixel_values": pixels}
    if family == "smolvlm":
        inputs = {
            "pixel_values": pixels[None],
            "pixel_attention_mask": torch.ones(1, len(pixels), 32, 32).long(),
        }
    return Expected(ids, pixels, inputs)


def _crops(family: str, oracle: Oracle, text: str, parts: Sequence[Any]) -> tuple[str, Tensor]:
    """Of families whose frames are crops of one size."""
    from transformers.models.internvl.processing_internvl import InternVLProcessor
    from transformers.models.smolvlm import processing_smolvlm

    processing_smolvlm.num2words = (
        in_words  # a package that is not installed; the words have a test of their own
    )
    run = "<image>" if family == "smolvlm" else "<IMG_CONTEXT>"
    themselves = SimpleNamespace(
        image_seq_len=4,
        image_seq_length=4,
        image_token=run,
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        start_image_token="<img>",
        end_image_token="</img>",
    )
    pixels: list[Tensor] = []
    for part in parts:
        if not isinstance(part, Film):
            written, made = oracle.process(run, [part])
            text = text.replace(run, written.replace(run, "\0"), 1)
            pixels.append(made["pixel_values"].reshape(-1, 3, 32, 32))
            continue
        if family == "smolvlm":
            inputs = {
                "pixel_values": torch.zeros(1, len(part.frames)),
                "video_metadata": [part.metadata(1.0)],
            }
            written = processing_smolvlm.SmolVLMProcessor.replace_video_token(themselves, inputs, 0)
        else:
            inputs = {"pixel_values_videos": torch.zeros(1, len(part.frames))}
            written = InternVLProcessor.replace_video_token(themselves, inputs, 0)
        text = text.replace(VIDEO, written.replace(run, "\0"), 1)
        pixels += [_square(family, frame) for frame in part.frames]
    return text.replace("\0", run), torch.cat(pixels)


def _square(family: str, frame: Image.Image) -> Tensor:
    """(1, 3, 32, 32), normalised: the longer edge to 128 and then a square, or a square at once."""
    if family == "smolvlm":
        long, short = max(frame.size), min(frame.size)
        other = (
            int(128 / (long / short))
            if frame.width >= frame.height
            else int(128 * (frame.width / frame.height))
        )
        other += other % 2
        size = (128, other) if frame.width >= frame.height else (other, 128)
        frame = frame.resize(size, Image.Resampling.LANCZOS).resize((32, 32), Image.Resampling.LANCZOS)
        mean = std = torch.full((3, 1, 1), 0.5)
    else:
        frame = frame.resize((32, 32), Image.Resampling.BICUBIC)
        mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    values = torch.from_numpy(np.asarray(frame).copy()).permute(2, 0, 1) / 255
    return ((values - mean) / std)[None]


def _free(
    family: str, oracle: FreeOracle, text: str, parts: Sequence[Any], films: Sequence[Film]
) -> Expected:
    """Of families whose frames have any size."""
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    begin, end, _pad, video_pad = MARKS[2:]
    is_third = family == "qwen3_vl"
    stills = [part for part in parts if not isinstance(part, Film)]
    inputs: dict[str, Any] = {}
    if stills:
        text, inputs = oracle.process(text, stills)
    grids, pixels = zip(*(_patches(one, is_third) for one in films), strict=True)
    themselves = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        video_token="\0",
        vision_start_token=begin,
        vision_end_token=end,
    )
    themselves._calculate_timestamps = lambda *given: Qwen3VLProcessor._calculate_timestamps(
        themselves, *given
    )
    told = {
        "video_grid_thw": torch.tensor(grids),
        "video_metadata": [one.metadata(2.0) for one in films],
    }
    for number in range(len(films)):
        if is_third:
            # As the makers' own processor did it: the template's marks go.
            written = Qwen3VLProcessor.replace_video_token(themselves, told, number)
            text = text.replace(begin + video_pad + end, written, 1)
        else:
            text = text.replace(
                video_pad, Qwen2_5_VLProcessor.replace_video_token(themselves, told, number), 1
            )
    ids = oracle.tokenizer(text.replace("\0", video_pad), add_special_tokens=False)["input_ids"]
    inputs |= {"pixel_values_videos": torch.cat(pixels), "video_grid_thw": told["video_grid_thw"]}
    if not is_third:
        inputs["second_per_grid_ts"] = [2 / one.metadata(2.0).sampled_fps for one in films]
    return Expected(ids, inputs["pixel_values_videos"], inputs)


def _patches(one: Film, is_third: bool) -> tuple[list[int], Tensor]:
    """(time, rows, columns) of patches, and (patches, 3 · 2 · 4 · 4) normalised, square by square."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize3

    width, height = one.frames[0].size
    if is_third:
        frames = max(2, len(one.frames))  # it takes no single frame
        high, wide = smart_resize3(frames, height, width, 2, 8, 256, 4096)
        mean = std = np.full(3, 0.5)
    else:
        high, wide = smart_resize(height, width, 8, 256, 4096)
        mean, std = (
            np.array([0.48145466, 0.4578275, 0.40821073]),
            np.array([0.26862954, 0.26130258, 0.27577711]),
        )
    resized = [
        (np.asarray(frame.resize((wide, high), Image.Resampling.BICUBIC)) / 255 - mean) / std
        for frame in one.frames
    ]
    if len(resized) % 2:
        resized.append(resized[-1])
    cut = np.stack(resized).reshape(-1, 2, high // 8, 2, 4, wide // 8, 2, 4, 3)
    ordered = cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3 * 2 * 4 * 4)
    return [len(resized) // 2, high // 4, wide // 4], torch.from_numpy(ordered.astype(np.float32))


def features(oracle: Oracle, made: Expected, turns: Sequence[FilmTurn]) -> Tensor:
    """(positions, (1 + taps) · D) of all pictures and films, in order."""
    if not isinstance(oracle, FreeOracle):
        return oracle.features(made.inputs)

    def parts(found: Any) -> list[Tensor]:
        """Of each picture or film."""
        taps = [
            torch.cat(list(tap)) if not isinstance(tap, Tensor) else tap
            for tap in getattr(found, "deepstack_features", None) or []
        ]
        pooled = list(found.pooler_output)
        whole = torch.cat([torch.cat(pooled), *taps], dim=1)
        return list(whole.split([len(one) for one in pooled]))

    inner = oracle.model.model
    films = iter(
        parts(
            inner.get_video_features(
                made.inputs["pixel_values_videos"], made.inputs["video_grid_thw"], return_dict=True
            )
        )
    )
    stills = iter(
        parts(
            inner.get_image_features(
                made.inputs["pixel_values"], made.inputs["image_grid_thw"], return_dict=True
            )
        )
        if "pixel_values" in made.inputs
        else []
    )
    return torch.cat(
        [
            next(films if isinstance(part, Film) else stills)
            for _, own in turns
            for part in own
            if not isinstance(part, str)
        ]
    )
