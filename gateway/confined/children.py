"""Owns starting and ending this gateway's confined processes (see `shared.confined`). Runs on the gateway's loop."""

from __future__ import annotations

import asyncio
import os
import sys


async def start_child(module: str, memory_bytes: int) -> asyncio.subprocess.Process:
    """A confined process on pipes. It sees the import path and nothing else of the environment: no keys, no proxies."""
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "LC_ALL": "C.UTF-8"}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # the folder we were started from may hold a `gateway` of its own
        "-m",
        module,
        str(memory_bytes),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment,
        limit=1 << 20,
        start_new_session=True,  # a Ctrl-C at the terminal is the gateway's to handle
    )


async def end_child(process: asyncio.subprocess.Process) -> None:
    """Kill it, if it lives, and wait for its end."""
    try:
        process.kill()
    except ProcessLookupError:
        pass
    await process.wait()
