"""Owns the Hugging Face folder: config.json, generation_config.json, safetensors, tokenizer, template. Decode thread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from worker.formats.safetensors import Checkpoint
from worker.formats.source import CheckpointError, ProgressReport, Rename, Target


class Folder:
    """A model in a folder; a `source.Source`. Raises CheckpointError when its settings cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings_file = path / "config.json"
        if not self.settings_file.is_file():
            raise CheckpointError("no config.json in this folder", file=path)
        self.config = _read_object(self.settings_file)
        self.generation = _read_object(path / "generation_config.json")
        resolved = path.resolve()
        self.model_id = resolved.parent.name if resolved.name == "weights" else resolved.name
        self.created = int(self.settings_file.stat().st_mtime)
        self.num_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))

    def open(self, report: ProgressReport, rename: Rename = Target) -> Checkpoint:
        """See `Source.open`."""
        return Checkpoint(self.path, report, rename)

    def tokenizer(self) -> bytes:
        """See `Source.tokenizer`."""
        path = self.path / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError("no tokenizer.json, which the gateway needs to speak text", file=self.path)
        return path.read_bytes()

    def chat_template(self) -> str:
        """See `Source.chat_template`."""
        path = self.path / "chat_template.jinja"
        if path.is_file():
            return path.read_text()
        found = _read_object(self.path / "tokenizer_config.json").get("chat_template")
        return found if isinstance(found, str) else ""


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file. Raises CheckpointError."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"not readable as JSON: {error}", file=path) from error
    if not isinstance(found, dict):
        raise CheckpointError("not a JSON object", file=path)
    return found


def open_source(path: Path) -> Folder:
    """The model at `path`, by what lies there. Raises CheckpointError saying what does not fit and what would."""
    return Folder(path)
