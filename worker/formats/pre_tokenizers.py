"""Owns how text is cut before merges apply, for each `tokenizer.ggml.pre` that is known. Any thread.

A GGUF file names its source's pre-tokenizer and nothing else; here each name stands for the parts of a
tokenizer.json that the sources themselves carry. A name that is not here is refused: tokens would be wrong in silence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

Json = dict[str, Any]

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
)  # fmt: skip


def _words(digits: str) -> str:
    """The pattern of cl100k and of all that follow it; they differ in how many digits go together."""
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
    )


LLAMA3: Final = _words(r"\p{N}{1,3}")
QWEN2: Final = _words(r"\p{N}")
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_TEKKEN = _CASED % ("", "") + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_GPT4O = (
    _CASED % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?")
    + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_CHINESE_JAPANESE = "[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_SEED_CODER = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"

_NFC: Json = {"type": "NFC"}
_DIGITS: Json = {"type": "Digits", "individual_digits": True}


def byte_level(*, use_regex: bool) -> Json:
    """Bytes as printable characters, with GPT-2's own cut in front of it or without."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def split(pattern: str) -> Json:
    """Every match of the pattern on its own, and what lies between matches."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One way to cut text. `ignore_merges`: a piece that is a token as a whole is that token."""

    steps: list[Json] = field(default_factory=lambda: [byte_level(use_regex=True)])
    normalizer: Json | None = None
    ignore_merges: bool = False
    adds_bos: bool = False  # unless the file says otherwise

    @property
    def json(self) -> Json:
        """As tokenizer.json spells it."""
        if len(self.steps) == 1:
            return self.steps[0]
        return {"type": "Sequence", "pretokenizers": self.steps}


def _by(*steps: str | Json, **more: Any) -> PreTokenizer:
    cuts = [split(step) if isinstance(step, str) else step for step in steps]
    return PreTokenizer([*cuts, byte_level(use_regex=False)], **more)


_GPT2 = PreTokenizer()
_LLAMA = _by(LLAMA3, ignore_merges=True, adds_bos=True)
_ONE_DIGIT = PreTokenizer([_DIGITS, byte_level(use_regex=True)])
_DEEPSEEK = _by(r"\p{N}{1,3}", _CHINESE_JAPANESE, _DEEPSEEK3)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    **dict.fromkeys(
        [
            *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "a.x-4.0"),
            *("mellum", "exaone4"),
        ],
        _GPT2,
    ),
    **dict.fromkeys(
        [
            *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        ],
        _LLAMA,
    ),
    **dict.fromkeys(
        [
            *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        ],
        _ONE_DIGIT,
    ),
    "minicpm5": _by(LLAMA3, ignore_merges=True),
    **dict.fromkeys(["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"], _by(LLAMA3)),
    "qwen2": _by(QWEN2, normalizer=_NFC),
    **dict.fromkeys(
        ["deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"],
        _by(QWEN2),
    ),
    "qwen35": _by(_QWEN35, normalizer=_NFC),
    "tekken": _by(_TEKKEN, ignore_merges=True, adds_bos=True),
    **dict.fromkeys(["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], _by(_GPT4O)),
    **dict.fromkeys(["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"], _DEEPSEEK),
    "deepseek-coder": _by(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", _DIGITS),
    "seed-coder": _by(_SEED_CODER),
    **dict.fromkeys(["poro-chat", "bloom", "gpt3-finnish"], _by(_BLOOM)),
}
