"""Owns answering with a checkpoint by plain greedy decoding, without cache or engine; evaluation process.

This is the yardstick that a serving engine is held against, so it is short rather than quick: every new token
runs the whole sequence again, for many questions at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pocket.answers import Box, Conversation, Point, Request
from pocket.network import MASKED, Network, NetworkConfig, size_value
from pocket.objective import BINS
from pocket.segments import prompt_ids
from pocket.tiling import cut_crops
from pocket.tokenizer import ANSWER_ID, EOS_ID, load_tokenizer

_MAX_TOKENS = 112
_MAX_OBJECTS = 16


@dataclass
class _Going:
    """One request on its way: the embeddings so far, which of them see each other both ways, and what came out."""

    index: int
    embedded: list[Tensor]
    blocks: list[tuple[int, int]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(part) for part in self.embedded)


class TorchAnswerer:
    """Answers from a released folder: config.json, model.safetensors, tokenizer.json."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        max_crops: int | None = None,
        batch_rows: int = 64,
    ) -> None:
        self.config = NetworkConfig.read(folder / "config.json")
        if max_crops is not None:
            self.config = replace(self.config, vision=replace(self.config.vision, max_crops=max_crops))
        self.tokenizer = load_tokenizer(folder / "tokenizer.json")
        self.network = Network(self.config)
        weights = load_file(folder / "model.safetensors")
        self.network.load_state_dict({name.removeprefix("model."): held for name, held in weights.items()})
        self.network.to(dtype).requires_grad_(False)
        self.batch_rows = batch_rows

    def query(self, image: Image.Image, question: str) -> str:
        """The answer to one question about one picture."""
        return str(self.answer_all([Request("query", image, question)])[0])

    def caption(self, image: Image.Image, length: str) -> str:
        """A caption: "short", "normal" or "long"."""
        return str(self.answer_all([Request("caption", image, length)])[0])

    def detect(self, image: Image.Image, object: str) -> list[Box]:
        """Boxes (x_min, y_min, x_max, y_max) in fractions of the picture."""
        return cast(list[Box], self.answer_all([Request("detect", image, object)])[0])

    def point(self, image: Image.Image, object: str) -> list[Point]:
        """Centres (x, y) in fractions of the picture."""
        return cast(list[Point], self.answer_all([Request("point", image, object)])[0])

    @torch.no_grad()
    def answer_all(self, requests: Sequence[Request]) -> list[str | list[Box] | list[Point]]:
        """Replies in the order of the requests; requests about one picture object encode it once."""
        replies: list[str | list[Box] | list[Point]] = [""] * len(requests)
        images: dict[int, Tensor] = {}
        for start in range(0, len(requests), self.batch_rows):
            chunk = range(start, min(start + self.batch_rows, len(requests)))
            images = {
                key: held for key, held in images.items() if any(id(requests[i].image) == key for i in chunk)
            }
            for i in chunk:
                if id(requests[i].image) not in images:
                    images[id(requests[i].image)] = self._encode(requests[i].image)
            going = []
            for i in chunk:
                request = requests[i]
                begun = self._begin(i)
                self._show(begun, images[id(request.image)])
                self._say(begun, request.task, request.text)
                going.append(begun)
            self._decode([g for g in going if requests[g.index].task in ("query", "caption")], None)
            self._decode([g for g in going if requests[g.index].task == "detect"], "detect")
            self._decode([g for g in going if requests[g.index].task == "point"], "point")
            for g in going:
                replies[g.index] = self._reply(g, requests[g.index].task)
        return replies

    @torch.no_grad()
    def converse_all(self, conversations: Sequence[Conversation]) -> list[str]:
        """What is said to the last question of each; conversations that share a picture object encode it once."""
        images: dict[int, Tensor] = {}
        replies: list[str] = []
        for start in range(0, len(conversations), self.batch_rows):
            chunk = conversations[start : start + self.batch_rows]
            held, images = images, {}
            going = []
            for number, turns in enumerate(chunk):
                begun = self._begin(number)
                for turn in turns:
                    for image in turn.images:
                        if id(image) not in images:
                            images[id(image)] = held[id(image)] if id(image) in held else self._encode(image)
                        self._show(begun, images[id(image)])
                    self._say(begun, "query", turn.text)
                    begun.embedded.append(self._words(self.tokenizer.encode(turn.answer).ids))
                going.append(begun)
            self._decode(list(going), None)
            replies += [str(self._reply(g, "query")) for g in going]
        return replies

    def _begin(self, index: int) -> _Going:
        return _Going(index, [self.network.text.wte[:1]])

    def _show(self, going: _Going, image: Tensor) -> None:
        """Add a picture's tokens; the first ones of a sequence see BOS, and it them."""
        at = going.num_tokens
        going.blocks.append((0 if at == 1 else at, at + len(image)))
        going.embedded.append(image)

    def _say(self, going: _Going, task: str, text: str) -> None:
        going.embedded.append(
            self._words(prompt_ids(task, text, self.tokenizer, self.config.tokenizer["templates"]))
        )

    def _words(self, ids: Sequence[int]) -> Tensor:
        return self.network.text.wte[torch.tensor(ids, dtype=torch.long)]

    def _encode(self, image: Image.Image) -> Tensor:
        crops, tiling = cut_crops(image.convert("RGB"), self.config.vision)
        features = self.network.vision.encode(torch.from_numpy(crops.copy()))
        return self.network.vision.embed(features, [tiling])[0]

    def _hidden(self, going: list[_Going]) -> Tensor:
        """Hidden states (rows, dim) at the last position of each row."""
        sequences = [torch.cat(g.embedded) for g in going]
        lengths = torch.tensor([len(s) for s in sequences])
        longest = int(lengths.max())
        padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        # Padding stands to the right, where causal rows never look.
        mask = torch.full((longest, longest), MASKED, dtype=padded.dtype).triu(1).repeat(len(going), 1, 1)
        for row, g in enumerate(going):
            for first, end in g.blocks:
                mask[row, first:end, first:end] = 0
        positions = torch.arange(longest).expand(len(going), -1)
        hidden = self.network.text.decode(padded, positions, mask[:, None])
        return hidden[torch.arange(len(going)), lengths - 1]

    def _decode(self, going: list[_Going], find: str | None) -> None:
        text, region = self.network.text, self.network.region
        per_object = {"detect": 4, "point": 2}.get(find or "", 0)
        while going:
            hidden = self._hidden(going)
            logits = text.logits(hidden).float()
            logits[:, ANSWER_ID] = MASKED
            coords = region.decode_coordinate(hidden).argmax(-1).tolist() if find else []
            sizes = size_value(region.decode_size(hidden).argmax(-1)).tolist() if find == "detect" else []
            best = logits.argmax(-1).tolist()
            still = []
            for row, g in enumerate(going):
                if find is None:
                    if best[row] == EOS_ID or len(g.ids) == _MAX_TOKENS:
                        continue
                    g.ids.append(best[row])
                    g.embedded.append(text.wte[best[row]][None])
                else:
                    done = len(g.numbers) % per_object
                    if done == 0 and (best[row] == EOS_ID or len(g.numbers) >= _MAX_OBJECTS * per_object):
                        continue
                    if done < 2:
                        g.numbers.append(coords[row] / BINS)
                        g.embedded.append(region.encode_coordinate(torch.tensor([[g.numbers[-1]]])))
                    else:
                        g.numbers += sizes[row]
                        g.embedded.append(region.encode_size(torch.tensor([sizes[row]])))
                still.append(g)
            going = still

    def _reply(self, going: _Going, task: str) -> str | list[Box] | list[Point]:
        numbers = going.numbers
        if task == "detect":
            groups = [numbers[i : i + 4] for i in range(0, len(numbers), 4)]
            corners = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in groups]
            clamped = [[min(1.0, max(0.0, v)) for v in corner] for corner in corners]
            return [(box[0], box[1], box[2], box[3]) for box in clamped]
        if task == "point":
            return [(numbers[i], numbers[i + 1]) for i in range(0, len(numbers), 2)]
        return str(self.tokenizer.decode(going.ids)).strip()
