"""Owns the worker's side of CURVE: its key pair, which gateways may connect, and how it connects to other workers, which have
the same key pair. Called on the threads of the sockets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from worker.config import ConfigError

Secure = Callable[["zmq.Socket[bytes]", "zmq.Context[zmq.Socket[bytes]]"], Callable[[], None]]

SECRET_NAME = "worker.key_secret"


SecureClient = Callable[["zmq.Socket[bytes]"], None]


def secure_with(folder_name: str, *, admits_workers: bool = False) -> Secure:
    """Return what turns a fresh ROUTER into a CURVE server that admits only keys found in the folder.

    The folder holds `worker.key_secret` and a `NAME.key` for every gateway (`degas keys` makes both). `admits_workers`: other
    workers may connect too, who have the same pair. Raises `ConfigError` when something is missing.
    """
    folder = Path(folder_name)
    public, secret = _pair(folder)

    def secure(socket: zmq.Socket[bytes], context: zmq.Context[zmq.Socket[bytes]]) -> Callable[[], None]:
        authenticator = ThreadAuthenticator(context)
        authenticator.start()
        if admits_workers:
            admitted = frozenset((*zmq.auth.load_certificates(folder), public))
            authenticator.configure_curve_callback(domain="*", credentials_provider=_Admits(admitted))
        else:
            authenticator.configure_curve(domain="*", location=str(folder))
        socket.curve_secretkey = secret
        socket.curve_publickey = public
        socket.curve_server = True
        return authenticator.stop

    return secure


def secure_client_with(folder_name: str) -> SecureClient:
    """Return what makes a fresh socket a CURVE client of another worker. Raises `ConfigError` as `secure_with` does."""
    public, secret = _pair(Path(folder_name))

    def secure(socket: zmq.Socket[bytes]) -> None:
        socket.curve_serverkey = public
        socket.curve_publickey, socket.curve_secretkey = public, secret

    return secure


class _Admits:
    """Whom a server takes: keys as they stand in certificates."""

    def __init__(self, keys: frozenset[bytes]) -> None:
        self._keys = keys

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self._keys


def _pair(folder: Path) -> tuple[bytes, bytes]:
    """The worker's public and secret key."""
    secret_file = folder / SECRET_NAME
    if not secret_file.is_file():
        raise ConfigError(f"curve_key_dir {folder} has no {SECRET_NAME}; `degas keys {folder}` makes one")
    try:
        public, secret = zmq.auth.load_certificate(secret_file)
    except (OSError, ValueError, IndexError) as error:  # IndexError: a line of it has no value
        raise ConfigError(
            f"{secret_file} is no key file ({error}); remove it and let `degas keys {folder}` make a new set"
        ) from None
    if secret is None:
        raise ConfigError(f"{secret_file} holds no secret key")
    return public, secret
