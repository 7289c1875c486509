"""Key files: whole, private, never replaced, and good for a real CURVE connection."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import zmq
from zmq.auth.thread import ThreadAuthenticator

from degas.keys import KeysError, make_keys, run
from gateway.core.worker_socket import use_curve
from worker.wire.keys import secure_with


@pytest.mark.parametrize("apart", [False, True])
def test_keys_are_made_once_and_private(tmp_path: Path, apart: bool) -> None:
    paths = make_keys(tmp_path / "keys", apart=apart)
    before = {path: path.read_bytes() for path in paths}
    assert make_keys(tmp_path / "keys", apart=apart) == paths
    assert {path: path.read_bytes() for path in paths} == before
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in paths)
    assert sorted(path for path in (tmp_path / "keys").rglob("*") if path.is_file()) == sorted(paths)
    if apart:
        assert not (tmp_path / "keys" / "gateway" / "worker.key_secret").exists()
        assert not (tmp_path / "keys" / "worker" / "gateway.key_secret").exists()


def test_a_partial_or_mixed_set_is_refused_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_keys(tmp_path)
    (tmp_path / "worker.key").unlink()
    with pytest.raises(KeysError, match=r"worker\.key"):
        make_keys(tmp_path)
    other = tmp_path / "other"
    make_keys(other)
    (tmp_path / "worker.key").write_bytes((other / "worker.key").read_bytes())
    with pytest.raises(KeysError, match="does not belong"):
        make_keys(tmp_path)
    assert run(tmp_path) == 1
    assert "does not belong" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stranger", [False, True])
def test_gateway_and_worker_read_them(tmp_path: Path, stranger: bool) -> None:
    make_keys(tmp_path / "keys", apart=True)
    make_keys(tmp_path / "strange", apart=True)
    if stranger:  # knows the worker's public key, but is not admitted
        public = tmp_path / "keys" / "gateway" / "worker.key"
        (tmp_path / "strange" / "gateway" / "worker.key").write_bytes(public.read_bytes())
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    server, client = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    stop = secure_with(str(tmp_path / "keys" / "worker"))(server, context)
    try:
        port = server.bind_to_random_port("tcp://127.0.0.1")
        use_curve(client, tmp_path / ("strange" if stranger else "keys") / "gateway")
        client.connect(f"tcp://127.0.0.1:{port}")
        client.send(b"hello")
        arrived = bool(server.poll(300 if stranger else 5000))
        assert arrived is not stranger
    finally:
        client.close(0)
        server.close(0)
        stop()
        context.term()


def test_the_authenticator_is_pyzmqs_own() -> None:
    assert isinstance(ThreadAuthenticator, type)  # the worker relies on it; a removal should fail here first
