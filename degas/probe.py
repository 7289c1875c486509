"""Owns asking a gateway over HTTP how it is: one small request, no library. Runs on the supervisor's loop."""

from __future__ import annotations

import asyncio
from typing import Final

_WILDCARDS: Final = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}


def reachable_host(host: str) -> str:
    """The address under which this machine reaches what listens on `host`."""
    return _WILDCARDS.get(host, host)


def base_url(host: str, port: int) -> str:
    """`http://127.0.0.1:8080`."""
    host = reachable_host(host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def fetch_status(host: str, port: int, path: str, *, timeout_s: float = 5.0) -> int | None:
    """The status of a GET; None when nothing answers in time."""
    host = reachable_host(host)
    name = f"[{host}]" if ":" in host else host
    writer = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {name}:{port}\r\nConnection: close\r\n\r\n".encode())
            line = await reader.readline()
        words = line.split()
        return int(words[1]) if len(words) >= 2 and words[0].startswith(b"HTTP/") else None
    except (TimeoutError, OSError, ValueError):
        return None
    finally:
        if writer is not None:
            writer.close()
