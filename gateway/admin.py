"""Owns the operator's listener: draining, log level, recordings, keys and workers, on a port and with a token of its own.

Off unless `admin_listen` is set. It has the same boundary as every route (host, key, error shape, log line), with the token in the
place of the API keys. Gateway's loop.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import msgspec
import structlog
from aiohttp import web
from pydantic import SecretStr

from gateway.access import Access
from gateway.api.fields import Known
from gateway.api.parameters import Json, decode_body
from gateway.config import GatewayConfig
from gateway.core.placement import Worker
from gateway.core.service import Service
from gateway.decisions.holdings import Holdings
from gateway.decisions.limits import Meter, Meters
from gateway.generation import RequestError
from gateway.transport.http import HOLDINGS, Boundary, Handler, json_response, read_body
from shared.errors import ErrorCode
from shared.logs import current_level, set_level
from shared.redaction import hide
from shared.settings import ConfigError

MIN_TOKEN_CHARS: Final = 16
_MAX_BODY_BYTES: Final = 4 << 10

log = structlog.get_logger(__name__)


class LevelBody(Known, kw_only=True):
    """`POST /log-level`."""

    level: Literal["debug", "info", "warning", "error"]


_decode_level = msgspec.json.Decoder(LevelBody).decode


def read_token(path: str) -> str:
    """The token in a file. Raises `ConfigError`."""
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "not ASCII text"
        raise ConfigError(f"admin_token_file {path}: {said}") from None
    if len(token) < MIN_TOKEN_CHARS or len(token.split()) != 1:
        message = f"one word of at least {MIN_TOKEN_CHARS} characters; `openssl rand -hex 32` makes one"
        raise ConfigError(f"admin_token_file {path}: {message}")
    hide(token)
    return token


def admin_app(service: Service) -> web.Application:
    """The operator's routes. Raises `ConfigError` for a token that cannot be used."""
    whole = service.config
    host, _ = whole.admin_address()
    if whole.admin_token_file is None:
        raise ConfigError("admin_listen needs admin_token_file, a file with a token")
    token = read_token(whole.admin_token_file)
    config = whole.model_copy(
        update={
            "api_keys": (SecretStr(token),),
            "keys_file": None,
            "host": host,
            "public": (),
            "cors_origins": (),
            "max_body_bytes": _MAX_BODY_BYTES,
        }
    )
    boundary = Boundary(config, service.metrics, Access(config), Meters())
    app = web.Application(middlewares=[boundary.middleware])
    app.on_response_prepare.append(boundary.on_prepare)
    app[HOLDINGS] = Holdings(config.max_unfinished_bytes)
    add = app.router
    add.add_post("/drain", _draining(service, begins=True))
    add.add_post("/resume", _draining(service, begins=False))
    add.add_get("/log-level", _told(lambda: {"level": current_level()}), allow_head=False)
    add.add_post("/log-level", _set_level(config))
    add.add_get("/trace", recording(service), allow_head=False)
    add.add_get("/keys", _told(lambda: keys_object(service)), allow_head=False)
    add.add_get("/workers", _told(lambda: workers_object(service)), allow_head=False)
    return app


def recording(service: Service) -> Handler:
    """A handler that records the worker's next steps (`steps`, 1 to 10000)."""

    async def handle(request: web.Request) -> web.StreamResponse:
        asked = request.query.get("steps", "200")
        if not (asked.isascii() and asked.isdecimal() and len(asked) < 6 and 1 <= int(asked) <= 10_000):
            message = "steps: a number from 1 to 10000"
            raise RequestError(ErrorCode.INVALID_REQUEST, message, param="steps")
        return web.Response(body=await service.record(int(asked)), content_type="application/json")

    return handle


def _told(tell: Callable[[], object]) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        return json_response(tell())

    return handle


def _draining(service: Service, *, begins: bool) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        if begins:
            service.pause()
        else:
            service.resume()
        log.warning("drained_by_operator" if begins else "resumed_by_operator")
        return json_response({"draining": service.draining, "num_in_flight": service.num_in_flight})

    return handle


def _set_level(config: GatewayConfig) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        body = decode_body(_decode_level, await read_body(request, config))
        before = current_level()
        set_level(body.level)
        log.warning("log_level_changed", before=before, level=body.level)
        return json_response({"level": body.level})

    return handle


def keys_object(service: Service) -> Json:
    """Names, limits and use; never anything of a key itself. Those of the settings are only counted: they have no names."""
    return {
        "keys": [_key(meter) for meter in service.meters.all()],
        "num_settings_keys": len(service.config.api_keys),
    }


def _key(meter: Meter) -> Json:
    entry = meter.entry
    return {
        "name": entry.name,
        "tenant": entry.owner,
        "requests_per_minute": entry.requests_per_minute,
        "tokens_per_minute": entry.tokens_per_minute,
        "max_streams": entry.max_streams,
        "models": entry.models,
        "expires": entry.expires,
        "use": {"streams": meter.num_streams, **msgspec.to_builtins(meter.totals)},
    }


def workers_object(service: Service) -> Json:
    """Each configured worker as this gateway sees it."""
    return {"workers": [_worker(worker) for worker in service.workers]}


def _worker(worker: Worker) -> Json:
    link, held = worker.link, worker.occupancy
    ready, beat = link.ready, link.beat
    return {
        "worker": worker.key,
        "endpoint": link.endpoint,
        "role": ready.role if ready is not None else None,
        "takes_work": worker.takes_work,
        "refusal": link.refusal or None,
        "model": worker.model.card.model_id if worker.model is not None else None,
        "device": ready.device if ready is not None else None,
        "places": held.capacity,
        "places_taken": held.num_active,
        "draining": beat.draining if beat is not None else None,
        "step": beat.step if beat is not None else None,
        "num_running": beat.num_running if beat is not None else None,
        "num_waiting": beat.num_waiting if beat is not None else None,
        "free_pages": beat.free_pages if beat is not None else None,
        "total_pages": beat.total_pages if beat is not None else None,
        "anomalies": dict(link.anomalies),
    }
