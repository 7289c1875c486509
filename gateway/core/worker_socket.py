"""Owns one DEALER socket to one worker: sending without blocking, and draining it. Runs on the gateway's loop.

The ZeroMQ descriptor is watched with `loop.add_reader`; it is edge-triggered, so EVENTS is looked at again
after every send and after every bounded burst of receives, and nothing raised for one message escapes the
drain: a missed edge would stall this worker's streams for good.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final, Protocol

import zmq
import zmq.auth
from zmq.utils.monitor import parse_monitor_message

from gateway.config import ConfigError
from gateway.faults import fault_fields
from gateway.generation import RequestError
from shared import protocol as wire
from shared.errors import ErrorCode

_BURST: Final = 64  # messages handled before the loop gets its turn
_SEND_HWM: Final = 4096
# As plain integers: with the library's enumerations a frame would cost three times as much to receive.
_EVENTS: Final = int(zmq.EVENTS)
_MORE: Final = int(zmq.RCVMORE)
_INPUT: Final = int(zmq.POLLIN)
_NOBLOCK: Final = int(zmq.NOBLOCK)
_WATCHED = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH


class SocketEvents(Protocol):
    """Hears what happens on a socket, on the loop."""

    def on_frames(self, frames: list[bytes]) -> None:
        """One message. An exception raised here is counted and loses this message only."""

    def on_connected(self) -> None:
        """A connection was made."""

    def on_disconnected(self) -> None:
        """The connection was lost; what had arrived before is still to be drained."""

    def note(self, kind: str, **fields: object) -> None:
        """Count an anomaly that needs nothing else."""


class WorkerSocket:
    """See the module. `open` once, `close` once."""

    def __init__(
        self,
        endpoint: str,
        events: SocketEvents,
        context: zmq.Context[zmq.Socket[bytes]],
        *,
        curve_key_dir: str | None = None,
    ) -> None:
        """Raises `ConfigError` for keys that cannot be used."""
        self._endpoint = endpoint
        self._events = events
        self._is_open = False
        self._drain_scheduled = False
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.sndhwm = _SEND_HWM
        self._socket.rcvhwm = 0  # the worker bounds what it sends; a drop here would be a silent gap
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing queues for a worker that is not there
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_PAYLOAD_BYTES)
        self._socket.setsockopt(zmq.IPV6, endpoint.startswith("tcp://["))
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
        if endpoint.startswith("tcp://") and curve_key_dir is not None:
            use_curve(self._socket, Path(curve_key_dir))
        self._monitor = self._socket.get_monitor_socket(_WATCHED)
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        """Connect; call on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._is_open = True
        self._loop.add_reader(self._socket.fileno(), self._on_readable)
        self._loop.add_reader(self._monitor.fileno(), self._on_monitor)
        self._on_monitor()  # a pipe signals its descriptor only after a first read found it empty
        self._socket.connect(self._endpoint)

    def close(self) -> None:
        """Close the socket: no more events. Idempotent."""
        if self._loop is None or not self._is_open:
            return
        self._is_open = False
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_reader(self._monitor.fileno())
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)

    # ------------------------------------------------------------ sending

    def send(self, frames: list[bytes]) -> None:
        """Send one message. Raises `RequestError` WORKER_LOST or QUEUE_FULL; never blocks."""
        try:
            if len(frames) == 1:
                self._socket.send(frames[0], _NOBLOCK)
            else:  # large frames (pixels) are handed over without a copy
                self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            self._events.note("send_queue_full")
            raise RequestError(
                ErrorCode.QUEUE_FULL,
                "the worker does not take requests as fast as they come",
                retry_after_s=1.0,
            ) from None
        except zmq.ZMQError as error:
            self._events.note("send_failed")
            raise RequestError(ErrorCode.WORKER_LOST, f"the worker cannot be reached: {error}") from None
        finally:
            self._recheck()

    def send_quietly(self, message: bytes) -> None:
        """Send one frame if a worker is connected."""
        try:
            self._socket.send(message, _NOBLOCK)
        except zmq.ZMQError:
            pass  # no worker is connected yet; a timer tries again
        finally:
            self._recheck()

    def _recheck(self) -> None:
        """A send may have consumed the descriptor's edge: check for messages, and drain in the loop's next turn."""
        if self._drain_scheduled or self._loop is None or not self._is_open:
            return
        if self._has_input():
            self._drain_scheduled = True
            self._loop.call_soon(self.drain)

    def _has_input(self) -> bool:
        return bool(int(self._socket.get(_EVENTS)) & _INPUT)

    # ------------------------------------------------------------ receiving

    def _on_readable(self) -> None:
        if not self._drain_scheduled:
            self.drain()

    def drain(self) -> None:
        """Handle one burst of what has arrived; the rest follows in the loop's next turn."""
        self._drain_scheduled = False
        for _ in range(_BURST):
            if not self._is_open:
                return
            try:
                if not self._has_input():  # an exception for "nothing there" costs more than asking
                    return
                frames = [self._socket.recv(_NOBLOCK)]
                while self._socket.get(_MORE):
                    frames.append(self._socket.recv(_NOBLOCK))
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                self._events.note("receive_failed", reason=str(error))
                return
            try:
                self._events.on_frames(frames)
            except wire.NO_MESSAGE as error:
                self._events.note("malformed", reason=str(error)[:200])
            except Exception as fault:
                self._events.note("failed_message", **fault_fields(fault))
        self._drain_scheduled = True
        if self._loop is not None:
            self._loop.call_soon(self.drain)

    def drain_all(self) -> None:
        """Handle all that has arrived, however much it is."""
        while self._is_open and self._has_input():
            self.drain()

    def _on_monitor(self) -> None:
        """A closed connection tells of a killed worker at once, long before its heartbeat is missed."""
        lost = connected = False
        while self._is_open:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
            except zmq.ZMQError:
                break
            lost |= event == zmq.EVENT_DISCONNECTED
            connected |= event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._events.note("curve_refused")
        if lost:
            self._events.on_disconnected()
        if connected:
            self._events.on_connected()


def use_curve(socket: zmq.Socket[bytes], folder: Path) -> None:
    """Encrypt and authenticate: our key pair and the worker's public key. Raises `ConfigError`."""
    server, own = folder / "worker.key", folder / "gateway.key_secret"
    for path in (server, own):
        if not path.is_file():
            raise ConfigError(f"curve_key_dir has no {path.name}")
    try:
        server_public, _ = zmq.auth.load_certificate(server)
        own_public, own_secret = zmq.auth.load_certificate(own)
        if own_secret is None:
            raise ConfigError(f"{own.name} holds no secret key")
        socket.curve_serverkey = server_public
        socket.curve_publickey, socket.curve_secretkey = own_public, own_secret
    except (
        OSError,
        ValueError,
        IndexError,
        zmq.ZMQError,
    ) as error:  # IndexError: a line of a file has no value
        raise ConfigError(
            f"curve_key_dir {folder}: {server.name} or {own.name} is no key file ({error}); "
            "remove the set and let `degas keys` make a new one"
        ) from None
