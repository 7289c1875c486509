"""Owns a TCP proxy that spoils what passes: latency, bandwidth, cuts, resets, silence. One asyncio task a direction.

`python -m loadtest.fault_proxy --listen 127.0.0.1:9000 --to 127.0.0.1:8080 --latency-ms 50 --bandwidth 20000`
"""

from __future__ import annotations

import asyncio
import signal
import socket
import struct
from dataclasses import dataclass, field
from typing import Annotated, Final

import typer

_READ_BYTES: Final = 16 << 10


@dataclass(slots=True)
class Faults:
    """What happens to connections. May be changed while they are open: a change holds for what passes afterwards."""

    latency_s: float = 0.0  # added to every piece, each way
    bandwidth: float = 0.0  # bytes a second of one connection, each way; 0: as fast as it goes
    cut_after: int = 0  # bytes from the server to the client until the connection ends; 0: never
    reset: bool = False  # a cut is a reset (RST), not an end (FIN)
    blackhole: bool = False  # everything is read and nothing passed on: a cable that is pulled


@dataclass(slots=True)
class FaultProxy:
    """A listening proxy; `async with` it."""

    to_host: str
    to_port: int
    host: str = "127.0.0.1"
    port: int = 0  # 0: a free one; the real one afterwards
    faults: Faults = field(default_factory=Faults)
    num_connections: int = 0
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def __aenter__(self) -> FaultProxy:
        self._server = await asyncio.start_server(self._on_client, self.host, self.port)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """End every open connection now, by a reset where `faults.reset` says so."""
        for writer in list(self._writers):
            self._end(writer)

    async def _on_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.num_connections += 1
        self._writers.add(writer)
        try:
            there, back = await asyncio.open_connection(self.to_host, self.to_port)
        except OSError:
            self._end(writer)
            return
        self._writers.add(back)
        up = asyncio.create_task(self._pump(reader, back, counts=False))
        down = asyncio.create_task(self._pump(there, writer, counts=True))
        try:
            await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._end(back)
            self._end(writer)
            up.cancel()
            down.cancel()
            await asyncio.gather(up, down, return_exceptions=True)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counts: bool
    ) -> None:
        """Pass one direction on until it ends, or is cut; `counts`: its bytes count for `cut_after`."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)

        async def send() -> None:
            passed, free_s = 0, 0.0
            while True:
                due_s, data = await queue.get()
                faults = self.faults
                await asyncio.sleep(max(0.0, due_s - loop.time()))
                if not data:
                    return
                if faults.blackhole:
                    continue
                if counts and faults.cut_after:
                    data = data[: max(0, faults.cut_after - passed)]
                if faults.bandwidth:
                    free_s = max(free_s, loop.time()) + len(data) / faults.bandwidth
                    await asyncio.sleep(free_s - loop.time())
                passed += len(data)
                writer.write(data)
                await writer.drain()
                if counts and faults.cut_after and passed >= faults.cut_after:
                    return

        sender = asyncio.create_task(send())
        try:
            while not sender.done():
                reading = asyncio.ensure_future(reader.read(_READ_BYTES))
                await asyncio.wait((reading, sender), return_when=asyncio.FIRST_COMPLETED)
                if not reading.done():
                    reading.cancel()
                    return
                data = reading.result()
                await queue.put((loop.time() + self.faults.latency_s, data))
                if not data:
                    await sender
                    return
        except OSError:
            return
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    def _end(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        if self.faults.reset and not writer.is_closing():
            made = writer.get_extra_info("socket")
            if made is not None:  # lingering for no time at all makes close a reset
                made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            return
        writer.close()


def _address(text: str, option: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise typer.BadParameter(f"{option} must look like 127.0.0.1:9000, not {text!r}")
    return host.strip("[]"), int(port)


def main(
    to: Annotated[str, typer.Option(help="Where connections are passed on to, HOST:PORT.")],
    listen: Annotated[str, typer.Option(help="Where clients connect, HOST:PORT.")] = "127.0.0.1:0",
    latency_ms: Annotated[float, typer.Option(min=0, help="Delay of every piece, each way.")] = 0.0,
    bandwidth: Annotated[float, typer.Option(min=0, help="Bytes a second, each way. 0: no limit.")] = 0.0,
    cut_after: Annotated[int, typer.Option(min=0, help="End after so many bytes of answers. 0: never.")] = 0,
    reset: Annotated[bool, typer.Option("--reset", help="Cuts are resets.")] = False,
    blackhole: Annotated[bool, typer.Option("--blackhole", help="Pass nothing on.")] = False,
) -> None:
    """A TCP proxy that spoils connections, between a client and a gateway or a gateway and a worker. Ctrl-C ends it."""
    faults = Faults(latency_ms / 1e3, bandwidth, cut_after, reset, blackhole)
    to_host, to_port = _address(to, "--to")
    host, port = _address(listen, "--listen")

    async def serve() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with FaultProxy(to_host, to_port, host, port, faults) as proxy:
            print(f"{proxy.host}:{proxy.port} passes on to {to_host}:{to_port}", flush=True)
            await stop.wait()

    asyncio.run(serve())


if __name__ == "__main__":
    typer.run(main)
