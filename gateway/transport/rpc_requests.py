"""Owns reading a gRPC `GenerateRequest` into what the core needs. Runs on the gateway's loop; no sockets.

Proto3 scalars have no "unset": as vLLM's own servicer does, a zero `top_p` or `repetition_penalty` means "not
given". `text` is a question and goes through the model's own template where it has one; token ids are taken
as they are. A picture is a `data:` URL in `media_refs`; preprocessed tensors are not taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from gateway.generation import Core, GenerateRequest, PreparedImage, RequestError
from shared.errors import ErrorCode
from shared.protocol import Grammar, ModelCard, Sampling

if TYPE_CHECKING:
    from gateway.config import GatewayConfig
