"""A GGUF file that is not what it says is refused at once, by name; whatever its bytes, nothing else is raised."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.worker.formats.tiny_gguf import add_byte_tokens, add_setting, close
from worker.formats.errors import CheckpointError
from worker.formats.gguf import Gguf
from worker.formats.gguf_container import read_container
from worker.formats.gguf_values import pieces


def write_tiny(path: Path) -> Path:
    """A whole, small llama, in the fewest bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 32,
        "attention.head_count": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }.items():
        add_setting(writer, f"llama.{name}", value)
    add_byte_tokens(writer, 270)
    writer.add_tensor("token_embd.weight", np.zeros((270, 32), np.float32))
    writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    return close(writer, path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_tiny(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


def refuse(path: Path, data: bytes) -> CheckpointError:
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_container(path)
    assert caught.value.file == path
    return caught.value


def header(*, version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not a GGUF file"),
        (b"GGML" + bytes(60), "not a GGUF file"),
        (b"GGUF\3\0", "incomplete"),
        (header(version=1), "version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian"),
        (header(tensors=1 << 40), "cannot be true"),
        (header(keys=1 << 60), "cannot be true"),
        (header(keys=1) + struct.pack("<Q", 1 << 50), "asks for"),
        (header(keys=1) + text(b"a") + struct.pack("<I", 77), "of type 77"),
        (header(keys=1) + text(b"a") + struct.pack("<IIQ", 9, 4, 1 << 62), "elements"),
        (header(keys=1) + text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 21), "asks for"),
        (header(keys=1) + text(b"a") + struct.pack("<IIQ", 9, 9, 1), "list of type 9"),
        (header(keys=2) + 2 * (text(b"a") + struct.pack("<II", 4, 1)), "'a' is stored twice"),
        (
            header(keys=1) + text(b"general.alignment") + struct.pack("<II", 4, 3),
            "'general.alignment' is 3",
        ),
        (header(tensors=1) + tensor(b"w", (4,), 0, 1 << 40) + bytes(64), "lie outside a file"),
        (header(tensors=1) + tensor(b"w", (1 << 62, 1 << 62), 0, 0), "lie outside a file"),
        (header(tensors=1) + tensor(b"w", (4,), 0, 7) + bytes(64), "no multiple of 32"),
        (header(tensors=1) + tensor(b"w", (4,), 4, 0) + bytes(64), "ggml type 4"),
        (header(tensors=1) + tensor(b"w", (33,), 8, 0) + bytes(64), "no whole Q8_0 blocks"),
        (header(tensors=1) + tensor(b"w", (0,), 0, 0) + bytes(64), "no whole F32 blocks"),
        (header(tensors=1) + tensor(b"w", (1,) * 5, 0, 0) + bytes(64), "5 dimensions"),
        (header(tensors=1) + text(b"w") + struct.pack("<I", 0) + bytes(64), "0 dimensions"),
        (header(tensors=2) + 2 * tensor(b"w", (4,), 0, 0) + bytes(64), "stored twice"),
        (
            header(tensors=2) + tensor(b"a", (16,), 0, 0) + tensor(b"b", (4,), 0, 32) + bytes(256),
            "also those of a",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ],
)
def test_files_that_cannot_be_true(tmp_path: Path, data: bytes, said: str) -> None:
    assert said in str(refuse(tmp_path / "m.gguf", data))


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "none.gguf", "no such file"), (tmp_path, "not readable")):
        with pytest.raises(CheckpointError, match=said):
            read_container(path)


@pytest.mark.slow
def test_every_cut_is_noticed(tmp_path: Path, tiny: bytes) -> None:
    path = tmp_path / "m.gguf"
    for length in [*range(300), *range(300, len(tiny), 997)]:
        path.write_bytes(tiny[:length])
        with pytest.raises(CheckpointError):
            read_container(path)


def test_counts_are_not_believed_before_the_bytes_are_there(tmp_path: Path) -> None:
    """A claim of four million strings costs nothing in a file of a hundred bytes."""
    path = tmp_path / "m.gguf"
    data = header(keys=1) + text(b"a") + struct.pack("<IIQ", 9, 8, 4_000_000) + bytes(64)
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        read_container(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_file_cut_while_it_is_read(tmp_path: Path, tiny: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny)
    stored = read_container(path).tensors["token_embd.weight"]
    path.write_bytes(tiny[: stored.offset + 100])
    with pytest.raises(CheckpointError, match="cut short"):
        list(pieces(stored))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6), st.booleans())
@pytest.mark.slow
def test_flipped_bytes(
    tmp_path: Path, tiny: bytes, flips: list[tuple[float, int]], near_the_start: bool
) -> None:
    """Anything may have happened to the file: it opens, or CheckpointError says why not."""
    data = bytearray(tiny)
    reach = 600 if near_the_start else len(data) - 34560
    for place, value in flips:
        data[int(place * (reach - 1))] = value
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    try:
        source = Gguf(path)
        source.tokenizer()
        assert isinstance(source.templates, dict)
        source.end_tokens()
    except CheckpointError as error:
        assert str(path) in str(error)
