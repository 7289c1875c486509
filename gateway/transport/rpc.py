"""Owns the gRPC server: `vllm.grpc.engine.VllmEngine`, `grpc.health.v1` and reflection. Runs on the gateway's loop.

The core's callbacks only note tokens; each call's own coroutine writes what has gathered since its last write, so a
slow client gets fewer, larger chunks, and `max_tokens` bounds what is held for it. The schema is `smg-grpc-proto`'s.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Final

import structlog
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc as pb_grpc

from gateway.access import Access, Owner
from gateway.caller import CALLER, caller
from gateway.config import GatewayConfig
from gateway.generation import (
    Delta,
    End,
    GenerateRequest,
    PromptScore,
    RequestError,
    RunningStream,
    ServingCore,
    SpatialObject,
    TokenInfo,
)
from gateway.transport.rpc_door import MAX_METADATA_BYTES, Context, RpcDoor, abort, owner_of
from gateway.transport.rpc_requests import read_request
from shared.errors import ErrorCode, FinishReason

SERVICE: Final = pb.DESCRIPTOR.services_by_name["VllmEngine"].full_name
HEALTH_POLL_S: Final = 0.5
FINISH_REASONS: Final = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.DEADLINE: "abort",
    FinishReason.CANCELLED: "abort",
}

log = structlog.get_logger(__name__)


class Output:
    """One sequence of a call: collects the core's events until the call's coroutine takes them."""

    __slots__ = (
        "_prompt_ids",
        "_wake",
        "end",
        "ids",
        "index",
        "infos",
        "running",
        "scores",
        "taken",
        "wants_scores",
    )

    def __init__(self, index: int, wake: asyncio.Event, request: GenerateRequest) -> None:
        self.index = index
        self.wants_scores = request.sampling.num_prompt_logprobs >= 0
        self.scores: list[PromptScore] = []
        self._prompt_ids = request.prompt_ids
        self.ids: list[int] = []
        self.infos: list[TokenInfo] = []
        self.taken = 0
        self.end: End | None = None
        self.running: RunningStream | None = None
        self._wake = wake

    def on_delta(self, delta: Delta) -> None:
        """See `Listener`."""
        self.ids.extend(delta.token_ids)
        if delta.logprobs:
            self.infos.extend(delta.logprobs)
        if delta.prompt is not None:
            self.scores = delta.prompt
        self._wake.set()

    def on_object(self, found: SpatialObject) -> None:
        """See `Listener`. This schema has no boxes or points; `rpc_requests` never asks for them."""

    def on_end(self, end: End) -> None:
        """See `Listener`."""
        self.end = end
        self._wake.set()

    def take_chunk(self, num_prompt: int) -> pb.GenerateResponse | None:
        """The tokens since the last chunk."""
        start, self.taken = self.taken, len(self.ids)
        if start == self.taken:
            return None
        chunk = pb.GenerateStreamChunk(
            token_ids=self.ids[start:],
            prompt_tokens=num_prompt,
            completion_tokens=self.taken,
            index=self.index,
            output_logprobs=logprobs_message(self.infos[start : self.taken]),
            input_logprobs=None if start else self._scored(),
        )
        return pb.GenerateResponse(chunk=chunk)

    def complete(self) -> pb.GenerateResponse:
        """The last message of this sequence."""
        assert self.end is not None
        usage = self.end.usage
        complete = pb.GenerateComplete(
            output_ids=self.ids,
            finish_reason=FINISH_REASONS[self.end.reason],
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            index=self.index,
            output_logprobs=logprobs_message(self.infos),
            input_logprobs=self._scored(),
        )
        if self.end.stop_string is not None:
            complete.matched_stop_str = self.end.stop_string
        return pb.GenerateResponse(complete=complete)

    def _scored(self) -> pb.InputLogProbs | None:
        """The prompt's log-probabilities, where they were asked for: of all its tokens but the first."""
        if not self.wants_scores:
            return None
        tops = [
            pb.TopLogProbs(
                values=[value for _, value in one.top], token_ids=[token_id for token_id, _ in one.top]
            )
            for one in self.scores
        ]
        return pb.InputLogProbs(
            token_logprobs=[
                pb.InputTokenLogProb(),
                *(pb.InputTokenLogProb(value=one.logprob) for one in self.scores),
            ],
            token_ids=self._prompt_ids,
            top_logprobs=[pb.TopLogProbs(), *tops],
        )


def logprobs_message(infos: list[TokenInfo]) -> pb.OutputLogProbs | None:
    """Log-probabilities in the schema's shape, or None when none were asked for."""
    if not infos:
        return None
    return pb.OutputLogProbs(
        token_logprobs=[info.logprob for info in infos],
        token_ids=[info.token_id for info in infos],
        top_logprobs=[
            pb.TopLogProbs(
                values=[value for _, value in info.top], token_ids=[token_id for token_id, _ in info.top]
            )
            for info in infos
        ],
    )


class Engine(pb_grpc.VllmEngineServicer):  # type: ignore[misc]  # generated without types
    """The service's methods. Those of the schema that Degas has no use for answer UNIMPLEMENTED."""

    def __init__(self, core: ServingCore, config: GatewayConfig, access: Access) -> None:
        self._core = core
        self._config = config
        self._access = access
        self._started_s = time.monotonic()
        self._running: dict[tuple[str, str], list[Output]] = {}  # by tenant and request id

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        """Stream tokens, then one `complete` a sequence."""
        owner = self._owner(context)
        key = (owner.tenant, request.request_id or "grpc_" + secrets.token_hex(12))
        outputs: list[Output] = []
        try:
            if key in self._running:
                raise RequestError(
                    ErrorCode.INVALID_REQUEST, "a request with this request_id is running", param="request_id"
                )
            self._running[key] = outputs
            given = dict(context.invocation_metadata() or ()).get("traceparent")
            CALLER.set(caller("Generate", given if isinstance(given, str) else None, owner.key))
            self._core.begin_request()
            await self._generate(request, key, outputs, context)
        except RequestError as error:
            await abort(context, error)
        finally:  # also when the client cancels or goes away: grpc.aio cancels this coroutine
            if self._running.get(key) is outputs:
                del self._running[key]
            for output in outputs:
                if output.running is not None:
                    output.running.cancel()

    async def _generate(
        self, request: pb.GenerateRequest, key: tuple[str, str], outputs: list[Output], context: Context
    ) -> None:
        wake = asyncio.Event()
        tenant, request_id = key
        prepared = await read_request(self._core, request, request_id, tenant)
        for index, generate in enumerate(prepared):
            output = Output(index, wake, generate)
            outputs.append(output)
            output.running = self._core.submit(generate, output)
        num_prompt = len(prepared[0].prompt_ids)
        pending = list(outputs)
        while pending:
            await wake.wait()
            wake.clear()
            for output in list(pending):
                # Tokens may arrive during a write, so check for the sequence's end before taking them.
                ended = output.end
                chunk = output.take_chunk(num_prompt) if request.stream else None
                if chunk is not None:
                    await self._write(context, chunk)
                if ended is None:
                    continue
                pending.remove(output)
                if ended.reason is FinishReason.ERROR:
                    raise ended.error or RequestError(ErrorCode.INTERNAL, "the stream failed")
                await self._write(context, output.complete())

    async def _write(self, context: Context, message: pb.GenerateResponse) -> None:
        try:
            async with asyncio.timeout(self._config.slow_client_s):
                await context.write(message)
        except TimeoutError:
            raise RequestError(ErrorCode.SLOW_CLIENT, "the client read nothing for too long") from None

    def _owner(self, context: Context) -> Owner:
        """Whose a call is; the door has let nobody in who is nobody, but a key may be revoked meanwhile."""
        return owner_of(self._access, context.invocation_metadata()) or Owner("?", "?")

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        """Cancel requests by id; ids that are not running are ignored."""
        tenant = self._owner(context).tenant
        for request_id in request.request_ids:
            for output in self._running.get((tenant, request_id), ()):
                if output.running is not None:
                    output.running.cancel()
        return pb.AbortResponse()

    async def HealthCheck(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:
        """Whether new work would be served, and why not."""
        healthy, message = self._core.readiness()
        return pb.HealthCheckResponse(healthy=healthy, message=message)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        """The default model's card."""
        try:
            card = self._core.model(None).card
        except RequestError as error:
            await abort(context, error)
        return pb.GetModelInfoResponse(
            model_path=card.model_id,
            served_model_name=card.model_id,
            is_generation=True,
            max_context_length=card.context_tokens,
            max_req_input_len=card.context_tokens - 1,
            vocab_size=card.vocab_size,
            supports_vision=card.image is not None,
            model_type=card.family,
            eos_token_ids=card.eos_ids,
            bos_token_id=card.bos_id or 0,
        )

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        """What a router needs before it sends work: how many requests run, and which media are taken."""
        return pb.GetServerInfoResponse(
            active_requests=sum(len(outputs) for outputs in self._running.values()),
            uptime_seconds=time.monotonic() - self._started_s,
            server_type="degas",
            data_parallel_size=1,
            mm_processor="inprocess",
            mm_media_ref_schemes="data",
            mm_processor_source="default",
        )


class GrpcServer:
    """A running server; `port` is the one it listens on."""

    def __init__(self, server: aio.Server, port: int, health_task: asyncio.Task[None]) -> None:
        self.port = port
        self._server = server
        self._health_task = health_task

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls at once, let running ones go on for `grace_s`, then end them. Idempotent."""
        self._health_task.cancel()
        await self._server.stop(grace_s)


async def start_grpc(core: ServingCore, config: GatewayConfig, access: Access) -> GrpcServer:
    """Listen on `config.grpc_port` and serve until `stop`. Raises OSError when the port is taken."""
    ping_ms = max(1000, round(config.life_sign_s * 1000))
    options = [
        (
            "grpc.so_reuseport",
            int(config.gateways > 1),
        ),  # otherwise a taken port is an error, not a shared one
        ("grpc.max_receive_message_length", config.max_body_bytes),
        ("grpc.max_concurrent_streams", 1024),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.keepalive_time_ms", ping_ms),  # HTTP/2 pings, as long as a call waits
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),  # 0: any number of them
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
    server = aio.server(interceptors=[RpcDoor(access, config)], options=options)
    engine = Engine(core, config, access)
    pb_grpc.add_VllmEngineServicer_to_server(engine, server)
    probe = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(probe, server)
    names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    host = f"[{config.host}]" if ":" in config.host else config.host
    try:
        port = server.add_insecure_port(f"{host}:{config.grpc_port or 0}")
    except RuntimeError as error:
        raise OSError(f"cannot listen on {host}:{config.grpc_port} for gRPC: {error}") from None
    await server.start()
    task = asyncio.create_task(follow_readiness(core, probe), name="grpc-health")
    log.info("grpc_listening", host=config.host, port=port)
    return GrpcServer(server, port, task)


async def follow_readiness(core: ServingCore, probe: health.aio.HealthServicer) -> None:
    """Keep the health service's answer equal to the core's readiness."""
    status: int | None = None
    while True:
        is_ready, _ = core.readiness()
        serving = health_pb2.HealthCheckResponse.SERVING
        now = serving if is_ready else health_pb2.HealthCheckResponse.NOT_SERVING
        if now != status:
            status = now
            for name in ("", SERVICE):
                await probe.set(name, status)
        await asyncio.sleep(HEALTH_POLL_S)
