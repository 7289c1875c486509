"""The log's bound on clients' faults."""

from __future__ import annotations

import pytest

from gateway.decisions.quota import LogQuota
from tests.fake_worker import FakeWorker
from tests.gateway_thread import GatewayThread
from tests.http_client import ask


def test_lines_beyond_the_quota_are_counted_and_told_later() -> None:
    quota = LogQuota(2)
    assert [quota.take(10.0 + step / 10) for step in range(5)] == [0, 0, None, None, None]
    assert [quota.take(11.0), quota.take(11.9), quota.take(11.9)] == [3, 0, None]
    assert quota.take(500.0) == 1


@pytest.mark.parametrize(("lines_per_s", "is_told"), [(0, False), (50, True)])
def test_clients_faults_are_told_within_the_quota(
    worker: FakeWorker,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lines_per_s: int,
    is_told: bool,
) -> None:
    monkeypatch.setattr("gateway.transport.http._FAULT_LINES_PER_S", lines_per_s)
    with GatewayThread(workers=[worker.endpoint]) as gateway:
        assert ask(gateway.url, "/nowhere").status == 404
    said = capsys.readouterr()
    assert ("status=404" in said.out + said.err) is is_told
