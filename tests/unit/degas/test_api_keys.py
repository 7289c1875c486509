"""`degas keys new | list | revoke`: shown once, kept as a hash, never half written."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from degas.cli import app
from gateway.keys import MAX_FILE_BYTES, KeysError, digest_of, load, read_entries


def run(*words: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["keys", *map(str, words)])
    return result.exit_code, result.stdout, result.stderr


def test_a_key_is_printed_once_and_kept_as_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    code, out, _ = run("new", "alice", "--tenant", "acme", "--requests-per-minute", "60", "--keys-file", path)
    key = out.strip()
    assert code == 0 and len(out.splitlines()) == 1 and len(key) > 43
    assert key not in path.read_text() and stat.S_IMODE(path.stat().st_mode) == 0o600
    (entry,) = load(path)
    assert entry.digest == digest_of(key.encode())
    assert (entry.name, entry.owner, entry.requests_per_minute) == ("alice", "acme", 60)
    assert entry.tokens_per_minute is None and entry.expires is None and entry.may_use("anything")
    assert run("new", "alice", "--keys-file", path)[0] == 2
    assert len(load(path)) == 1


def test_what_stands_in_the_file_stays_as_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys.jsonl"
    monkeypatch.setenv("DEGAS_GATEWAY_KEYS_FILE", str(path))
    before = "# who may call\n\n" + json.dumps({"name": "a", "hash": "sha256:" + "0" * 64})
    path.write_text(before)
    assert run("new", "b", "--model", "pocket", "--days", "3")[0] == 0
    assert [entry.name for entry in load(path)] == ["a", "b"]
    code, out, _ = run("list")
    assert code == 0 and "pocket" in out and "0000" not in out and "sha256" not in out
    assert run("revoke", "b")[0] == 0
    assert path.read_text() == before + "\n"
    code, _, err = run("revoke", "b")
    assert code == 2 and "no key called b" in err
    assert [file.name for file in tmp_path.iterdir()] == ["keys.jsonl"]


def test_mistakes_of_the_command_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    for words in (("new", "b d"), ("new", "x", "--tenant", "ä"), ("new", "x", "--max-streams", "0")):
        assert run(*words, "--keys-file", path)[0] == 2
    assert not path.exists()
    path.write_text("{")
    code, _, err = run("new", "x", "--keys-file", path)
    assert code == 2 and "line 1" in err and path.read_text() == "{"


GOOD = {"name": "a", "hash": "sha256:" + "0" * 64}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json", "line 2: not JSON"),
        ("[]", "line 2"),
        (json.dumps({"name": "a"}), "hash"),
        (json.dumps({**GOOD, "name": ""}), r"\$\.name"),
        (json.dumps({**GOOD, "name": "b\n"}), r"\$\.name"),
        (json.dumps({**GOOD, "name": "b", "hash": "sha256:xyz"}), "64 hexadecimal"),
        (json.dumps({**GOOD, "hash": "sha256:" + "1" * 64}), "this name stands above"),
        (json.dumps({**GOOD, "name": "b"}), "this hash stands above"),
        (json.dumps({**GOOD, "name": "b", "request_per_minute": 1}), "request_per_minute"),
        (json.dumps({**GOOD, "name": "b", "max_streams": 0}), "max_streams"),
        (
            json.dumps({**GOOD, "name": "b", "hash": "sha256:" + "1" * 64, "expires": "2027-01-01T00:00:00"}),
            "zone",
        ),
        ("\udcff", "line 2"),
    ],
)
def test_the_line_at_fault_is_named(line: str, said: str) -> None:
    data = (json.dumps(GOOD) + "\n" + line).encode(errors="surrogateescape")
    with pytest.raises(KeysError, match=said):
        read_entries(data)


def test_a_file_is_bounded_and_may_be_absent(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="at most"):
        read_entries(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(KeysError, match="No such file"):
        load(tmp_path / "none")
