"""Owns what a gRPC caller may send before its key is known, and how its message arrives afterwards. Gateway's loop.

grpc would read a whole message of a call before anybody looks at it, however slowly it comes. So every method with one
request message is served as if it took a stream of them: the key first, then a place, then the message within a time.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Final, NoReturn, TypeAlias

import grpc
from grpc import aio

from gateway.access import Access, Owner, key_of
from gateway.config import GatewayConfig
from gateway.errors import grpc_status, retry_after_s
from gateway.generation import RequestError
from shared.errors import ErrorCode

OPEN_METHODS: Final = frozenset({"/grpc.health.v1.Health/Check"})
MAX_METADATA_BYTES: Final = 16 << 10
_MIN_PLACES: Final = 8

Context: TypeAlias = "aio.ServicerContext[Any, Any]"

_CODES = {code.value[0]: code for code in grpc.StatusCode}


async def abort(context: Context, error: RequestError) -> NoReturn:
    """End the call with an error's status; its finer code and a wait travel as trailing metadata."""
    trailing: list[tuple[str, str]] = [("degas-code", error.code.value)]
    if error.param:
        trailing.append(("degas-param", error.param))
    wait_s = retry_after_s(error)
    if wait_s > 0:
        trailing.append(("grpc-retry-pushback-ms", str(round(wait_s * 1000))))
    await context.abort(_CODES[grpc_status(error)], error.message, tuple(trailing))
    raise AssertionError("abort returned")


def owner_of(access: Access, metadata: Iterable[tuple[str, str | bytes]] | None) -> Owner | None:
    """Whose a call is by the key in its metadata; None when a key is needed and is not there, or is wrong."""
    given = dict(metadata or ()).get("authorization")
    return access.owner(key_of({"Authorization": given}) if isinstance(given, str) else None)


class RpcDoor(aio.ServerInterceptor):  # type: ignore[misc]  # grpc ships no types
    """Refuses every method without a key, except the health check that probes use, and receives the messages."""

    def __init__(self, access: Access, config: GatewayConfig) -> None:
        self._access = access
        self._timeout_s = config.body_timeout_s
        # How many of one tenant's messages may be arriving at once; each may be as long as the limit.
        self._num_places = max(_MIN_PLACES, config.max_unfinished_bytes // config.max_body_bytes)
        self._places: dict[str, asyncio.Semaphore] = {}
        self._refuse = grpc.stream_stream_rpc_method_handler(self._answer)

    @staticmethod
    async def _answer(requests: AsyncIterator[object], context: Context) -> None:
        """Refuse without reading: `requests` stays where it is."""
        await abort(
            context,
            RequestError(ErrorCode.UNAUTHORIZED, "an API key is needed in the metadata: authorization"),
        )

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """See `grpc.aio.ServerInterceptor`."""
        owner = owner_of(self._access, details.invocation_metadata)
        if owner is None and details.method not in OPEN_METHODS:
            return self._refuse
        handler = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler
        inner = handler.unary_stream if handler.response_streaming else handler.unary_unary
        if not inspect.iscoroutinefunction(inner):
            return handler  # the schema's methods that nobody implements

        async def serve(requests: AsyncIterator[object], context: Context) -> object:
            if owner is None:  # a probe: answered for the whole server, whatever its message would be
                return await inner(handler.request_deserializer(b""), context)
            return await inner(await self._receive(owner.tenant, context), context)

        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return make(serve, handler.request_deserializer, handler.response_serializer)

    async def _receive(self, tenant: str, context: Context) -> object:
        """The call's one message. Aborts the call when it does not come in time."""
        places = self._places.setdefault(tenant, asyncio.Semaphore(self._num_places))
        message: object = aio.EOF
        try:
            async with asyncio.timeout(self._timeout_s), places:
                message = await context.read()
        except TimeoutError:
            late = f"the message did not arrive within {self._timeout_s:g} s"
            await abort(context, RequestError(ErrorCode.SLOW_CLIENT, late))
        if message is aio.EOF:
            await abort(context, RequestError(ErrorCode.INVALID_REQUEST, "the call ended without a message"))
        return message
