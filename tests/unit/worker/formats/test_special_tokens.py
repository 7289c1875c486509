"""The special tokens a chat template may name come from the folder's files, and reach the card."""

from __future__ import annotations

import json
from pathlib import Path

from worker.formats.folder_tokenizer import special_tokens


def test_names_come_from_either_file_and_either_spelling(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": None})
    )
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>", "eos_token": "no"}))
    assert special_tokens(tmp_path) == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def test_a_folder_that_names_none_has_none(tmp_path: Path) -> None:
    assert special_tokens(tmp_path) == {}
