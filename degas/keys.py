"""Owns making the CURVE keys of a worker and its gateways: ZeroMQ certificate files. One short run, no threads.

The worker reads `worker.key_secret` and admits every gateway whose `NAME.key` lies in the same folder. The
gateway reads `gateway.key_secret` and `worker.key`. One folder may hold all four; in a deployment each side
gets a folder of its own (`--apart`), so that a gateway, which faces the world, never sees the worker's secret.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

import zmq
import zmq.auth

WORKER_FILES: Final = ("worker.key_secret", "gateway.key")
GATEWAY_FILES: Final = ("gateway.key_secret", "worker.key")


class KeysError(Exception):
    """The keys found are not a whole, matching set; the message says what to do."""


def make_keys(folder: Path, *, apart: bool = False) -> list[Path]:
    """Make the key files unless they exist; returns them all. Raises `KeysError` rather than replace any.

    `apart` puts them into `folder/worker` and `folder/gateway`.
    """
    worker, gateway = (folder / "worker", folder / "gateway") if apart else (folder, folder)
    paths = [worker / name for name in WORKER_FILES] + [gateway / name for name in GATEWAY_FILES]
    found = [path for path in paths if path.exists()]
    if not found:
        _make(worker, gateway)
    elif len(found) < len(paths):
        missing = ", ".join(str(path) for path in paths if path not in found)
        raise KeysError(
            f"some keys are there, but not {missing}; restore them, or remove the others to make new ones"
        )
    _check_pair(worker / "worker.key_secret", gateway / "worker.key")
    _check_pair(gateway / "gateway.key_secret", worker / "gateway.key")
    return paths


def _make(worker: Path, gateway: Path) -> None:
    for folder in {worker, gateway}:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        zmq.auth.create_certificates(scratch, "worker")
        zmq.auth.create_certificates(scratch, "gateway")
        made = Path(scratch)
        _install(made / "gateway.key", worker / "gateway.key")
        _install(made / "worker.key", gateway / "worker.key")
        _install(made / "gateway.key_secret", gateway / "gateway.key_secret")
        _install(made / "worker.key_secret", worker / "worker.key_secret")


def _install(source: Path, target: Path) -> None:
    """Put a file in place whole and readable by its owner only; never over another."""
    fresh = target.with_name(f".{target.name}.new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        with source.open("rb") as data:
            shutil.copyfileobj(data, out)
        out.flush()
        os.fsync(out.fileno())
    try:
        os.link(fresh, target)
    finally:
        fresh.unlink()


def _check_pair(secret_file: Path, public_file: Path) -> None:
    try:
        public, secret = zmq.auth.load_certificate(secret_file)
        shown, _ = zmq.auth.load_certificate(public_file)
    except (ValueError, IndexError, OSError) as error:  # IndexError: a line of a file has no value
        raise KeysError(f"{error}; remove all four files to make new ones") from None
    if secret is None or zmq.curve_public(secret) != public or shown != public:
        raise KeysError(
            f"{public_file} does not belong to {secret_file}; remove all four files to make new ones"
        )


def run(folder: Path, *, apart: bool = False) -> int:
    """Make the keys, unless they are there, and print their paths; returns the exit code."""
    try:
        kept = any(folder.rglob("*.key_secret"))
        for path in make_keys(folder, apart=apart):
            print(path)
        print(f"degas keys: {'kept, as they were there' if kept else 'made'}", file=sys.stderr)
    except (KeysError, OSError) as error:
        print(f"degas keys: {error}", file=sys.stderr)
        return 1
    return 0
