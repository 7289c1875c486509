"""Whether two workers read the same weights: any change of settings, sizes or sampled bytes tells them apart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from worker.formats.fingerprint import fingerprint
from worker.formats.source import Source


def source(path: Path, **config: Any) -> Source:
    return cast(Source, SimpleNamespace(path=path, config=config))


def test_a_folder(tmp_path: Path) -> None:
    weights = tmp_path / "model-1.safetensors"
    weights.write_bytes(bytes(1 << 20))
    (tmp_path / "model-2.safetensors").write_bytes(b"b")
    mark = fingerprint(source(tmp_path, dim=3), "none")
    assert len(mark) == 32 and mark == fingerprint(source(tmp_path, dim=3), "none")
    assert mark != fingerprint(source(tmp_path, dim=4), "none")
    assert mark != fingerprint(source(tmp_path, dim=3), "int8")
    (tmp_path / "notes.txt").write_text("no weights")
    assert mark == fingerprint(source(tmp_path, dim=3), "none")
    weights.write_bytes(bytes((1 << 20) - 1) + b"x")
    changed = fingerprint(source(tmp_path, dim=3), "none")
    weights.write_bytes(b"")
    assert len({mark, changed, fingerprint(source(tmp_path, dim=3), "none")}) == 3


def test_a_file_and_one_in_parts(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    first.write_bytes(b"first")
    second.write_bytes(b"second")
    both = fingerprint(source(first))
    second.write_bytes(b"2econd")
    assert both != fingerprint(source(first))
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(b"first")
    mark = fingerprint(source(alone))
    second.unlink()
    assert mark == fingerprint(source(alone))
