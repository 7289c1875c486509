"""Owns the gateway process: its loop, its listening sockets and its end. `python -m gateway` runs it.

The order of the end: readiness turns 503; after the notice, if there is one, new work is refused; streams go on up to the
deadline; what is left gets `shutting_down`; only then are connections closed, so that nobody sees a bare reset.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import structlog
import typer
import uvloop
from aiohttp import web

from gateway.admin import admin_app
from gateway.app import RESUMPTION, create_app
from gateway.config import GATEWAY_SETTINGS, ConfigError, GatewayConfig, load
from gateway.core.service import Service
from gateway.decisions.quota import LogQuota
from gateway.faults import fault_fields
from gateway.generation import RequestError
from gateway.transport.door import DoorRunner
from shared.errors import ErrorCode
from shared.logs import configure_logs
from shared.redaction import hide
from shared.settings import give_flags

_LAST_WORDS_S: Final = 0.5  # wait between the last terminal event and closing connections
_MALFORMED_LINES_PER_S: Final = 10
_GRPC_PACKAGES: Final = ("grpc", "grpc_health", "grpc_reflection", "google", "smg_grpc_proto")
_NO_ADDRESS: Final = (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES)
_LINGER_S: Final = 0.1  # how long aiohttp reads on after an answer; `transport.http` has read on already

log = structlog.get_logger(__name__)


class Gateway:
    """A running gateway. `port` is the real one, also where 0 was asked for."""

    def __init__(self, config: GatewayConfig) -> None:
        hide(*config.key_texts())
        self.config = config
        self.service = Service(config)
        self.port = 0
        self.grpc_port: int | None = None
        self.admin_port: int | None = None
        self._runner: web.AppRunner | None = None
        self._admin_runner: web.AppRunner | None = None
        self._grpc: Any = None

    async def start(self) -> None:
        """Listen and connect to the workers. Raises OSError (port taken) or `ConfigError`."""
        config = self.config
        app = create_app(self.service)
        self.resumption = app[RESUMPTION]
        admin = admin_app(self.service) if config.admin_listen else None
        shares = config.gateways > 1
        self._runner = await self._listen(
            app, config.host, config.port, shares=shares, own_port=config.own_port
        )
        self.port = self._runner.addresses[0][1]
        try:
            if admin is not None:
                host, port = config.admin_address()
                self._admin_runner = await self._listen(admin, host, port)
                self.admin_port = self._admin_runner.addresses[0][1]
                log.info("admin_listening", host=host, port=self.admin_port)
            await self.service.start()
            await self._start_grpc()
        except BaseException:
            await self.stop(drain_s=0)
            raise
        log.info("gateway_listening", url=self.url, grpc_port=self.grpc_port, num_workers=len(config.workers))
        if config.host not in ("127.0.0.1", "::1", "localhost") and not self.service.access.needs_key:
            log.warning("no_api_keys", message="anybody who can reach this port may use it; set api_keys")

    async def _listen(
        self,
        app: web.Application,
        host: str,
        port: int,
        *,
        shares: bool = False,
        own_port: int | None = None,
    ) -> web.AppRunner:
        """Serve an application, on a port that other processes share, and on one more of this one's own. Raises OSError when a
        port is taken."""
        runner = DoorRunner(
            app,
            handler_cancellation=True,  # a client that leaves ends its handler, and with it its streams, at once
            keepalive_timeout=self.config.idle_timeout_s,  # counts from connecting: also the deadline of the header
            auto_decompress=False,
            access_log=None,
            logger=_server_logger(),
            max_line_size=8190,
            max_field_size=16380,
            max_headers=100,
            lingering_time=_LINGER_S,
            shutdown_timeout=1.0,
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port, backlog=1024, reuse_port=shares or None).start()
            if own_port is not None:
                await web.TCPSite(runner, host, own_port, backlog=64).start()
        except OSError:
            await runner.cleanup()
            raise
        return runner

    @property
    def url(self) -> str:
        """The address at which the gateway answers."""
        host = "127.0.0.1" if self.config.host in ("0.0.0.0", "") else self.config.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    async def stop(self, drain_s: float | None = None) -> None:
        """Drain, end what is left, close. `drain_s` overrides the configured deadline. Idempotent."""
        service = self.service
        service.begin_drain()
        if service.num_in_flight:
            wait_s = self.config.drain_deadline_s if drain_s is None else drain_s
            log.info("draining", num_in_flight=service.num_in_flight, deadline_s=wait_s)
            if not (wait_s and await service.wait_idle(wait_s)):
                ended = service.end_all(RequestError(ErrorCode.SHUTTING_DOWN, "the server is shutting down"))
                log.warning("drain_deadline", num_ended=ended)
                await asyncio.sleep(_LAST_WORDS_S)
        if self._grpc is not None:
            server, self._grpc = self._grpc, None
            await server.stop(_LAST_WORDS_S)
        runners = (self._admin_runner, self._runner)
        self._admin_runner = self._runner = None
        for runner in runners:
            if runner is not None:
                await runner.cleanup()
        await service.stop()

    async def _start_grpc(self) -> None:
        if self.config.grpc_port is None:
            return
        # gRPC warns at each fork; our children are new programs that never use it, so the warning is turned off.
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C++ core writes to stderr past every logger
        try:
            module = importlib.import_module("gateway.transport.rpc")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in _GRPC_PACKAGES:
                raise  # a fault of ours, not an extra that was left out
            raise ConfigError(f"grpc_port is set, but gRPC is not installed: {error}") from None
        self._grpc = await module.start_grpc(self.service, self.config, self.service.access)
        self.grpc_port = getattr(self._grpc, "port", self.config.grpc_port)


def _server_logger() -> logging.Logger:
    """aiohttp's own remarks (requests that cannot even be parsed) as one structured line, without a traceback."""

    quota = LogQuota(_MALFORMED_LINES_PER_S)

    def tell(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        num_left_out = quota.take(record.created)
        if num_left_out is not None:
            reason = type(error).__name__ if error is not None else record.levelname
            log.info("http_malformed", reason=reason, num_left_out=num_left_out)
        return False

    logger = logging.Logger("gateway.http")
    logger.addFilter(tell)
    return logger


def _on_loop_fault(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an exception that escaped a callback: where it happened, never the values it held."""
    fault = context.get("exception")
    log.error("loop_fault", **(fault_fields(fault) if fault is not None else {"error": "unknown"}))


async def serve(config: GatewayConfig, on_listening: Callable[[Gateway], None] | None = None) -> None:
    """Run until SIGINT or SIGTERM. A second signal ends the drain at once."""
    gateway = Gateway(config)
    asked, hurried = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurried if asked.is_set() else asked).set()

    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_on_loop_fault)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    await gateway.start()
    gc.collect()
    gc.freeze()  # what start-up made stays: no later collection walks it while streams wait
    if on_listening is not None:
        on_listening(gateway)
    await asked.wait()
    if config.drain_notice_s:
        log.info("leaving", notice_s=config.drain_notice_s)
        gateway.service.give_notice()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(hurried.wait(), config.drain_notice_s)
    draining = asyncio.create_task(gateway.stop())
    hurry = asyncio.create_task(hurried.wait())
    await asyncio.wait((draining, hurry), return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        gateway.service.end_all(RequestError(ErrorCode.SHUTTING_DOWN, "the server is shutting down"))
    await draining
    hurry.cancel()
    log.info("gateway_stopped")


def run(flags: Mapping[str, object], file: Path | None = None) -> int:
    """Parse the settings and run a gateway in this process; returns the exit status, 2 for what no retry will mend."""
    try:
        config = load(flags, file)
        configure_logs("gateway", level=config.log_level, json=config.log_json)
        uvloop.run(serve(config))
    except ConfigError as error:
        print(f"gateway: {error}", file=sys.stderr)  # noqa: T201 - logs are not set up yet
        return 2
    except OSError as error:
        no_address = error.errno in _NO_ADDRESS
        hint = "; set another host or port (0 picks a free one)" if no_address else ""
        print(f"gateway: {error.strerror or error}{hint}", file=sys.stderr)  # noqa: T201
        return 2 if no_address else 1
    return 0


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings; its table gateway is read.")
    ] = None,
    **flags: object,
) -> None:
    """Run a gateway alone. Each setting is also the variable DEGAS_GATEWAY_<NAME> and a line of the file's table gateway."""
    raise typer.Exit(run(flags, config))


give_flags(command, GATEWAY_SETTINGS.parameters(typer.Option))

if __name__ == "__main__":
    app(prog_name="degas gateway")
