"""Owns the worker's side of CURVE: its key pair, and which gateways may connect. Called on the I/O thread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from worker.config import ConfigError

Secure = Callable[["zmq.Socket[bytes]", "zmq.Context[zmq.Socket[bytes]]"], Callable[[], None]]

SECRET_NAME = "worker.key_secret"


def secure_with(folder_name: str) -> Secure:
    """Return what turns a fresh ROUTER into a CURVE server that admits only keys found in the folder.

    The folder holds `worker.key_secret` and a `NAME.key` for every gateway (`degas keys` makes both). Raises
    `ConfigError` when something is missing.
    """
    folder = Path(folder_name)
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

    def secure(socket: zmq.Socket[bytes], context: zmq.Context[zmq.Socket[bytes]]) -> Callable[[], None]:
        authenticator = ThreadAuthenticator(context)
        authenticator.start()
        authenticator.configure_curve(domain="*", location=str(folder))
        socket.curve_secretkey = secret
        socket.curve_publickey = public
        socket.curve_server = True
        return authenticator.stop

    return secure
