"""Owns tiny random checkpoints of families that read pictures, with transformers' own processors and models to compare with."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from gateway.api.prompts import Message, Prompt, compose_chat
from gateway.config import GatewayConfig
from gateway.confined.image_process import Job, prepare
from gateway.core.catalog import AnnouncedModel, Catalog
from gateway.core.chat_format import read_format as read_format
from gateway.generation import ChatOptions, PreparedImage, ServedModel
from shared.clips import frame_spec
from shared.pictures import num_tokens
from shared.protocol import (
    PROTOCOL_VERSION,
    ImageInput,
    Limits,
    ModelCard,
    Ready,
    Sampling,
    Submit,
    pack_i32,
    schema_hash,
)
from tests.unit.worker.loop.simulation import EPOCH
from worker.models.contract import Model

TEXT: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # of 16, which compiled attention takes
    "image_size": 32,
    "patch_size": 8,
}
Turn = tuple[str, Sequence[Image.Image | str]]  # a role, and its parts in order


@dataclass(frozen=True, slots=True)
class Expected:
    """What transformers makes of a conversation."""

    ids: list[int]
    pixels: Tensor | None  # (crops, 3, S, S) normalised
    inputs: dict[str, Any]  # for its model, besides the ids


@dataclass(frozen=True, slots=True)
class Oracle:
    """A folder's model in transformers."""

    model: Any
    tokenizer: Any
    template: str
    image_id: int
    process: Callable[[str, list[Image.Image]], tuple[str, dict[str, Any]]]
    """A rendered text and its pictures → the text with all that stands for them, and the model's inputs."""

    def rendered(self, turns: Sequence[Turn]) -> str:
        """The conversation as the chat template writes it, with one placeholder a picture."""
        messages = [
            {
                "role": role,
                "content": [
                    {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                    for part in parts
                ],
            }
            for role, parts in turns
        ]
        text: str = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
        return text

    def expected(self, turns: Sequence[Turn]) -> Expected:
        images = [part for _, parts in turns for part in parts if not isinstance(part, str)]
        text = self.rendered(turns)
        inputs: dict[str, Any] = {}
        if images:
            text, inputs = self.process(text, images)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        pixels = inputs.get("pixel_values")
        return Expected(ids, None if pixels is None else pixels.flatten(0, -4), inputs)

    def features(self, inputs: dict[str, Any]) -> Tensor:
        """(positions, D) of all pictures of a conversation, in order."""
        found = self.model.get_image_features(**inputs, return_dict=True).pooler_output
        return torch.cat([one.reshape(-1, one.shape[-1]) for one in found])

    def logits(self, expected: Expected, more: Sequence[int] = ()) -> Tensor:
        """(S, V) of the conversation and tokens behind it, run whole."""
        ids = torch.tensor([[*expected.ids, *more]])
        extra = self._types(ids)
        logits: Tensor = self.model(ids, **expected.inputs, **extra).logits[0].float()
        return logits

    def greedy(self, expected: Expected, num: int) -> list[int]:
        """Tokens by its own `generate`."""
        ids = torch.tensor([expected.ids])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **expected.inputs,
            **self._types(ids),
            do_sample=False,
            max_new_tokens=num,
            min_new_tokens=num,
        )
        tokens: list[int] = out[0, ids.shape[1] :].tolist()
        return tokens

    def _types(self, ids: Tensor) -> dict[str, Tensor]:
        if type(self.model).__name__.startswith("Gemma3"):
            return {"token_type_ids": (ids == self.image_id).long()}
        return {}


def make_tokenizer(folder: Path, special: Sequence[str]) -> Any:
    """Bytes, two line ends as one token (which real vocabularies have), and special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "ĊĊ", "ĊĊĊ"])}
    made = Tokenizer(models.BPE(vocab, [("Ċ", "Ċ"), ("ĊĊ", "Ċ")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(special))
    made.save(str(folder / "tokenizer.json"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


def stir(oracle: Any, *, unit_offset: bool = False) -> Any:
    """Random weights wide enough that the most likely token stands out, and that a picture matters."""
    low = -0.5 if unit_offset else 0.5
    with torch.no_grad():
        for name, weight in oracle.named_parameters():
            if "norm" in name and name.endswith("weight"):
                weight.uniform_(0.5, 1.5) if "vision" in name else weight.uniform_(low, low + 1.0)
            elif (
                name.endswith("bias")
                or "lambda" in name
                or "cls_token" in name
                or "vision" in name
                or "projector" in name
                or "connector" in name
            ):
                weight.normal_(std=0.2)
            elif unit_offset and "embed_tokens" in name:
                weight *= 0.02  # scaled and tied, larger ones would say the last token again and again
    oracle.generation_config.eos_token_id = None  # `min_new_tokens` would ban it
    return oracle.eval()


# ---------------------------------------------------------------- our side, without sockets


class Gate:
    """As much of a gateway's core as composing a prompt needs; pictures are prepared in this process."""

    def __init__(self) -> None:
        self.config = GatewayConfig()

    async def prepare_image(
        self, model: ServedModel, data_url: str, *, param: str, num_frames: int = 0
    ) -> PreparedImage:
        spec = model.card.image
        assert spec is not None
        spec = frame_spec(spec, num_frames) if num_frames else spec
        data = base64.b64decode(data_url.partition(",")[2])
        answer, frames = prepare(data, Job(spec, self.config.max_image_pixels, 4))
        runs = [(1, num_tokens(spec, answer.sheets))]
        return PreparedImage(ImageInput(answer.sheets, runs, answer.digest), frames)


def announced(card: ModelCard, folder: Path) -> AnnouncedModel:
    """The model as a gateway knows it after a worker's `Ready`."""
    limits = Limits(4, 16, 600, 16, 1600, card.context_tokens)
    ready = Ready(PROTOCOL_VERSION, schema_hash(), EPOCH, card, limits, "cpu")
    template = (folder / "chat_template.jinja").read_bytes()
    return Catalog(GatewayConfig()).announce(ready, (folder / "tokenizer.json").read_bytes(), template)


def data_url(image: Image.Image) -> str:
    held = io.BytesIO()
    image.save(held, "PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def compose(model: AnnouncedModel, turns: Sequence[Turn]) -> Prompt:
    """What the gateway makes of a conversation in OpenAI's form; an assistant's single text is a string, as clients send it."""
    messages = []
    for role, parts in turns:
        content: Any = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": data_url(part)}}
            for part in parts
        ]
        if len(parts) == 1 and isinstance(parts[0], str):
            content = parts[0]
        messages.append({"role": role, "content": content})
    read = msgspec.convert(messages, list[Message])
    return asyncio.run(compose_chat(Gate(), model, read, ChatOptions()))  # type: ignore[arg-type]


def whole_ids(prompt: Prompt, image_id: int) -> list[int]:
    """The prompt with an id at each position of a picture, as transformers has it."""
    ids, at = [], 0
    for image in prompt.images:
        for place, num in image.spec.runs:
            ids += [*prompt.ids[at:place], *[image_id] * num]
            at = place
    return ids + prompt.ids[at:]


def submit_of(prompt: Prompt, number: int, max_tokens: int) -> tuple[Submit, list[bytes]]:
    submit = Submit(
        epoch=EPOCH,
        sequence_id=number,
        request_id=str(number),
        prompt=pack_i32(prompt.ids),
        max_tokens=max_tokens,
        sampling=Sampling(),
        images=[image.spec for image in prompt.images],
        ignore_eos=True,
    )
    return submit, [frame for image in prompt.images for frame in image.frames]


def scene(width: int, height: int, seed: int) -> Image.Image:
    """A picture with coarse and fine detail."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height))
    for cells in (3, 9, 40):
        layer = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image = Image.blend(image, layer.resize((width, height), Image.Resampling.BICUBIC), 0.5)
    return image


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values))


# ---------------------------------------------------------------- the families


def _smolvlm(folder: Path, kind: str, **processing: Any) -> Oracle:
    """`kind` SmolVLM or Idefics3: the same computation, other classes."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE, get_image_prompt_string

    tiles = [f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)]
    marks = ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"]
    tokenizer = make_tokenizer(folder, [*marks, *tiles])
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    processor = Idefics3ImageProcessorPil(
        size={"longest_edge": 128}, max_image_size={"longest_edge": 32}, **processing
    )
    torch.manual_seed(5)
    config = getattr(transformers, f"{kind}Config")(
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **TEXT},
        # Heads of 8 attend by torch.
        vision_config={**VISION, "num_attention_heads": 4 if kind == "Idefics3" else 2},
        scale_factor=2,
        image_token_id=image_id,
    )
    oracle = stir(getattr(transformers, f"{kind}ForConditionalGeneration")(config))
    oracle.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(DEFAULT_CHAT_TEMPLATE)

    def process(text: str, images: list[Image.Image]) -> tuple[str, dict[str, Any]]:
        made = processor([images], return_tensors="pt", return_row_col_info=True)
        pieces = text.split("<image>")
        for number, (rows, cols) in enumerate(zip(made["rows"][0], made["cols"][0], strict=True)):
            pieces[number] += get_image_prompt_string(
                rows,
                cols,
                4,
                fake_token_around_image="<fake_token_around_image>",
                image_token="<image>",
                global_image_token="<global-img>",
            )
        inputs = {name: made[name] for name in ("pixel_values", "pixel_attention_mask")}
        return "".join(pieces), inputs

    return Oracle(oracle, tokenizer, DEFAULT_CHAT_TEMPLATE, image_id, process)


GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for item in m.content %}"
    "{% if item.type == 'image' %}<start_of_image>{% else %}{{ item.text | trim }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def _gemma3(folder: Path, vision: dict[str, Any] = VISION, **pan: Any) -> Oracle:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    marks = [
        "<bos>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<start_of_image>",
        "<image_soft_token>",
        "<end_of_image>",
    ]
    tokenizer = make_tokenizer(folder, marks)
    tokenizer.bos_token = "<bos>"
    write_json(folder / "tokenizer_config.json", {"bos_token": "<bos>"})
    image_id, begin, end = (tokenizer.convert_tokens_to_ids(mark) for mark in (marks[4], marks[3], marks[5]))
    processor = Gemma3ImageProcessorPil(size={"height": 32, "width": 32}, **pan)
    torch.manual_seed(6)
    config = transformers.Gemma3Config(
        text_config={
            "vocab_size": len(tokenizer),
            **TEXT,
            "head_dim": 16,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **vision},
        mm_tokens_per_image=16 if pan else 4,
        image_token_index=image_id,
        boi_token_index=begin,
        eoi_token_index=end,
    )
    oracle = stir(transformers.Gemma3ForConditionalGeneration(config), unit_offset=True)
    oracle.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(GEMMA_TEMPLATE)
    whole = f"\n\n<start_of_image>{'<image_soft_token>' * config.mm_tokens_per_image}<end_of_image>\n\n"

    def process(text: str, images: list[Image.Image]) -> tuple[str, dict[str, Any]]:
        made = processor(images, return_tensors="pt")
        pieces = text.split("<start_of_image>")
        for number, crops in enumerate(made["num_crops"]):
            pieces[number] += whole
            if crops:  # the words of its processor
                pieces[number] = pieces[number][: -len(whole)] + (
                    f"Here is the original image {whole} and here are some crops to help you see better "
                    + " ".join([whole] * int(crops))
                )
        return "".join(pieces), {"pixel_values": made["pixel_values"]}

    return Oracle(oracle, tokenizer, GEMMA_TEMPLATE, image_id, process)


INTERN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for item in m.content %}{% if item.type == 'image' %}<IMG_CONTEXT>\n"
    "{% elif item.type == 'video' %}<video>\n{% else %}{{ item.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _internvl(folder: Path, text: str = "qwen2", **vision: Any) -> Oracle:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    marks = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    tokenizer = make_tokenizer(folder, marks)
    image_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    given = {
        "size": {"height": 32, "width": 32},
        "max_patches": 6,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    processor = GotOcr2ImageProcessorPil(**given)
    torch.manual_seed(7)
    config = transformers.InternVLConfig(
        text_config={"model_type": text, "vocab_size": len(tokenizer), **TEXT, "head_dim": 16},
        vision_config={**VISION, "attention_bias": True, **vision},
        image_token_id=image_id,
        image_seq_length=4,
    )
    oracle = stir(transformers.InternVLForConditionalGeneration(config))
    oracle.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(INTERN_TEMPLATE)

    def process(text: str, images: list[Image.Image]) -> tuple[str, dict[str, Any]]:
        made = processor(images, crop_to_patches=True, return_tensors="pt")
        pieces = text.split("<IMG_CONTEXT>")
        for number, crops in enumerate(made["num_patches"]):
            pieces[number] += f"<img>{'<IMG_CONTEXT>' * 4 * int(crops)}</img>"
        return "".join(pieces), {"pixel_values": made["pixel_values"]}

    return Oracle(oracle, tokenizer, INTERN_TEMPLATE, image_id, process)


PAN: dict[str, Any] = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 20,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
FAMILIES: dict[str, Callable[[Path], Oracle]] = {
    "smolvlm": lambda folder: _smolvlm(folder, "SmolVLM"),
    "idefics3": lambda folder: _smolvlm(folder, "Idefics3"),
    "smolvlm unsplit": lambda folder: _smolvlm(folder, "SmolVLM", do_image_splitting=False),
    "gemma3": _gemma3,
    # Heads of 72, as SigLIP's larger ones.
    "gemma3 wide": lambda folder: _gemma3(folder, {**VISION, "hidden_size": 144}),
    "gemma3 pan": lambda folder: _gemma3(folder, **PAN),
    "internvl": _internvl,
    "internvl qwen3": lambda folder: _internvl(folder, "qwen3", attention_bias=False, use_mean_pooling=False),
}


def conversation(name: str) -> list[Turn]:
    """A few that differ in pictures, sizes and turns."""
    match name:
        case "one":
            return [("user", [scene(130, 97, 1), "What is it?"])]
        case "small":
            return [("user", ["Look: ", scene(21, 20, 2), " and say."])]
        case "two":
            return [("user", [scene(33, 150, 3), "and", scene(301, 83, 4), "which one?"])]
        case "turns":
            first: Turn = ("user", [scene(130, 97, 1), "What is it?"])
            said: Turn = ("assistant", ["A field."])
            return [
                first,
                said,
                ("user", ["And here?", scene(64, 64, 5)]),
                ("assistant", ["Nothing."]),
                ("user", ["Why?"]),
            ]
        case "text":
            return [("user", ["Who are you?"])]
    raise KeyError(name)


CONVERSATIONS = ("one", "small", "two", "turns", "text")


def embedded(model: Model, prompt: Prompt, features: Tensor, image_id: int) -> Tensor:
    """(S, D) input embeddings of a prompt whose pictures have these features, in order."""
    ids = torch.tensor(whole_ids(prompt, image_id))
    hidden = model.embed(ids).clone()
    hidden[ids == image_id] = features
    return hidden
