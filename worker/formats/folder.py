"""Owns the Hugging Face folder: settings, safetensors, tokenizer, template, however it was saved. Decode thread."""

from __future__ import annotations

from pathlib import Path

from worker.formats.chat_templates import find_templates, turn_ends
from worker.formats.folder_refusals import refuse_folder, refuse_settings
from worker.formats.folder_tokenizer import end_token, find_tokenizer, marks_of, refuse_larger, special_tokens
from worker.formats.json_files import read_object
from worker.formats.model_names import name_of
from worker.formats.moondream_tokenizer import is_moondream, moondream_tokenizer
from worker.formats.safetensors import Checkpoint
from worker.formats.source import ProgressReport, Rename, Target


class Folder:
    """A model in a folder; a `source.Source`. Raises CheckpointError when its settings cannot be read, or say that
    it holds something else than weights that are served."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings_file = path / "config.json"
        if not self.settings_file.is_file():
            raise refuse_folder(path, "no config.json in this folder")
        self.config = read_object(self.settings_file)
        refuse_settings(path, self.config)
        self.generation = read_object(path / "generation_config.json")
        self.templates = find_templates(path)
        resolved = path.resolve()
        self.model_id = name_of(path, resolved.parent.name if resolved.name == "weights" else resolved.name)
        self.created = int(self.settings_file.stat().st_mtime)
        self.num_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))

    def open(self, report: ProgressReport, rename: Rename = Target) -> Checkpoint:
        """See `Source.open`."""
        return Checkpoint(self.path, report, rename)

    def tokenizer(self) -> bytes:
        """See `Source.tokenizer`."""
        if is_moondream(self.config, self.path):
            return moondream_tokenizer(self.config, self.path)
        text = find_tokenizer(self.path, self.config)
        refuse_larger(text, self.config.get("vocab_size"), self.path)
        return text

    def special_tokens(self) -> dict[str, str]:
        """See `Source.special_tokens`."""
        return special_tokens(self.path)

    def end_tokens(self) -> list[int]:
        """See `Source.end_tokens`."""
        marks = marks_of(self.path)
        texts = [end_token(self.path), *turn_ends(self.templates)]
        return list(dict.fromkeys(marks[text] for text in texts if text in marks))
