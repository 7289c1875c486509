"""Owns what aiohttp's connection does before a request reaches the boundary, and after the client stopped sending.

A subclass of aiohttp's protocol, as small as it can be: refusals of its parser in the one error shape, a bound on a
header's bytes, half-closed clients, and the frame guard in front of its WebSocket reader. Gateway's loop.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from aiohttp.web_protocol import RequestHandler, RequestPayloadError
from aiohttp.web_response import StreamResponse
from aiohttp.web_urldispatcher import UrlMappingMatchInfo
from multidict import CIMultiDict, CIMultiDictProxy

from gateway.generation import RequestError
from gateway.transport.guard import FrameGuard
from gateway.transport.refusal import ReadyAnswer, ready_answer
from shared.errors import ErrorCode

MAX_HEADER_BYTES: Final = 32 << 10
PROTOCOLS: Final = ("degas", "realtime", "responses")
KEY_PROTOCOL: Final = "openai-insecure-api-key."

EXPECTATION: Final = web.RequestKey("expectation", str)
"""The request's `Expect` header, taken out of its headers: whoever reads the body says 100 first."""
OFFERED_KEY: Final = web.RequestKey("offered_key", str)
"""The key in `Sec-WebSocket-Protocol`, taken out of its headers: libraries log the protocols that they do not know."""

_PROBE: Final = b"HTTP/1.1 102 Processing\r\n\r\n"
_DOUBT_S: Final = 1.0  # a client that stops sending so soon after its request is taken for one that waits
_PROBE_GAP_S: Final = 0.1


class Door(RequestHandler):
    """One connection."""

    __slots__ = (
        "_answered",
        "_asked_s",
        "_half_closed",
        "_header_bytes",
        "_open_payload",
        "_probe",
        "guard",
        "say",
    )

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.guard: FrameGuard | None = None
        self.say: Callable[[], None] | None = None  # a stream under way: writes a sign of life
        self._answered = 0  # requests whose answer is out, of `_request_count`
        self._asked_s = 0.0
        self._half_closed = False
        self._header_bytes = 0
        self._open_payload: Any = None  # of the last request, while it may still be arriving
        self._probe: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------ bytes in

    def data_received(self, data: bytes) -> None:
        """As aiohttp's, with one bound on all of a header: its own are on each line."""
        if self._payload_parser is not None or self._upgraded:
            super().data_received(data)
            return
        before = self._request_count
        is_header = self._open_payload is None or self._open_payload.is_eof()
        super().data_received(data)
        if self._request_count != before:
            self._header_bytes = 0
            self._asked_s = self._loop.time()
            self._open_payload = self._messages[-1][1] if self._messages else None
        elif is_header and data:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES and not self._close:
                self._refuse_header()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """As aiohttp's, where reading was paused. aiohttp calls it for each body that was read, and parses nothing once more."""
        if self._reading_paused or getattr(
            self, "_buffer_paused", False
        ):  # before aiohttp 3.14.4 there is none
            super().resume_reading(resume_parser)

    def _refuse_header(self) -> None:
        error = RequestError(
            ErrorCode.PAYLOAD_TOO_LARGE, f"the header may have at most {MAX_HEADER_BYTES} bytes"
        )
        self.log_exception("header too large", exc_info=BadHttpMessage("header too large"))
        if self.transport is not None and self._request_count == self._answered:
            self.transport.write(ready_answer(error, status=431).data)
        self.force_close()

    def set_parser(self, parser: Any, data_received_cb: Callable[[], None] | None = None) -> None:
        """aiohttp switches to WebSocket frames: from now on they pass the guard first."""
        assert self.transport is not None
        self.guard = FrameGuard(parser, self.transport)
        super().set_parser(self.guard, data_received_cb)  # type: ignore[arg-type]
        if self._half_closed:
            self.transport.close()  # nothing can be asked over it any more

    # ------------------------------------------------------------ the client stops sending

    def eof_received(self) -> bool | None:  # type: ignore[override]  # asyncio takes a bool
        """True keeps the connection for an answer that is still due: the client may have closed one direction only.

        Whether it has closed both is known only once something is sent to it: then its system objects. A client that
        has just sent its request is given a moment first.
        """
        if self._half_closed:
            return True  # aiohttp read on after a pause, and met the same end again
        if (
            self._payload_parser is not None
            or self._answered >= self._request_count
            or self.transport is None
        ):
            return None
        in_doubt = self._loop.time() - self._asked_s < _DOUBT_S
        if not in_doubt and self.say is None and not self._may_be_probed():
            return None
        self._half_closed = True
        if self._open_payload is not None and not self._open_payload.is_eof():
            self._open_payload.set_exception(RequestPayloadError("the body ended early"))
        self._probe = self._loop.call_later(_DOUBT_S if in_doubt else 0.0, self._send_probe)
        return True

    def _may_be_probed(self) -> bool:
        request = self._current_request
        return request is not None and request.version == (1, 1)

    def _send_probe(self, is_second: bool = False) -> None:
        """Two interim answers: the first makes a client that is gone object, the second notices that it did."""
        self._probe = None
        request = self._current_request
        if request is None or self.transport is None:
            return
        if self.say is not None:
            self.say()
        elif self._may_be_probed() and request.writer.output_size == 0:
            self.transport.write(_PROBE)
        if not is_second:
            self._probe = self._loop.call_later(_PROBE_GAP_S, self._send_probe, True)

    def connection_lost(self, exc: BaseException | None) -> None:
        """As aiohttp's."""
        if self._probe is not None:
            self._probe.cancel()
            self._probe = None
        super().connection_lost(exc)

    # ------------------------------------------------------------ answers

    async def finish_response(
        self, request: Any, resp: StreamResponse, start_time: float | None
    ) -> tuple[StreamResponse, bool]:
        """As aiohttp's; the connection of a half-closed client ends with its last answer."""
        if self._half_closed and not self._messages:
            resp.force_close()
        try:
            if isinstance(resp, ReadyAnswer) and not self._upgraded:
                request._finish()
                return resp, not resp.send(request)  # nothing about it waits
            return await super().finish_response(request, resp, start_time)
        finally:
            self._answered += 1

    def handle_error(
        self,
        request: Any,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> StreamResponse:
        """What aiohttp itself refuses, in the one error shape, without the bytes that it objects to."""
        self.log_exception("malformed", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is under way; another cannot be sent")
        if isinstance(exc, LineTooLong):
            said = "the request line or a header is too long"
            return ready_answer(RequestError(ErrorCode.PAYLOAD_TOO_LARGE, said), status=431)
        if status < 500:
            said = f"this is not a valid HTTP request ({type(exc).__name__})"
            return ready_answer(RequestError(ErrorCode.INVALID_REQUEST, said), status=status)
        return ready_answer(RequestError(ErrorCode.INTERNAL, "an internal error; the log knows more"))


class _Doors(web.Server):
    """Makes a `Door` for each connection."""

    def __call__(self) -> RequestHandler:
        return Door(self, loop=self._loop, **self._kwargs)


class DoorRunner(web.AppRunner):
    """aiohttp's runner with our connections."""

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        make_request = made.request_factory
        app = self.app
        assert isinstance(app, web.Application)

        def make(message: Any, payload: Any, *rest: Any) -> Any:
            cleaned, expectation, key = _clean(message)
            request = make_request(cleaned, payload, *rest)
            if expectation is not None:
                request[EXPECTATION] = expectation
            if key is not None:
                request[OFFERED_KEY] = key
            return request

        return _Doors(
            _straight(app, made.request_handler),
            request_factory=make,
            handler_cancellation=made.handler_cancellation,
            loop=made._loop,
            **made._kwargs,
        )


def _straight(
    app: web.Application, usual: Callable[[Any], Awaitable[StreamResponse]]
) -> Callable[[Any], Awaitable[StreamResponse]]:
    """`usual`, and past the router for posts to paths without variables: finding the same route again and wrapping its handler
    anew is a tenth of a short request's time."""
    known: dict[str, tuple[UrlMappingMatchInfo, Callable[[Any], Awaitable[StreamResponse]]]] = {}
    for route in app.router.routes():
        resource = route.resource
        if route.method != "POST" or not isinstance(resource, web.PlainResource):
            continue
        match = UrlMappingMatchInfo({}, route)
        match.add_app(app)
        match.freeze()
        handler = route.handler
        for middleware in reversed(app.middlewares):
            handler = functools.partial(middleware, handler=handler)
        known[resource.canonical] = match, handler

    def handle(request: Any) -> Awaitable[StreamResponse]:
        found = known.get(request.raw_path) if request.method == "POST" else None
        if found is None:
            return usual(request)
        request._match_info, handler = found
        return handler(request)

    return handle


def _clean(message: Any) -> tuple[Any, str | None, str | None]:
    """The message without the headers that aiohttp acts upon too early, and what they said: `Expect`, an offered key."""
    headers = message.headers
    if "Expect" not in headers and "Sec-WebSocket-Protocol" not in headers:
        return message, None, None
    expectation = headers.get("Expect")
    offered = headers.getall("Sec-WebSocket-Protocol", ())
    changed = CIMultiDict(headers)
    changed.popall("Expect", None)
    names = [name.strip() for line in offered for name in line.split(",")]
    keys = [name.removeprefix(KEY_PROTOCOL) for name in names if name.startswith(KEY_PROTOCOL)]
    known = [name for name in names if name in PROTOCOLS]
    changed.popall("Sec-WebSocket-Protocol", None)
    if known:
        changed["Sec-WebSocket-Protocol"] = ", ".join(known)
    return message._replace(headers=CIMultiDictProxy(changed)), expectation, keys[0] if keys else None
