"""Owns reading a gRPC `GenerateRequest` into what the core needs. Runs on the gateway's loop; no sockets.

Proto3 scalars have no "unset": as vLLM's own servicer does, a zero `top_p` or `repetition_penalty` means "not
given". `text` is a question and goes through the model's own template where it has one; token ids are taken
as they are. A picture is a `data:` URL in `media_refs`; preprocessed tensors are not taken.
"""

from __future__ import annotations

import math

import msgspec
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from gateway.api.parameters import MAX_TOP_LOGPROBS, SamplingFields, choice_count, decode_body, invalid
from gateway.api.pictures import takes_several
from gateway.api.prompts import Prompt, takes_questions, task_prompt
from gateway.api.requests import Length, check_fields, make_requests
from gateway.api.structured import Wanted, constraint
from gateway.generation import Core, GenerateRequest, PreparedImage, RequestError, ServedModel
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
    num_logprobs = params.logprobs if params.HasField("logprobs") else -1
    if params.HasField("logprobs") and not 0 <= num_logprobs <= MAX_TOP_LOGPROBS:
        raise invalid(f"between 0 and {MAX_TOP_LOGPROBS}", "logprobs")
    checked = await check_fields(
        core,
        model,
        fields,
        tenant=tenant,
        num_logprobs=num_logprobs,
        count=choice_count(fields, core.config.max_n),
        wanted=_wanted(params),
        more_stop_ids=params.stop_token_ids,
    )
    prompt_ids = await _read_prompt(core, model, request)
    images = await _read_images(core, model, prompt_ids, request)
    return make_requests(
        checked, request_id, [Prompt(prompt_ids, images)], Length(fields.max_tokens, "max_tokens")
    )


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
        "sampling_params.prompt_logprobs": (params.HasField("prompt_logprobs"), "only output logprobs"),
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


async def _read_prompt(core: Core, model: ServedModel, request: pb.GenerateRequest) -> list[int]:
    card = model.card
    if request.WhichOneof("input") == "tokenized":
        prompt_ids = list(request.tokenized.input_ids)
        if not prompt_ids:
            raise RequestError(
                ErrorCode.INVALID_REQUEST, "no token ids were given", param="tokenized.input_ids"
            )
        if max(prompt_ids) >= card.vocab_size:
            message = f"token ids are between 0 and {card.vocab_size - 1}"
            raise RequestError(ErrorCode.INVALID_REQUEST, message, param="tokenized.input_ids")
        return prompt_ids
    text = request.text
    if not text.strip():
        raise RequestError(ErrorCode.INVALID_REQUEST, "neither tokenized nor text was given", param="text")
    if len(text) > core.config.max_prompt_chars:
        message = f"text is longer than {core.config.max_prompt_chars} characters"
        raise RequestError(ErrorCode.PAYLOAD_TOO_LARGE, message, param="text")
    if takes_questions(card):
        return task_prompt(card, "query", await model.encode(text.strip()))
    # As in `/v1/completions`: the text to the letter, with special tokens' names in it as those tokens.
    return [*model.start_ids, *await model.encode(text, parse_special=True)]


async def _read_images(
    core: Core, model: ServedModel, prompt_ids: list[int], request: pb.GenerateRequest
) -> list[PreparedImage]:
    items = request.media_refs.items
    if not items:
        return []
    if len(items) > 1:
        message = "one picture a request is supported"
        raise RequestError(ErrorCode.UNSUPPORTED, message, param="media_refs.items[1]")
    if items[0].modality not in (common_pb2.IMAGE, common_pb2.MODALITY_UNSPECIFIED):
        message = "only pictures are supported"
        raise RequestError(ErrorCode.UNSUPPORTED, message, param="media_refs.items[0].modality")
    card = model.card
    if takes_several(card):
        message = f"model {card.model_id} has its pictures' places in its chat template; send them to /v1/chat/completions"
        raise RequestError(ErrorCode.UNSUPPORTED, message, param="media_refs.items")
    if card.bos_id is not None and prompt_ids[0] != card.bos_id:
        message = f"the prompt of a picture starts with {card.bos_id}, the picture follows it"
        raise RequestError(ErrorCode.INVALID_REQUEST, message, param="tokenized.input_ids")
    return [await core.prepare_image(model, items[0].url, param="media_refs.items[0].url")]


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
