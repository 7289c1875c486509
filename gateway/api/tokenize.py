"""Owns `/tokenize` and `/detokenize`, as vLLM has them: texts or conversations to ids, ids to text. Gateway's loop."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from gateway.api.fields import Known
from gateway.api.parameters import Json, decode_body, invalid
from gateway.api.prompts import Message, compose_chat
from gateway.api.tools import MAX_TOOLS, Tool, read_tools
from gateway.generation import ChatOptions, Core


class TokenizeBody(Known, kw_only=True):
    """`/tokenize`: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(max_length=4096)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: Json | None = None


class DetokenizeBody(Known, kw_only=True):
    """`/detokenize`."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=1 << 20)]


_decode_tokenize = msgspec.json.Decoder(TokenizeBody).decode
_decode_detokenize = msgspec.json.Decoder(DetokenizeBody).decode


async def tokenize(core: Core, data: bytes) -> Json:
    """The ids of a prompt, or of a conversation as `/v1/chat/completions` would send it. Raises `RequestError`."""
    body = decode_body(_decode_tokenize, data)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either prompt or messages", "prompt")
    model = core.model(body.model)
    if body.prompt is not None:
        if len(body.prompt) > core.config.max_prompt_chars:
            raise invalid(f"at most {core.config.max_prompt_chars} characters are accepted", "prompt")
        start = model.start_ids if body.add_special_tokens is not False else []
        ids = [*start, *await model.encode(body.prompt, parse_special=True)]
    else:
        continues = bool(body.continue_final_message)
        opens = not continues if body.add_generation_prompt is None else body.add_generation_prompt
        variables = body.chat_template_kwargs or {}
        options = (
            None if opens and not continues and not variables else ChatOptions(opens, continues, variables)
        )
        tools = read_tools(body.tools, None, None)
        ids = (await compose_chat(core, model, body.messages or [], options, tools=tools)).ids
    told: Json = {"count": len(ids), "max_model_len": model.card.context_tokens, "tokens": ids}
    if body.return_token_strs:
        told["token_strs"] = [model.tokens.token_text(token_id) for token_id in ids]
    return told


async def detokenize(core: Core, data: bytes) -> Json:
    """The text of ids, special tokens' names included. Raises `RequestError`."""
    body = decode_body(_decode_detokenize, data)
    model = core.model(body.model)
    for place, token_id in enumerate(body.tokens):
        if token_id >= model.card.vocab_size:
            raise invalid(f"token ids are between 0 and {model.card.vocab_size - 1}", f"tokens[{place}]")
    return {"prompt": model.decode(body.tokens, keep_special=True)}
