"""gRPC in the field's own schema, through grpc's own client, health stub and reflection database."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from shared.errors import ErrorCode, FinishReason
from shared.image_spec import ImageLayout, ImageSpec, OneCrop
from shared.protocol import TokenLogprobs, pack_i32, unpack_i32
from tests.contract.chat_model import chat_model
from tests.contract.test_responses import picture_url
from tests.fake_worker import CARD, End, FakeWorker, Token, Wait, ids_text, text_ids
from tests.gateway_thread import GatewayThread
from tests.keys import KEY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def worker() -> Iterator[FakeWorker]:
    with FakeWorker() as worker:
        yield worker


@pytest.fixture(scope="module")
def gateway(worker: FakeWorker) -> Iterator[GatewayThread]:
    with GatewayThread(workers=[worker.endpoint], grpc_port=0) as gateway:
        gateway.wait_ready()
        yield gateway


@pytest.fixture(autouse=True)
def fresh_script(worker: FakeWorker) -> None:
    worker.reply("Hello")
    worker.submits.clear()
    worker.cancelled.clear()


@pytest.fixture
def channel(gateway: GatewayThread) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{gateway.gateway.grpc_port}") as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> Any:
    return vllm_engine_pb2_grpc.VllmEngineStub(channel)


def endless(_: object) -> list[Any]:
    """Tokens for a minute."""
    return [action for _ in range(6000) for action in (Token(text_ids("x")[0]), Wait(0.01))]


def test_generate_streams_chunks_and_completes(stub: Any, worker: FakeWorker) -> None:
    request = pb.GenerateRequest(
        request_id="g1",
        tokenized=pb.TokenizedInput(input_ids=[0, *text_ids("hi")]),
        sampling_params=pb.SamplingParams(temperature=0.5, top_p=0.25, seed=3, max_tokens=40),
        stream=True,
    )
    *chunks, last = stub.Generate(request, timeout=10)
    ids = [token_id for message in chunks for token_id in message.chunk.token_ids]
    assert ids_text(ids) == "Hello"
    assert chunks[-1].chunk.completion_tokens == 5
    assert list(last.complete.output_ids) == ids and last.complete.finish_reason == "stop"
    assert last.complete.prompt_tokens == 3
    submit = worker.submits[-1]
    assert unpack_i32(submit.prompt).tolist() == [0, *text_ids("hi")]
    assert (submit.sampling.temperature, submit.sampling.top_p, submit.sampling.seed) == (0.5, 0.25, 3)


def test_without_stream_there_is_one_message(stub: Any) -> None:
    (only,) = stub.Generate(pb.GenerateRequest(text="hi"), timeout=10)
    assert ids_text(list(only.complete.output_ids)) == "Hello"


def test_text_goes_through_the_models_template_with_its_picture(stub: Any, worker: FakeWorker) -> None:
    media = pb.MediaRefs(items=[pb.MediaRef(modality=common_pb2.IMAGE, url=picture_url())])
    list(stub.Generate(pb.GenerateRequest(text="hi", media_refs=media), timeout=10))
    submit = worker.submits[-1]
    templates = CARD.templates
    expected = [0, *templates["query_prefix"], *text_ids("hi"), *templates["query_suffix"]]
    assert unpack_i32(submit.prompt).tolist() == expected
    assert len(submit.images) == 1 and submit.images[0].runs == [(1, 64)]


def test_samples_carry_their_index_and_differ_in_seed(stub: Any, worker: FakeWorker) -> None:
    request = pb.GenerateRequest(text="hi", sampling_params=pb.SamplingParams(n=3, seed=7), stream=True)
    messages = list(stub.Generate(request, timeout=10))
    complete = [message.complete for message in messages if message.HasField("complete")]
    assert sorted(one.index for one in complete) == [0, 1, 2]
    assert sorted(submit.sampling.seed for submit in worker.submits) == [7, 8, 9]


def test_limits_and_stop_strings_have_their_reasons(stub: Any) -> None:
    request = pb.GenerateRequest(text="hi", sampling_params=pb.SamplingParams(max_tokens=2))
    (only,) = stub.Generate(request, timeout=10)
    assert only.complete.finish_reason == "length"
    request = pb.GenerateRequest(text="hi", sampling_params=pb.SamplingParams(stop=["lo"]))
    (only,) = stub.Generate(request, timeout=10)
    assert (only.complete.finish_reason, only.complete.matched_stop_str) == ("stop", "lo")


def test_logprobs_come_with_their_tokens(stub: Any, worker: FakeWorker) -> None:
    token = text_ids("a")[0]
    logprobs = TokenLogprobs(0, 0, -0.5, pack_i32([token, 11]), [-0.5, -2.0])
    worker.script = lambda _: [Token(token, logprob=logprobs), End()]
    request = pb.GenerateRequest(text="hi", sampling_params=pb.SamplingParams(logprobs=2), stream=True)
    first, last = stub.Generate(request, timeout=10)
    for said in (first.chunk.output_logprobs, last.complete.output_logprobs):
        assert list(said.token_ids) == [token] and list(said.token_logprobs) == [-0.5]
        assert list(said.top_logprobs[0].token_ids) == [token, 11]


@pytest.mark.parametrize("stream", [True, False])
def test_a_prompts_log_probabilities_come_once(stub: Any, worker: FakeWorker, stream: bool) -> None:
    """With the first chunk and the last message of the first sample; the first token of a prompt has none."""
    prompt = [0, *text_ids("ab")]
    request = pb.GenerateRequest(
        tokenized=pb.TokenizedInput(input_ids=prompt),
        sampling_params=pb.SamplingParams(prompt_logprobs=2, n=2),
        stream=stream,
    )
    messages = list(stub.Generate(request, timeout=10))
    told = [getattr(message, message.WhichOneof("response")) for message in messages]
    scored = [one for one in told if one.HasField("input_logprobs")]
    assert len(scored) == 1 + stream and all(one.index == 0 for one in scored)
    assert scored[0] is told[[one.index for one in told].index(0)], "it comes first"
    for one in scored:
        said = one.input_logprobs
        assert list(said.token_ids) == prompt
        assert [score.HasField("value") for score in said.token_logprobs] == [False, True, True]
        assert [score.value for score in said.token_logprobs[1:]] == [-0.25, -0.5]
        assert [len(top.token_ids) for top in said.top_logprobs] == [0, 2, 2]
        assert list(said.top_logprobs[1].values) == [0.0, -0.5]
    assert sorted(submit.sampling.num_prompt_logprobs for submit in worker.submits) == [-1, 2]


def test_a_cancelled_call_is_cancelled_in_the_worker(stub: Any, worker: FakeWorker) -> None:
    worker.script = endless
    call = stub.Generate(pb.GenerateRequest(text="hi", stream=True), timeout=30)
    next(call)
    call.cancel()
    assert len(worker.wait_cancelled(1)) == 1


def test_abort_ends_a_running_request(stub: Any, worker: FakeWorker) -> None:
    worker.script = endless
    call = stub.Generate(pb.GenerateRequest(request_id="stop-me", text="hi", stream=True), timeout=30)
    next(call)
    stub.Abort(pb.AbortRequest(request_ids=["unknown", "stop-me"]), timeout=5)
    last = list(call)[-1]
    assert last.complete.finish_reason == "abort"
    assert len(worker.wait_cancelled(1)) == 1


def test_a_running_request_id_cannot_be_used_twice(stub: Any, worker: FakeWorker) -> None:
    worker.script = endless
    request = pb.GenerateRequest(request_id="twice", text="hi", stream=True)
    call = stub.Generate(request, timeout=30)
    next(call)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(request, timeout=5))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    next(call)  # the first goes on
    call.cancel()


@pytest.mark.parametrize(
    "request_message",
    [
        pb.GenerateRequest(),
        pb.GenerateRequest(tokenized=pb.TokenizedInput()),
        pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[2**32 - 1])),
        pb.GenerateRequest(text="x", sampling_params=pb.SamplingParams(temperature=float("nan"))),
        pb.GenerateRequest(text="x", sampling_params=pb.SamplingParams(temperature=-1)),
        pb.GenerateRequest(text="x", sampling_params=pb.SamplingParams(top_p=2)),
        pb.GenerateRequest(text="x", sampling_params=pb.SamplingParams(n=1000)),
        pb.GenerateRequest(text="x", sampling_params=pb.SamplingParams(max_tokens=0)),
        pb.GenerateRequest(text="x", sampling_params=pb.SamplingParams(max_tokens=2**32 - 1)),
        pb.GenerateRequest(text="x", sampling_params=pb.SamplingParams(logprobs=-1)),
        pb.GenerateRequest(text="x", sampling_params=pb.SamplingParams(prompt_logprobs=-1)),
        pb.GenerateRequest(text="x", sampling_params=pb.SamplingParams(structural_tag="x")),
        pb.GenerateRequest(text="x", sampling_params=pb.SamplingParams(top_k=2**32 - 1)),
        pb.GenerateRequest(text="x", sampling_params=pb.SamplingParams(logit_bias={-1: 1.0})),
        pb.GenerateRequest(text="x", sampling_params=pb.SamplingParams(stop=[""])),
        pb.GenerateRequest(text="x", sampling_params=pb.SamplingParams(stop_token_ids=[2**32 - 1])),
        pb.GenerateRequest(text="x", mm_inputs=pb.MultimodalInputs()),
        pb.GenerateRequest(text="x", media_refs=pb.MediaRefs(items=[pb.MediaRef(url="http://x/y.png")])),
        pb.GenerateRequest(text="x", media_refs=pb.MediaRefs(items=[pb.MediaRef(url="file:///etc/passwd")])),
        pb.GenerateRequest(text="x" * 5000),
        pb.GenerateRequest(
            tokenized=pb.TokenizedInput(input_ids=[0, 20]),
            media_refs=pb.MediaRefs(items=[pb.MediaRef(url="data:,"), pb.MediaRef(url="data:,")]),
        ),
        pb.GenerateRequest(
            text="x",
            media_refs=pb.MediaRefs(items=[pb.MediaRef(url=picture_url())]),
            sampling_params=pb.SamplingParams(prompt_logprobs=0),
        ),
    ],
)
def test_wrong_requests_are_invalid_arguments(stub: Any, request_message: pb.GenerateRequest) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(request_message, timeout=5))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value.details()
    assert "degas-code" in dict(caught.value.trailing_metadata())


def test_refusals_and_failures_have_their_status(stub: Any, worker: FakeWorker) -> None:
    worker.reject(ErrorCode.QUEUE_FULL, retry_after_s=2.0)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(pb.GenerateRequest(text="hi"), timeout=5))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "2000"
    worker.script = lambda _: [Token(20), End(FinishReason.ERROR, ErrorCode.NUMERICAL_ERROR, "NaN")]
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(pb.GenerateRequest(text="hi", stream=True), timeout=5))
    assert caught.value.code() is grpc.StatusCode.INTERNAL


def test_model_and_server_are_described(stub: Any) -> None:
    model = stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=5)
    assert (model.served_model_name, model.max_context_length, model.supports_vision) == (
        "fake-vl",
        2048,
        True,
    )
    assert list(model.eos_token_ids) == [0]
    server = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=5)
    assert server.server_type == "degas" and server.mm_media_ref_schemes == "data"
    with pytest.raises(grpc.RpcError) as caught:
        stub.Embed(pb.EmbedRequest(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_health_follows_readiness() -> None:
    with FakeWorker() as worker, GatewayThread(workers=[worker.endpoint], grpc_port=0) as gateway:
        gateway.wait_ready()
        with grpc.insecure_channel(f"127.0.0.1:{gateway.gateway.grpc_port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            engine = vllm_engine_pb2_grpc.VllmEngineStub(channel)
            watch = health.Watch(
                health_pb2.HealthCheckRequest(service="vllm.grpc.engine.VllmEngine"), timeout=20
            )
            statuses = (message.status for message in watch)
            serving = health_pb2.HealthCheckResponse.SERVING
            assert any(status == serving for status in statuses)
            assert health.Check(health_pb2.HealthCheckRequest(), timeout=5).status == serving
            assert engine.HealthCheck(pb.HealthCheckRequest(), timeout=5).healthy
            worker.die()
            assert any(status == health_pb2.HealthCheckResponse.NOT_SERVING for status in statuses)
            assert not engine.HealthCheck(pb.HealthCheckRequest(), timeout=5).healthy
            watch.cancel()


def test_reflection_tells_the_schema(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert {"vllm.grpc.engine.VllmEngine", "grpc.health.v1.Health"} <= set(database.get_services())
    service = DescriptorPool(database).FindServiceByName("vllm.grpc.engine.VllmEngine")
    assert service.methods_by_name["Generate"].input_type.full_name == "vllm.grpc.engine.GenerateRequest"


def test_every_method_needs_the_key_but_the_probe(worker: FakeWorker) -> None:
    with GatewayThread(workers=[worker.endpoint], grpc_port=0, api_keys=KEY) as gateway:
        gateway.wait_ready()
        with grpc.insecure_channel(f"127.0.0.1:{gateway.gateway.grpc_port}") as channel:
            paths = [
                f"/{service.full_name}/{method.name}"
                for service in (
                    pb.DESCRIPTOR.services_by_name["VllmEngine"],
                    health_pb2.DESCRIPTOR.services_by_name["Health"],
                )
                for method in service.methods
            ]
            paths += [
                "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                "/no.such.Service/Method",
            ]
            for path in paths:
                for metadata in ((), (("authorization", "Bearer wrong-key-1"),), (("authorization", KEY),)):
                    call = channel.unary_unary(path)
                    if path == "/grpc.health.v1.Health/Check":
                        assert call(b"", timeout=5)
                        continue
                    with pytest.raises(grpc.RpcError) as caught:
                        call(b"", timeout=5, metadata=metadata)
                    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, path
            stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
            metadata = (("authorization", f"Bearer {KEY}"),)
            assert list(stub.Generate(pb.GenerateRequest(text="hi"), timeout=5, metadata=metadata))
            assert worker.submits[-1].tenant


def test_stopping_ends_calls_with_unavailable(worker: FakeWorker) -> None:
    gateway = GatewayThread(workers=[worker.endpoint], grpc_port=0)
    with gateway:
        gateway.wait_ready()
        worker.script = endless
        channel = grpc.insecure_channel(f"127.0.0.1:{gateway.gateway.grpc_port}")
        call = vllm_engine_pb2_grpc.VllmEngineStub(channel).Generate(
            pb.GenerateRequest(text="hi", stream=True), timeout=30
        )
        next(call)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    channel.close()


def test_a_taken_port_is_an_error(gateway: GatewayThread, worker: FakeWorker) -> None:
    with (
        pytest.raises(OSError, match="gRPC"),
        GatewayThread(workers=[worker.endpoint], grpc_port=gateway.gateway.grpc_port),
    ):
        pass


# ---------------------------------------------------------------- what is still arriving, what is unknown


GENERATE = "/vllm.grpc.engine.VllmEngine/Generate"


def unfinished(port: int | None, metadata: Any = ()) -> Any:
    """A call whose message never comes."""
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    never = threading.Event()
    call = channel.stream_stream(GENERATE)(iter(never.wait, None), metadata=metadata, timeout=20)
    try:
        list(call)
    except grpc.RpcError as error:
        return error
    finally:
        never.set()
        channel.close()
    raise AssertionError("it was answered")


def test_a_stranger_is_refused_before_its_message_comes(worker: FakeWorker) -> None:
    with GatewayThread(workers=[worker.endpoint], grpc_port=0, api_keys=KEY, body_timeout_s=0.4) as gateway:
        gateway.wait_ready()
        started_s = time.monotonic()
        assert unfinished(gateway.gateway.grpc_port).code() is grpc.StatusCode.UNAUTHENTICATED
        assert time.monotonic() - started_s < 0.4
        for _ in range(3):  # nor does it have to wait for other strangers' probes
            with grpc.insecure_channel(f"127.0.0.1:{gateway.gateway.grpc_port}") as channel:
                probe = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert probe.status != health_pb2.HealthCheckResponse.UNKNOWN
        error = unfinished(gateway.gateway.grpc_port, [("authorization", f"Bearer {KEY}")])
        assert dict(error.trailing_metadata())["degas-code"] == ErrorCode.SLOW_CLIENT


@pytest.mark.parametrize(
    ("place", "param"),
    [("", "1900"), ("sampling_params", "sampling_params.1900"), ("media_refs", "media_refs.1900")],
)
def test_unknown_fields_are_refused_by_number(stub: Any, place: str, param: str) -> None:
    request = pb.GenerateRequest(text="hi", sampling_params=pb.SamplingParams(max_tokens=5))
    unknown = b"\xe0\x76\x01"  # field 1900, a varint
    message = getattr(request, place) if place else request
    message.MergeFromString(unknown)
    if place:
        getattr(request, place).SetInParent()
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(request, timeout=10))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(caught.value.trailing_metadata())["degas-param"] == param


def test_a_text_is_read_to_the_letter_with_its_special_tokens() -> None:
    """As in `/v1/completions`: clients send what a chat template made."""
    with chat_model(grpc_port=0) as (gateway, worker):
        worker.reply("ok")
        with grpc.insecure_channel(f"127.0.0.1:{gateway.gateway.grpc_port}") as channel:
            stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
            list(stub.Generate(pb.GenerateRequest(text=" <|5|>hi\n"), timeout=10))
        prompt = unpack_i32(worker.submits[0].prompt).tolist()
        assert prompt[-5:] == [*text_ids(" "), 5, *text_ids("hi\n")]


# ---------------------------------------------------------------- several pictures

PLACE, RUN = "<|5|>", "<|6|>"
PICTURES = ImageSpec(
    8, 3, OneCrop(), layout=ImageLayout(placeholder=PLACE, run=RUN, whole=f"[{RUN}]"), max_images=2
)


@pytest.fixture(scope="module")
def pictured() -> Iterator[tuple[Any, FakeWorker]]:
    with (
        chat_model(grpc_port=0, image=PICTURES) as (gateway, worker),
        grpc.insecure_channel(f"127.0.0.1:{gateway.gateway.grpc_port}") as channel,
    ):
        yield vllm_engine_pb2_grpc.VllmEngineStub(channel), worker


def media(*urls: str) -> pb.MediaRefs:
    return pb.MediaRefs(items=[pb.MediaRef(modality=common_pb2.IMAGE, url=url) for url in urls])


@pytest.mark.parametrize("is_text", [True, False])
def test_each_picture_stands_where_the_prompt_has_its_place(
    pictured: tuple[Any, FakeWorker], is_text: bool
) -> None:
    """The place becomes what the model was trained on, here brackets around the picture's positions."""
    stub, worker = pictured
    worker.reply("ok")
    urls = (picture_url(), picture_url((0, 0, 255)))
    if is_text:
        request = pb.GenerateRequest(text=f"a{PLACE}b{PLACE}", media_refs=media(*urls))
    else:
        ids = [0, *text_ids("a"), 5, *text_ids("b"), 5]
        request = pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=ids), media_refs=media(*urls))
    list(stub.Generate(request, timeout=10))
    submit = worker.submits[-1]
    first = [] if is_text else [0]
    assert unpack_i32(submit.prompt).tolist() == [*first, *text_ids("a[]b[]")]
    assert [image.runs for image in submit.images] == [[(len(first) + 2, 3)], [(len(first) + 5, 3)]]
    assert submit.images[0].digest != submit.images[1].digest


@pytest.mark.parametrize(
    ("request_message", "param"),
    [
        (pb.GenerateRequest(text="a", media_refs=media(picture_url())), "text"),
        (pb.GenerateRequest(text=f"a{PLACE}{RUN}", media_refs=media(picture_url())), "text"),
        (
            pb.GenerateRequest(
                tokenized=pb.TokenizedInput(input_ids=[0, 5, 5]), media_refs=media(picture_url())
            ),
            "tokenized.input_ids",
        ),
        (
            pb.GenerateRequest(text=PLACE * 3, media_refs=media(*[picture_url()] * 3)),
            "media_refs.items[2].url",
        ),
        (
            pb.GenerateRequest(text=PLACE * 2, media_refs=media(picture_url(), "data:image/png;base64,AA")),
            "media_refs.items[1].url",
        ),
        (
            pb.GenerateRequest(
                text=PLACE,
                media_refs=pb.MediaRefs(items=[pb.MediaRef(modality=common_pb2.VIDEO, url="data:,")]),
            ),
            "media_refs.items[0].modality",
        ),
    ],
)
def test_pictures_without_a_place_are_refused_by_field(
    pictured: tuple[Any, FakeWorker], request_message: pb.GenerateRequest, param: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(pictured[0].Generate(request_message, timeout=10))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value.details()
    assert dict(caught.value.trailing_metadata())["degas-param"] == param


def test_a_question_may_have_several_pictures(stub: Any, worker: FakeWorker) -> None:
    """Before the question, as chat has them. Among token ids there is no mark for their places."""
    urls = media(picture_url(), picture_url((0, 0, 255)))
    list(stub.Generate(pb.GenerateRequest(text="hi", media_refs=urls), timeout=10))
    submit = worker.submits[-1]
    assert [image.runs for image in submit.images] == [[(1, 64)], [(1, 64)]]
    assert submit.images[0].digest != submit.images[1].digest
    too_many = media(*[picture_url()] * (CARD.image.max_images + 1 if CARD.image else 1))
    with pytest.raises(grpc.RpcError, match="a request"):
        list(stub.Generate(pb.GenerateRequest(text="hi", media_refs=too_many), timeout=10))
