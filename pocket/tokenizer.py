"""Owns pocket's tokenizer: a byte-level BPE learned from the questions and answers; runs once, before training.

The low ids carry the roles they have in Moondream's own tokenizer. Byte level, so any text can be encoded.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pocket.network import VisionConfig
from pocket.questions import KINDS, NO_PICTURE_ANSWER, Questioner
from pocket.scenes import COLOR_NAMES, SHAPES, draw_scene, scene_rng

VOCAB_SIZE = 512
EOS_ID, ANSWER_ID, COORD_ID, SIZE_ID = 0, 3, 5, 6
SPECIALS = (
    "<|endoftext|>", "<|template|>", "<|template_end|>", "<|answer|>", "<|thinking|>", "<|coord|>", "<|size|>",
    "<|start_ground|>", "<|reserved|>", "<|end_ground|>", "<|query|>", "<|caption|>", "<|detect|>", "<|point|>",
    "<|short|>", "<|normal|>", "<|long|>",
)  # fmt: skip
TOKENIZER_CONFIG: dict[str, Any] = {
    "bos_id": 0,
    "eos_id": 0,
    "answer_id": 3,
    "thinking_id": 4,
    "coord_id": 5,
    "size_id": 6,
    "start_ground_points_id": 7,
    "end_ground_id": 9,
    "templates": {
        "caption": {"short": [1, 11, 2, 14, 3], "normal": [1, 11, 2, 15, 3], "long": [1, 11, 2, 16, 3]},
        "query": {"prefix": [1, 10, 2], "suffix": [3]},
        "detect": {"prefix": [1, 12, 2], "suffix": [3]},
        "point": {"prefix": [1, 13, 2], "suffix": [3]},
    },
}


def _corpus(seed: int, num_scenes: int) -> Iterator[str]:
    # Scenes are drawn on tiny pictures: only the words matter here.
    tiny = VisionConfig(crop_size=98, overlap_margin=1, max_crops=1)
    for index in range(num_scenes):
        rng = scene_rng(seed, index)
        scene = draw_scene(rng, tiny, single=1.0)
        questioner = Questioner(scene, rng)
        for kind in KINDS:
            ask = questioner.draw(kind)
            if ask is not None:
                yield ask.text if ask.task == "query" else f" {ask.text}"
                yield ask.answer
    for word in (*COLOR_NAMES, *SHAPES, NO_PICTURE_ANSWER):
        yield from (word, f" {word}") * 50


def build_tokenizer(seed: int, num_scenes: int = 1500) -> Tokenizer:
    """Learn the merges from questions about scenes of this seed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed, num_scenes), trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a ``tokenizer.json``; special tokens are never made from user text."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer
