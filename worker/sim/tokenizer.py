"""Owns the simulated model's tokenizer: ids 0–9 special as in Moondream, then one id a byte. Built at import."""

from __future__ import annotations

import json

FIRST_BYTE_ID = 10
VOCAB_SIZE = FIRST_BYTE_ID + 256


def _byte_alphabet() -> list[str]:
    """The byte-level BPE alphabet: a printable character for every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(hidden)) for byte in range(256)]


def _tokenizer_json() -> bytes:
    special = [f"<|{i}|>" for i in range(FIRST_BYTE_ID)]
    vocab = {text: i for i, text in enumerate(special + _byte_alphabet())}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": text, **flags} for i, text in enumerate(special)],
            "normalizer": None,
            "pre_tokenizer": level,
            "post_processor": None,
            "decoder": level,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        }
    ).encode()


SIM_TOKENIZER = _tokenizer_json()
