"""Owns the boundary of every HTTP route: host, key, request id, bounded body, errors, CORS, log line. Gateway's loop.

Access is denied by default on the *matched* route: a handler that nobody marked public needs a key wherever
keys are configured, whatever its path looks like.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeVar

import msgspec
import structlog
from aiohttp import HttpVersion11, web

from gateway.access import Access
from gateway.caller import CALLER, caller, set_key
from gateway.config import GatewayConfig
from gateway.decisions.holdings import Holdings
from gateway.decisions.limits import Meters
from gateway.decisions.quota import LogQuota
from gateway.errors import error_body, error_headers, has_own_errors, http_status
from gateway.faults import fault_fields
from gateway.generation import HttpCounts, RequestError, ServingCore
from gateway.transport.door import EXPECTATION
from gateway.transport.refusal import Refusals
from gateway.transport.whole import Heads, WholeAnswer
from shared.errors import ErrorCode

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
H = TypeVar("H", bound=Callable[..., Awaitable[web.StreamResponse]])

TENANT: Final = web.RequestKey("tenant", str)
KEY: Final = web.RequestKey("key", str)
"""The handle of the key (`gateway.access.Owner`)."""
STREAM_ID: Final = web.RequestKey("stream_id", str)
"""The stream that the answer is of, where it can be resumed."""
REQUEST_ID: Final = web.RequestKey("request_id", str)
HOLDINGS: Final = web.AppKey("holdings", Holdings)
"""Bytes of bodies and messages that are still arriving, by tenant."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)
_COMMONPLACE: Final = (429, 503)  # not logged, so that a flood does not fill the log; metrics count them
_FAULT_LINES_PER_S: Final = 50
_DISCARDED_LIMITS: Final = 3
_DISCARD_S: Final = 1.0
_READ_HEADERS: Final = (
    b"accept",
    b"access-control-",
    b"connection",
    b"content-",
    b"cookie",
    b"expect",
    b"host",
    b"if-",
    b"last-event-id",
    b"origin",
    b"range",
    b"sec-",
    b"te",
    b"tra",  # traceparent, tracestate, trailer, transfer-encoding
    b"upgrade",
    b"x-degas-resumable",
    b"x-request-id",
)
"""How the names of headers begin that are read here or by libraries; keys' are not among them: their bytes are compared as they are."""
_PASSED_ON: Final = ("Allow", "Sec-WebSocket-Version", "Upgrade")  # of aiohttp's refusals
_EXPOSED: Final = (
    "x-request-id, retry-after, retry-after-ms, x-degas-stream, x-ratelimit-limit-requests, x-ratelimit-limit-tokens, "
    "x-ratelimit-remaining-requests, x-ratelimit-remaining-tokens, x-ratelimit-reset-requests, x-ratelimit-reset-tokens"
)
_ALLOWED_HEADERS: Final = "authorization, *"  # SDKs add headers of their own; `*` does not cover the key's

log = structlog.get_logger(__name__)


def public(group: str) -> Callable[[H], H]:
    """Mark a handler as open without a key: always for "liveness", else where the setting `public` names it."""

    def mark(handler: H) -> H:
        handler.public_group = group  # type: ignore[attr-defined]
        return handler

    return mark


def authenticates_itself(handler: H) -> H:
    """Mark a handler that checks keys its own way (a WebSocket's may come as its first message)."""
    handler.authenticates_itself = True  # type: ignore[attr-defined]
    return handler


class Boundary:
    """The outermost middleware."""

    def __init__(self, config: GatewayConfig, metrics: HttpCounts, access: Access, meters: Meters) -> None:
        self._config = config
        self._metrics = metrics
        self._access = access
        self._meters = meters
        self._public = frozenset((*config.public, "liveness"))
        self._refusals = Refusals()
        self._heads = Heads()
        self._quota = LogQuota(_FAULT_LINES_PER_S)

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Run one request. Only cancellation leaves it as an exception."""
        started_s = time.monotonic()
        given = request.headers.get("x-request-id", "")
        request_id = given if given and _REQUEST_ID.fullmatch(given) else os.urandom(12).hex()
        request[REQUEST_ID] = request_id
        structlog.contextvars.bind_contextvars(request_id=request_id)
        route = route_name(request)
        came = caller(route, request.headers.get("traceparent"))
        CALLER.set(came)
        if came.trace_parent:
            structlog.contextvars.bind_contextvars(trace_id=came.trace_parent[3:35])
        status = 499
        code: str | None = None
        try:
            response = self._enter(request) or await handler(request)
            status = response.status
            if isinstance(response, WholeAnswer):
                return self._heads.finish(response, request, request_id, self._limits_of(request))
            return response
        except RequestError as error:
            status, code = http_status(error), error.code.value
            quick = None
            if error.code is ErrorCode.QUEUE_FULL and not has_own_errors(request.path):
                quick = self._refusals.answer(error, request, request_id)
            return quick or _last_if_unread(error_response(error, path=request.path), request)
        except web.HTTPException as error:
            status = error.status
            answer = error_response(
                _of_http(error, request), status=status, headers=error.headers, path=request.path
            )
            return _last_if_unread(answer, request)
        except ConnectionError:
            return web.Response(status=499)  # the client left; nobody reads this
        except asyncio.CancelledError:
            raise
        except Exception as fault:
            status, code = 500, ErrorCode.INTERNAL.value
            log.error("handler_failed", **fault_fields(fault))
            internal = RequestError(ErrorCode.INTERNAL, "an internal error; the log knows more")
            return error_response(internal, path=request.path)
        finally:
            self._metrics.on_response(route, status)
            elapsed_ms = round((time.monotonic() - started_s) * 1000, 1)
            fields = {"route": route, "method": request.method, "status": status, "code": code}
            if status < 400 or status in _COMMONPLACE:
                log.debug("http", **fields, elapsed_ms=elapsed_ms)
            elif (num_left_out := self._quota.take(started_s)) is not None:
                more = {"num_left_out": num_left_out} if num_left_out else {}
                log.info("http", **fields, elapsed_ms=elapsed_ms, **more)

    def _enter(self, request: web.Request) -> web.Response | None:
        """Whether it may come in, and whose it is; the answer to a browser's question beforehand. Raises `RequestError`."""
        _check_headers(request)
        self._access.check_host(request.headers.get("Host"))
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            return self._preflight(request)
        target = getattr(request.match_info, "handler", None)
        if (
            getattr(target, "authenticates_itself", False)
            or getattr(target, "public_group", None) in self._public
        ):
            request[TENANT] = ""
        else:
            owner = self._access.authenticate(request.headers)
            request[TENANT] = owner.tenant
            if owner.key:
                request[KEY] = owner.key
                set_key(owner.key)
        return None

    def _preflight(self, request: web.Request) -> web.Response:
        if self._access.cors_origin(request.headers.get("Origin")) is None:
            message = "this origin may not call; add it to cors_origins on the server"
            raise RequestError(ErrorCode.FORBIDDEN_ORIGIN, message)
        headers = {
            "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
            "Access-Control-Allow-Headers": _ALLOWED_HEADERS,
            "Access-Control-Max-Age": "600",
        }
        if request.headers.get("Access-Control-Request-Private-Network") == "true":
            headers["Access-Control-Allow-Private-Network"] = "true"
        return web.Response(status=204, headers=headers)

    def _limits_of(self, request: web.Request) -> dict[str, str] | None:
        """Headers that say what the request's key has left, if it has limits."""
        meter = self._meters.of(key) if (key := request.get(KEY)) else None
        return None if meter is None else meter.headers(time.monotonic())

    async def on_prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        """Headers of every answer, streams included; a signal of the application."""
        headers = response.headers
        if REQUEST_ID in request:
            headers["x-request-id"] = request[REQUEST_ID]
        headers.update(self._limits_of(request) or {})
        if STREAM_ID in request:
            headers["x-degas-stream"] = request[STREAM_ID]
        headers["X-Content-Type-Options"] = "nosniff"
        headers.popall("Server", None)  # aiohttp's, with its version
        origin = self._access.cors_origin(request.headers.get("Origin"))
        if origin is not None:
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = _EXPOSED
            headers["Vary"] = "Origin"


def route_name(request: web.Request) -> str:
    """The matched route's pattern; never the path, which is the client's to choose."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unmatched"


def json_response(value: object, *, status: int = 200) -> web.Response:
    """An answer in JSON."""
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")


def whole_answer(value: object) -> WholeAnswer:
    """An answer in JSON, status 200, of a handler that the boundary called: it writes the head."""
    return WholeAnswer(msgspec.json.encode(value))


def error_response(
    error: RequestError,
    *,
    status: int | None = None,
    headers: Mapping[str, str] | None = None,
    path: str = "",
) -> web.Response:
    """An error in the shape of the interface at `path`, with its `Retry-After`."""
    response = web.Response(
        body=error_body(error, path),
        status=status or http_status(error),
        content_type="application/json",
        headers=error_headers(error),
    )
    if error.code is ErrorCode.PAYLOAD_TOO_LARGE:
        response.force_close()  # the rest of the body is not worth reading
    for name in _PASSED_ON if headers is not None else ():
        if headers is not None and name in headers:
            response.headers[name] = headers[name]
    return response


def _last_if_unread(response: web.Response, request: web.Request) -> web.Response:
    """A body that is still on its way would be read as the next request: the connection ends instead."""
    if not request.content.is_eof():
        response.force_close()
    return response


def _check_headers(request: web.Request) -> None:
    """Raises `RequestError` for bytes outside ASCII in a header that is read, other than a key's. 417 for `Expect`.

    Proxies add headers that nobody reads here, such as a city's name.
    """
    for name, value in request.raw_headers:
        if not value.isascii() and name.lower().startswith(_READ_HEADERS):
            said = name.decode("latin-1")[:100]
            message = f"the header {said} holds bytes outside ASCII; encode them or leave it out"
            raise RequestError(ErrorCode.INVALID_REQUEST, message)
    expectation = request.get(EXPECTATION)
    if expectation is not None and expectation.strip().lower() != "100-continue":
        raise web.HTTPExpectationFailed(reason="only Expect: 100-continue is met here")


def _of_http(error: web.HTTPException, request: web.Request) -> RequestError:
    """The `RequestError` for one of aiohttp's own refusals."""
    if error.status == 404:
        return RequestError(
            ErrorCode.NOT_FOUND, "there is nothing at this path; see /v1/models, /v1/chat/completions"
        )
    if error.status == 405:
        return RequestError(ErrorCode.INVALID_REQUEST, f"{request.method} is not offered at this path")
    if error.status == 413:
        return RequestError(ErrorCode.PAYLOAD_TOO_LARGE, "the body is too large")
    return RequestError(ErrorCode.INVALID_REQUEST if error.status < 500 else ErrorCode.INTERNAL, error.reason)


async def admit_body(request: web.Request, core: ServingCore) -> bytes:
    """The body of a request to generate. Raises `RequestError`, and before reading when the body cannot matter.

    Under a flood nearly everything is refused: a refusal must not cost the reading and parsing of a picture.
    """
    if (request.content_length or 0) <= core.config.max_body_bytes:
        try:
            core.check_any_capacity(request[TENANT])
            core.begin_request()
        except RequestError:
            # Without this a client in the middle of its upload would see a closed connection instead of the answer.
            if not request.content.is_eof():
                await _discard(request, core.config.max_body_bytes, core.config.body_timeout_s)
            raise
    return await read_body(request, core.config)


async def skip_body(request: web.Request, config: GatewayConfig) -> None:
    """Read a body that does not count, or a client that sends all of it first would never read the answer."""
    if not request.content.is_eof():
        await _discard(request, config.max_body_bytes, config.body_timeout_s)


async def read_body(request: web.Request, config: GatewayConfig) -> bytes:
    """The whole body, within its bounds of size and time. Raises `RequestError`."""
    headers = request.headers
    encoding = headers.get("Content-Encoding")
    if encoding is not None and encoding.strip().lower() not in ("", "identity"):
        message = "compressed bodies are not accepted; send it without Content-Encoding"
        raise RequestError(ErrorCode.INVALID_REQUEST, message)
    # A foreign web page could send any other content type without the browser asking first (a preflight).
    given = headers.get("Content-Type", "none")
    if given != "application/json" and request.content_type != "application/json":
        given = given[:100]
        message = f"expected the header Content-Type: application/json, got {given}"
        raise RequestError(ErrorCode.INVALID_REQUEST, message)
    limit = config.max_body_bytes
    content = request.content
    if content.is_eof() and content.exception() is None:
        whole = content.read_nowait()  # nearly always: it came with its header, and nobody waits for it
        if len(whole) > limit:
            raise _too_large(limit)
        return whole
    if (request.content_length or 0) > limit:
        await _discard(request, limit)
        raise _too_large(limit)
    pieces: list[bytes] = []
    size = 0
    holding = request.app[HOLDINGS].holding(request[TENANT])
    _invite(request)
    try:
        async with asyncio.timeout(config.body_timeout_s):
            async for piece in request.content.iter_any():
                size += len(piece)
                if size > limit:
                    await _discard(request, limit)
                    raise _too_large(limit)
                if not holding.may_take(size):
                    await _discard(request, limit)
                    message = "too much is being uploaded with this key at once; let some of it finish first"
                    raise RequestError(ErrorCode.QUEUE_FULL, message)
                holding.set(size)
                pieces.append(piece)
    except TimeoutError:
        message = f"the body did not arrive within {config.body_timeout_s:g} s"
        raise RequestError(ErrorCode.SLOW_CLIENT, message) from None
    except (RequestError, ConnectionError):
        raise
    except Exception as error:  # aiohttp reports broken chunking as one of several payload errors
        message = f"the body cannot be read ({type(error).__name__})"
        raise RequestError(ErrorCode.INVALID_REQUEST, message) from None
    finally:
        holding.set(0)
    return b"".join(pieces)


def _too_large(limit: int) -> RequestError:
    return RequestError(ErrorCode.PAYLOAD_TOO_LARGE, f"the body may have at most {limit} bytes")


def _invite(request: web.Request) -> None:
    """Send `100 Continue` to a client that waits for it: only now is it known that its body will be read."""
    if EXPECTATION not in request or request.content.is_eof() or request.version != HttpVersion11:
        return
    if request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def _discard(request: web.Request, limit: int, timeout_s: float = _DISCARD_S) -> None:
    """Read the rest of a body for a moment: most clients look at an answer only after sending everything.

    A client that announces or sends far more gets the answer and a closed connection.
    """
    if (request.content_length or 0) > _DISCARDED_LIMITS * limit or EXPECTATION in request:
        return
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.content.iter_any():
                size += len(piece)
                if size > _DISCARDED_LIMITS * limit:
                    return
    except ConnectionError:
        raise
    except Exception:  # too slow, or broken chunking: the answer stays what it was
        pass
