"""Owns telling gateways where the workers are: a file for those of this machine, a page for those elsewhere. One loop."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from aiohttp import web

from degas.probe import base_url

PAGE = "/workers"


class Registry:
    """The list of endpoints. Whoever reads it still has to prove by its keys who it is, and so has every worker."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._text = ""
        self._runner: web.AppRunner | None = None
        self._write()

    @property
    def source(self) -> str:
        """What a gateway on this machine is told as `workers`."""
        return f"file://{self._path}"

    def tell(self, endpoints: Iterable[str]) -> None:
        """Replace the list."""
        text = "".join(f"{endpoint}\n" for endpoint in sorted(endpoints))
        if text != self._text:
            self._text = text
            self._write()

    async def listen(self, host: str, port: int) -> str:
        """Serve the list over HTTP too; returns its address. Raises OSError when the port is taken."""
        app = web.Application()
        app.router.add_get(PAGE, self._answer)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        return base_url(host, int(self._runner.addresses[0][1])) + PAGE

    async def close(self) -> None:
        """Stop serving. Gateways keep the workers they know."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _answer(self, _: web.Request) -> web.Response:
        return web.Response(text=self._text)

    def _write(self) -> None:
        fresh = self._path.with_name(self._path.name + ".new")
        fresh.write_text(self._text)
        fresh.replace(self._path)
