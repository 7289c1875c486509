"""Owns the HTTP application: which route calls what, and the page. Runs on the gateway's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Protocol

from aiohttp import web

from gateway.admin import recording
from gateway.api import (
    anthropic,
    chat,
    completions,
    models,
    moondream,
    ollama,
    ollama_models,
    segments,
    stats,
    tokenize,
)
from gateway.api.answers import Collected, collect
from gateway.api.described import openapi
from gateway.api.parameters import Json
from gateway.config import GatewayConfig
from gateway.core.service import Service
from gateway.decisions.holdings import Holdings
from gateway.generation import Core, GenerateRequest
from gateway.scrape import Scrape
from gateway.transport import sse
from gateway.transport.http import (
    HOLDINGS,
    REQUEST_ID,
    TENANT,
    Boundary,
    Handler,
    admit_body,
    json_response,
    public,
    read_body,
    whole_answer,
)
from gateway.transport.resumption import LAST_EVENT, Resumption, register_streams
from gateway.transport.websocket import register_websocket

WEB_FOLDER: Final = Path(__file__).parent / "web"
SERVICE: Final = web.AppKey("service", Service)
RESUMPTION: Final = web.AppKey("resumption", Resumption)

_PAGE_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".webp": "image/webp",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
}
_SHORT_PATHS: Final = {"index.html": "/", "docs.html": "/docs"}
_CSP: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self' {sockets}; font-src 'self'; manifest-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS: Final = {"Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}


class PreparedRequest(sse.Shape, Protocol):
    """A prepared request of any API: what to submit, and how to say the answer, whole or streamed."""

    requests: list[GenerateRequest]
    stream: bool

    def answer(self, choices: list[Collected]) -> Json: ...


Prepare = Callable[..., Awaitable[Any]]


def create_app(service: Service) -> web.Application:
    """The application over a started (or starting) service."""
    config = service.config
    boundary = Boundary(config, service.metrics, service.access, service.meters)
    app = web.Application(middlewares=[boundary.middleware], client_max_size=config.max_body_bytes)
    app.on_response_prepare.append(boundary.on_prepare)
    app[SERVICE] = service
    app[HOLDINGS] = holdings = Holdings(config.max_unfinished_bytes)
    app[RESUMPTION] = resumption = Resumption(config, service.metrics)
    router = app.router
    for path, prepare in (
        ("/v1/chat/completions", chat.prepare),
        ("/v1/completions", completions.prepare),
        ("/v1/messages", anthropic.prepare),
        ("/api/chat", ollama.prepare_chat),
        ("/api/generate", ollama.prepare_generate),
        ("/v1/query", moondream.prepare_query),
        ("/v1/caption", moondream.prepare_caption),
        ("/v1/detect", moondream.prepare_detect),
        ("/v1/point", moondream.prepare_point),
        ("/v1/segment", segments.prepare_segment),
    ):
        router.add_post(path, _generation(service, prepare, resumption))
    router.add_post("/v1/messages/count_tokens", _told(service, anthropic.count_tokens))
    router.add_post("/tokenize", _told(service, tokenize.tokenize))
    router.add_post("/detokenize", _told(service, tokenize.detokenize))
    router.add_post("/api/show", _told(service, ollama_models.show))
    router.add_get("/api/tags", _listed(service, ollama_models.tags))
    router.add_get("/api/ps", _listed(service, ollama_models.running))
    router.add_get("/api/version", _listed(service, lambda _: ollama_models.version()))
    for name in ollama_models.REFUSED:
        router.add_route("*", f"/api/{name}", _refused(name))
    router.add_get("/v1/models", _listed(service, models.list_models))
    router.add_get("/v1/models/{model_id:.+}", _model(service))
    for path in ("/healthz", "/health"):
        router.add_get(path, _live)
    for path in ("/readyz", "/v1/health/ready"):
        router.add_get(path, _ready(service))
    router.add_get("/metrics", _metrics(service, resumption))
    router.add_get("/v1/stats", _stats(service))
    router.add_get("/openapi.json", _described)
    router.add_get("/debug/trace", recording(service))
    register_streams(app, resumption)
    register_websocket(app, service, config, holdings, service.access, resumption)
    _add_page(app)
    return app


def _generation(service: Service, prepare: Prepare, resumption: Resumption) -> Handler:
    """A handler for one generating route."""
    config: GatewayConfig = service.config

    async def handle(request: web.Request) -> web.StreamResponse:
        if LAST_EVENT in request.headers:  # the same request again, of a client that lost its stream
            return await resumption.resume(request)
        is_resumable = resumption.is_asked(request)
        data = await admit_body(request, service)
        prepared: PreparedRequest = await prepare(
            service, data, request_id=request[REQUEST_ID], tenant=request[TENANT]
        )
        if prepared.stream and is_resumable:
            return await resumption.start(request, service.submit, prepared.requests, prepared)
        if prepared.stream:
            return await sse.respond(
                request, config, service.metrics, service.submit, prepared.requests, prepared
            )
        choices = await collect(service.submit, prepared.requests) if prepared.requests else []
        return whole_answer(prepared.answer(choices))

    return handle


def _listed(service: Service, tell: Callable[[Core], object]) -> Handler:
    """A handler that says what is served."""

    async def handle(request: web.Request) -> web.StreamResponse:
        return json_response(tell(service))

    return handle


def _told(service: Service, tell: Callable[[Core, bytes], Awaitable[object]]) -> Handler:
    """A handler that answers a body at once, without a worker."""

    async def handle(request: web.Request) -> web.StreamResponse:
        return json_response(await tell(service, await read_body(request, service.config)))

    return handle


def _refused(name: str) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        raise ollama_models.refusal(name)

    return handle


def _model(service: Service) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        return json_response(models.model_object(service.model(request.match_info["model_id"])))

    return handle


async def _described(request: web.Request) -> web.StreamResponse:
    # Made once, in some 50 ms: not on the loop, where streams would wait for it.
    document = await asyncio.to_thread(openapi.document)
    return web.Response(body=document, content_type="application/json")


@public("liveness")
async def _live(request: web.Request) -> web.StreamResponse:
    return json_response({"status": "live"})


def _ready(service: Service) -> Handler:
    @public("readiness")
    async def handle(request: web.Request) -> web.StreamResponse:
        ready, reason = service.readiness()
        response = json_response({"status": "ready" if ready else "not ready", "reason": reason})
        if not ready:
            response.set_status(503)
            response.headers["Retry-After"] = "1"
        return response

    return handle


def _metrics(service: Service, resumption: Resumption) -> Handler:
    scrape = Scrape(service, lambda: resumption.journals.num_detached)

    @public("metrics")
    async def handle(request: web.Request) -> web.StreamResponse:
        body = scrape.render()
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    return handle


def _stats(service: Service) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        taking = [worker for worker in service.workers if worker.serves_requests]
        beats = [worker.link.beat for worker in taking if worker.link.beat is not None]
        metrics = service.metrics
        load = stats.Load(
            num_workers=len(taking),
            num_running=sum(beat.num_running for beat in beats),
            num_waiting=sum(beat.num_waiting for beat in beats),
            max_waiting=sum(worker.occupancy.max_waiting for worker in taking),
            num_accepted=sum(metrics.accepted.values()),
            num_timed_out=metrics.ended["deadline"] + metrics.errors["deadline_exceeded"],
        )
        return json_response(stats.stats(service, load))

    return handle


def _add_page(app: web.Application) -> None:
    """Serve the page at `/` and each of its files under its name: a fixed list, so no path leads to other files."""
    if not (WEB_FOLDER / "index.html").is_file():
        return
    for file in sorted(WEB_FOLDER.rglob("*")):
        if file.is_file() and file.suffix in _PAGE_TYPES:
            path = file.relative_to(WEB_FOLDER).as_posix()
            handler = _page_file(file)
            app.router.add_get(f"/{path}", handler)
            if path in _SHORT_PATHS:
                app.router.add_get(_SHORT_PATHS[path], handler)


def _page_file(file: Path) -> Handler:
    headers = {**_PAGE_HEADERS, "Content-Type": _PAGE_TYPES[file.suffix]}
    read = file.read_bytes  # small, and read anew each time so that the page can be edited while it is served

    @public("page")
    async def handle(request: web.Request) -> web.StreamResponse:
        # Browsers differ on whether 'self' covers the page's own WebSocket; the Host was checked before this.
        sockets = f"ws://{request.host} wss://{request.host}"
        return web.Response(
            body=read(), headers={**headers, "Content-Security-Policy": _CSP.format(sockets=sockets)}
        )

    return handle
