"""Owns reading the JSON files of a model's folder. Any thread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from worker.formats.errors import CheckpointError
from worker.formats.lfs import refuse_pointer

MAX_JSON_BYTES = 256 << 20


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file. Raises CheckpointError."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"larger than the {MAX_JSON_BYTES >> 20} MiB that such a file may have", file=path
            )
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise CheckpointError(f"not readable as JSON: {error}", file=path) from error
    if not isinstance(found, dict):
        raise CheckpointError("not a JSON object", file=path)
    return found
