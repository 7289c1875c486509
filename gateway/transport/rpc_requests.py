"""Owns reading a gRPC `GenerateRequest` into what the core needs. Runs on the gateway's loop; no sockets.

Proto3 scalars have no "unset": as vLLM's own servicer does, a zero `top_p` or `repetition_penalty` means "not
given". `text` is a question and goes through the model's own template where it has one; token ids are taken
as they are. A picture is a `data:` URL in `media_refs`; preprocessed tensors are not taken.
"""

from __future__ import annotations

import secrets

import msgspec
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from gateway.api.prompts import task_prompt
from gateway.generation import GenerateRequest, PreparedImage, RequestError
from gateway.service import Service
from shared.errors import ErrorCode
from shared.protocol import Grammar, ModelCard, Sampling


async def read_request(
    core: Service, request: pb.GenerateRequest, request_id: str, tenant: str
) -> list[GenerateRequest]:
    """One `GenerateRequest` a sample. Raises `RequestError` naming the field at fault."""
    card = core.card(None)
    params = request.sampling_params
    num_samples = params.n or 1
    if num_samples > core.config.max_n:
        raise RequestError(
            ErrorCode.INVALID_REQUEST,
            f"n is {num_samples}; at most {core.config.max_n}",
            param="sampling_params.n",
        )
    _refuse_unsupported(request)
    core.check_capacity(card.model_id, tenant, num_samples)
    prompt_ids = await _read_prompt(core, card, request)
    images = await _read_images(core, card, prompt_ids, request)
    seed = params.seed if params.HasField("seed") else secrets.randbits(62)
    room = core.room(card.model_id, len(prompt_ids), len(images))
    return [
        GenerateRequest(
            request_id=request_id if num_samples == 1 else f"{request_id}-{index}",
            model_id=card.model_id,
            prompt_ids=prompt_ids,
            max_tokens=params.max_tokens
            if params.HasField("max_tokens")
            else min(card.default_max_tokens, room),
            sampling=_sampling(params, card, seed + index),
            images=images,
            stop=list(params.stop),
            stop_ids=[*([] if params.ignore_eos else card.eos_ids), *params.stop_token_ids],
            tenant=tenant,
            grammar=_grammar(params),
        )
        for index in range(num_samples)
    ]


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


async def _read_prompt(core: Service, card: ModelCard, request: pb.GenerateRequest) -> list[int]:
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
    text = request.text.strip()
    if not text:
        raise RequestError(ErrorCode.INVALID_REQUEST, "neither tokenized nor text was given", param="text")
    if len(text) > core.config.max_prompt_chars:
        message = f"text is longer than {core.config.max_prompt_chars} characters"
        raise RequestError(ErrorCode.PAYLOAD_TOO_LARGE, message, param="text")
    text_ids = await core.encode_async(card.model_id, text)
    if "query_prefix" in card.templates:
        return task_prompt(card, "query", text_ids)
    return [*([] if card.bos_id is None else [card.bos_id]), *text_ids]


async def _read_images(
    core: Service, card: ModelCard, prompt_ids: list[int], request: pb.GenerateRequest
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
    if card.bos_id is not None and prompt_ids[0] != card.bos_id:
        message = f"the prompt of a picture starts with {card.bos_id}, the picture follows it"
        raise RequestError(ErrorCode.INVALID_REQUEST, message, param="tokenized.input_ids")
    return [await core.prepare_image(card.model_id, items[0].url, param="media_refs.items[0].url")]


def _sampling(params: pb.SamplingParams, card: ModelCard, seed: int) -> Sampling:
    checks = (
        ("temperature", params.temperature, 0.0, 2.0),
        ("top_p", params.top_p, 0.0, 1.0),
        ("min_p", params.min_p, 0.0, 1.0),
        ("frequency_penalty", params.frequency_penalty, -2.0, 2.0),
        ("presence_penalty", params.presence_penalty, -2.0, 2.0),
        ("repetition_penalty", params.repetition_penalty, 0.0, 10.0),
        ("logprobs", params.logprobs, 0, 20),
    )
    for name, value, low, high in checks:
        if not low <= value <= high:  # also refuses NaN
            raise RequestError(
                ErrorCode.INVALID_REQUEST,
                f"{name} must be between {low} and {high}",
                param=f"sampling_params.{name}",
            )
    return Sampling(
        temperature=params.temperature if params.HasField("temperature") else card.default_temperature,
        top_k=params.top_k,
        top_p=params.top_p or card.default_top_p,
        min_p=params.min_p,
        seed=seed % (1 << 63),
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty or 1.0,
        logit_bias=dict(params.logit_bias),
        suppress_ids=card.suppress_ids,
        num_logprobs=params.logprobs if params.HasField("logprobs") else -1,
        min_tokens=params.min_tokens,
    )


def _grammar(params: pb.SamplingParams) -> Grammar | None:
    match params.WhichOneof("constraint"):
        case "json_schema":
            return Grammar("json_schema", params.json_schema)
        case "json_object":
            return Grammar("json_object", "{}") if params.json_object else None
        case "regex":
            return Grammar("regex", params.regex)
        case "grammar":
            return Grammar("lark", params.grammar)
        case "choice":
            return Grammar("choice", msgspec.json.encode(list(params.choice.choices)).decode())
        case _:
            return None
