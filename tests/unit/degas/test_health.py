"""Health checks of the containers."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from degas.health import check_file, check_http, main


def test_status_file_must_be_fresh_and_ready(tmp_path: Path) -> None:
    path, now_s = tmp_path / "status.json", time.time()
    assert "no status" in str(check_file(path, now_s=now_s))
    path.write_text("{nonsense")
    assert "no status" in str(check_file(path, now_s=now_s))
    path.write_text('{"worker": {"ready": false}}')
    assert check_file(path, now_s=now_s) == "not ready: worker"
    path.write_text('{"worker": {"ready": true}}')
    assert check_file(path, now_s=now_s) is None
    os.utime(path, (now_s - 60, now_s - 60))
    assert "has not reported" in str(check_file(path, now_s=now_s))


def test_http_without_a_server(unused_tcp_port: int) -> None:
    assert check_http(f"http://127.0.0.1:{unused_tcp_port}/readyz") is not None


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["file", str(tmp_path / "none")]) == 1
    assert "no status" in capsys.readouterr().err
