"""Owns this gateway's confined processes: starting one, asking it, ending it. Runs on the gateway's loop."""

from __future__ import annotations

import asyncio

from shared import confined


async def start_child(module: str, memory_bytes: int) -> asyncio.subprocess.Process:
    """A confined process on pipes."""
    return await asyncio.create_subprocess_exec(
        *confined.command(module, memory_bytes),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=confined.environment(),
        limit=1 << 20,
        start_new_session=True,  # a Ctrl-C at the terminal is the gateway's to handle
    )


async def ask(
    process: asyncio.subprocess.Process, header: bytes, payload: bytes = b""
) -> tuple[bytes, bytes]:
    """One message there and its answer back. Raises OSError or EOFError when the process is gone."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(confined.pack(header, len(payload)))
    process.stdin.write(payload)
    await process.stdin.drain()
    read = process.stdout.readexactly
    header_bytes, payload_bytes = confined.PREFIX.unpack(await read(confined.PREFIX.size))
    return await read(header_bytes), await read(payload_bytes)


async def end_child(process: asyncio.subprocess.Process) -> None:
    """Kill it, if it lives, and wait for its end."""
    try:
        process.kill()
    except ProcessLookupError:
        pass
    await process.wait()
