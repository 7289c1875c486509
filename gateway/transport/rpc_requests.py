"""Owns reading a gRPC `GenerateRequest` into what the core needs. Runs on the gateway's loop; no sockets.

Proto3 scalars have no "unset": as vLLM's own servicer does, a zero `top_p` or `repetition_penalty` means "not
given". `rpc_prompts` reads the prompt and its pictures; preprocessed tensors are not taken.
"""

from __future__ import annotations

import math

import msgspec
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from gateway.api.parameters import MAX_TOP_LOGPROBS, SamplingFields, choice_count, decode_body, invalid
from gateway.api.requests import Length, check_fields, make_requests, unscored
from gateway.api.scored import check_scores
from gateway.api.structured import Wanted, constraint
from gateway.generation import Core, GenerateRequest, RequestError
from gateway.transport.rpc_prompts import read_prompt
from shared.errors import ErrorCode
from shared.protocol import Grammar


async def read_request(
    core: Core, request: pb.GenerateRequest, request_id: str, tenant: str
) -> list[GenerateRequest]:
    """One `GenerateRequest` a sample. Raises `RequestError` naming the field at fault."""
    model = core.model(None)
    params = request.sampling_params
    _refuse_unknown(request)
    _refuse_unsupported(request)
    fields = _fields(params)
    num_logprobs, num_scores = (_number(params, name) for name in ("logprobs", "prompt_logprobs"))
    checked = await check_fields(
        core,
        model,
        fields,
        tenant=tenant,
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_scores,
        count=choice_count(fields, core.config.max_n),
        wanted=_wanted(params),
        more_stop_ids=params.stop_token_ids,
    )
    prompt = await read_prompt(core, model, request)
    if num_scores >= 0:
        check_scores([prompt], num_scores, 1, "prompt_logprobs")
    first, *others = make_requests(checked, request_id, [prompt], Length(fields.max_tokens, "max_tokens"))
    return [first, *map(unscored, others)]


def _number(params: pb.SamplingParams, name: str) -> int:
    """How many log-probabilities a token has; -1: none at all. The schema's own -1, all of the vocabulary, is refused."""
    if not params.HasField(name):
        return -1
    number = int(getattr(params, name))
    if not 0 <= number <= MAX_TOP_LOGPROBS:
        raise invalid(f"between 0 and {MAX_TOP_LOGPROBS}", name)
    return number


def _fields(params: pb.SamplingParams) -> SamplingFields:
    """The parameters as the other interfaces spell and check them. Raises `RequestError`."""
    given: dict[str, object] = {
        "min_p": params.min_p,
        "frequency_penalty": params.frequency_penalty,
        "presence_penalty": params.presence_penalty,
        "min_tokens": params.min_tokens,
        "ignore_eos": params.ignore_eos,
        "stop": list(params.stop),
        "logit_bias": {str(token_id): bias for token_id, bias in params.logit_bias.items()},
    }
    for name in ("n", "top_p", "top_k", "repetition_penalty"):  # in this schema 0 means "not given"
        if getattr(params, name) != 0:
            given[name] = getattr(params, name)
    for name in ("temperature", "max_tokens", "seed"):
        if params.HasField(name):
            given[name] = getattr(params, name)
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise invalid("a finite number is expected", name)
    return decode_body(lambda _: msgspec.convert(given, SamplingFields), b"")


def _refuse_unknown(message: Message, path: str = "") -> None:
    """Raises `RequestError` for a field that this version of the schema does not know, at any level."""
    for unknown in UnknownFieldSet(message):
        param = f"{path}{unknown.field_number}"
        raise invalid("this field number is not known here; leave it out", param)
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        inner = [value] if isinstance(value, Message) else value
        for one in inner:
            _refuse_unknown(one, f"{path}{field.name}.")


def _refuse_unsupported(request: pb.GenerateRequest) -> None:
    params = request.sampling_params
    refusals = {
        "mm_inputs": (request.HasField("mm_inputs") or len(request.extra_mm_inputs) > 0, "use media_refs"),
        "kv_transfer_params": (
            request.HasField("kv_transfer_params") or request.HasField("kv_transfer_params_json"),
            "there is no disaggregated prefill",
        ),
        "sampling_params.structural_tag": (
            params.WhichOneof("constraint") == "structural_tag",
            "use json_schema",
        ),
        "sampling_params.truncate_prompt_tokens": (
            params.HasField("truncate_prompt_tokens"),
            "truncate the prompt before sending it",
        ),
        "sampling_params.include_stop_str_in_output": (
            params.include_stop_str_in_output,
            "stop strings are left out",
        ),
    }
    for name, (is_used, hint) in refusals.items():
        if is_used:
            raise RequestError(ErrorCode.UNSUPPORTED, f"{name} is not supported: {hint}", param=name)


def _wanted(params: pb.SamplingParams) -> Wanted | None:
    """The constraint and its field, as the other interfaces check it. Raises `RequestError`."""
    name = params.WhichOneof("constraint")
    param = f"sampling_params.{name}"
    match name:
        case "json_schema":
            return constraint("json", params.json_schema, param)
        case "json_object":
            return (Grammar("json_object", "{}"), param) if params.json_object else None
        case "regex" | "grammar":
            return constraint(name, getattr(params, name), param)
        case "choice":
            return constraint("choice", list(params.choice.choices), param)
        case _:
            return None
