"""A short run of `python -m tests.fuzz`, and that it would find something; what it once found stays fixed."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.schemas.prepare import prepare
from shared import protocol as wire
from tests.fuzz.__main__ import every_target, fuzz, lines_of
from tests.fuzz.file_targets import CONFIGS
from tests.fuzz.targets import Target, bytes_of
from tests.fuzz.wire_targets import worker_side
from worker.config import ConfigError
from worker.formats.errors import CheckpointError
from worker.models.families.qwen import read_qwen2
from worker.models.settings import Settings
from worker.wire.keys import secure_with


@pytest.mark.slow
def test_a_short_run_finds_nothing() -> None:
    for target in every_target():
        report = fuzz(target, 100)
        assert not report.findings, "\n".join(lines_of(report))
        assert report.inputs >= 100


def test_an_uncaught_exception_is_reported_with_its_input() -> None:
    def call(data: bytes) -> None:
        if b"\xff" in data:
            raise ZeroDivisionError("planted")
        raise ValueError("an answer")

    report = fuzz(Target("planted", bytes_of((b"sound", b"\xfe\xff")), call, (ValueError,)), 200)
    ((kind, (data, trace)),) = report.findings.items()
    assert "ZeroDivisionError" in kind and b"\xff" in data and "planted" in trace
    assert report.accepted == 0 and 0 < report.counts[kind] < report.inputs
    assert any("input: b'" in line for line in lines_of(report))


BAD_TEXT = b"\x92\xa5\x95\xa5Hello\x01\xb0ca55329098ffdd86\xa2gw\xcb@\x14\x00\x00\x00\x00\x00\x00"


@pytest.mark.parametrize("data", [BAD_TEXT, b"\x91" * 5000, b""])
def test_what_is_no_message_ends_no_thread(data: bytes) -> None:
    worker_side()(data)
    for decode in (wire.decode_from_gateway, wire.decode_from_worker):
        with pytest.raises(wire.NO_MESSAGE):
            decode(data)


def test_names_that_are_no_names_do_not_stop_a_schema() -> None:
    assert prepare('{"properties": {"a": {}}, "required": [["c"], null, "a"]}', lambda schema: False)


@pytest.mark.parametrize("text", ["", "curve\n    public-key", 'curve\n    public-key = "x"\n    secret-key'])
def test_a_damaged_key_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "worker.key_secret").write_text(text)
    with pytest.raises(ConfigError, match=r"worker\.key_secret"):
        secure_with(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", {"silu": 1}),
        ("rope_parameters", {"rope_type": ["yarn"]}),
        ("rms_norm_eps", 10**400),
        (
            "rope_parameters",
            {"rope_type": "longrope", "long_factor": [10**400] * 8, "short_factor": [1.0] * 8},
        ),
        ("max_window_layers", ""),
    ],
)
def test_settings_of_another_kind_are_refused(field: str, value: object) -> None:
    values = {**CONFIGS[2], field: value}
    with pytest.raises(CheckpointError, match=rf"config\.json: .*({field}|rotary )"):
        read_qwen2(Settings(values, Path("config.json")))
