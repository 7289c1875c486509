"""Owns what is fuzzed: sound inputs of each parser, how to call it, and which exceptions are its answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.access import Access
from gateway.api import (
    anthropic,
    chat,
    completions,
    moondream,
    ollama,
    ollama_models,
    response_bodies,
    responses,
    tokenize,
)
from gateway.confined import data_urls
from gateway.core.templates import ChatTemplate
from gateway.core.tokens import ModelTokens
from gateway.generation import ChatOptions, RequestError
from gateway.origins import read_origin, same_site
from gateway.schemas.patterns import translate
from gateway.schemas.prepare import prepare, simpler
from shared.grammars import KINDS, GrammarError, spell
from shared.protocol import Grammar
from tests.fake_worker import CARD, byte_tokenizer, text_ids
from tests.fuzz.mutations import mutated_bytes, mutated_json
from tests.unit.gateway.api.fake_core import FakeCore, FakeModel
from tests.unit.gateway.api.test_fields import (
    ANSWER,
    CHAT,
    COMMON,
    CREATE,
    MESSAGES,
    OLLAMA,
    PICTURE,
    RESPONSES,
    SCHEMA,
    SETTINGS,
    TOOL,
)

Make = Callable[[random.Random, list[Any]], bytes]


@dataclass(frozen=True, slots=True)
class Target:
    """A parser: `make` an input of a random number and Hypothesis' values, `call` it; `answers` are no faults."""

    name: str
    make: Make
    call: Callable[[bytes], object]
    answers: tuple[type[BaseException], ...]


def bodies_of(sound: Sequence[Any]) -> Make:
    """Inputs made of JSON values."""
    return lambda rng, donors: mutated_json(rng.choice(sound), rng, donors)


def bytes_of(sound: Sequence[bytes]) -> Make:
    """Inputs made of bytes."""

    def make(rng: random.Random, donors: list[Any]) -> bytes:
        others = [donor.encode(errors="surrogatepass") for donor in donors if isinstance(donor, str)]
        return mutated_bytes(rng.choice(sound), rng, [*others, *sound])

    return make


TEMPLATE = (
    "{%- if tools %}{{ tools | tojson }}{% endif %}{%- for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}"
    "{%- for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}{% endif %}"
)


class TemplatedModel(FakeModel):
    """A model with a real chat template, rendered at once."""

    def __init__(self) -> None:
        super().__init__(
            card=msgspec.structs.replace(
                CARD, templates={}, image=None, family="llama", capabilities=["chat", "completions"]
            )
        )
        self.template = ChatTemplate(TEMPLATE, ModelTokens(byte_tokenizer().to_str().encode()), self.card)
        self.chat_format = self.template.format
        self.template_names = ["default"]

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> list[int]:
        return text_ids(self.template.render(messages, options))


def on_core(
    core: FakeCore, prepare_body: Callable[..., Coroutine[Any, Any, object]], **more: str
) -> Callable[[bytes], object]:
    """A door's preparation, driven without a loop where it does not wait."""

    def call(data: bytes) -> object:
        work = prepare_body(core, data, **more)
        try:
            work.send(None)
        except StopIteration as done:
            return done.value
        except RuntimeError:
            pass  # it wants a loop, and is asked again on one; a fault of its own shows there as well
        work.close()
        return _ON_LOOP.run(prepare_body(core, data, **more))

    return call


def _response(core: FakeCore) -> Callable[[bytes], object]:
    async def both(core: FakeCore, data: bytes) -> object:
        return await responses.prepare(core, response_bodies.parse_body(data), tenant="t")

    return on_core(core, both)


_ON_LOOP = asyncio.Runner()
QUESTIONS = {"request_id": "r", "tenant": "t"}


def api_targets() -> list[Target]:
    """Every route's body, against a model of questions and one with a chat template."""
    asked = FakeCore()
    told = FakeCore(TemplatedModel())
    no_grammar = {
        key: value
        for key, value in CHAT.items()
        if key not in ("structured_outputs", "response_format", "model")
    }
    no_tools = {key: value for key, value in no_grammar.items() if key != "chat_template_kwargs"}
    chat_plain = {"messages": [{"role": "user", "content": "hi"}]}
    picture = {
        "messages": [{"role": "user", "content": [PICTURE, {"type": "text", "text": "t"}]}],
        "n": 2,
        "logprobs": True,
    }
    thinking = {**chat_plain, "chat_template_kwargs": {"enable_thinking": True}}
    tools = {**chat_plain, "tools": [TOOL], "tool_choice": "auto"}
    formed = {
        **chat_plain,
        "response_format": COMMON["response_format"],
        "stop": ["x"],
        "logit_bias": {"5": 1.0},
    }
    texts = [one for one in MESSAGES["messages"] if one["role"] != "user"]
    told_messages = {
        "model": "fake-vl",
        "messages": [{"role": "user", "content": "hi"}, *texts],
        "max_tokens": 5,
    }
    shown = {"role": "user", "content": MESSAGES["messages"][0]["content"][:2]}
    messages = {"model": "fake-vl", "messages": [shown], "max_tokens": 5}
    messages_tools = {
        **told_messages,
        "tools": MESSAGES["tools"],
        "tool_choice": {"type": "auto"},
        "system": "s",
    }
    ollama_asked = {**OLLAMA, "model": "fake-vl", **chat_plain}
    items = [item for item in RESPONSES["input"] if item.get("type") != "item_reference"]
    response = {
        "input": items[1:2],
        "reasoning": {"effort": "low"},
        "text": RESPONSES["text"],
        "degas": {"task": "query"},
    }
    response_tools = {
        "input": "hi",
        "tools": RESPONSES["tools"],
        "tool_choice": "auto",
        "instructions": "be kind",
    }
    query = {"question": "q", "image_url": "data:,", "settings": SETTINGS, "reasoning": False}
    no_limit = [
        {key: value for key, value in one.items() if key != "max_tokens"}
        for one in (messages, messages_tools)
    ]
    table: list[tuple[str, FakeCore, Callable[..., Any], Sequence[Any], dict[str, str]]] = [
        ("chat", asked, chat.prepare, (picture, formed, chat_plain, no_tools), QUESTIONS),
        ("chat-templated", told, chat.prepare, (thinking, tools, formed, no_grammar), QUESTIONS),
        (
            "completions",
            asked,
            completions.prepare,
            ({"prompt": "p", "logprobs": 1}, {"prompt": [[1, 2]], "n": 2}),
            QUESTIONS,
        ),
        ("messages", asked, anthropic.prepare, (messages,), QUESTIONS),
        ("messages-templated", told, anthropic.prepare, (told_messages, messages_tools), QUESTIONS),
        ("messages-count", told, anthropic.count_tokens, no_limit, {}),
        ("ollama-chat", asked, ollama.prepare_chat, (ollama_asked,), QUESTIONS),
        (
            "ollama-chat-templated",
            told,
            ollama.prepare_chat,
            ({**ollama_asked, "format": None, "tools": [TOOL]},),
            QUESTIONS,
        ),
        (
            "ollama-generate",
            asked,
            ollama.prepare_generate,
            ({**OLLAMA, "model": "fake-vl", "prompt": "p"},),
            QUESTIONS,
        ),
        ("ollama-show", told, ollama_models.show, ({"model": "fake-vl"},), {}),
        ("tokenize", asked, tokenize.tokenize, ({"prompt": "p"},), {}),
        ("tokenize-templated", told, tokenize.tokenize, (thinking, {**chat_plain, "tools": [TOOL]}), {}),
        ("detokenize", asked, tokenize.detokenize, ({"tokens": [1, 2]},), {}),
        ("query", asked, moondream.prepare_query, (query,), QUESTIONS),
        (
            "caption",
            asked,
            moondream.prepare_caption,
            ({"image_url": "data:,", "length": "short"},),
            QUESTIONS,
        ),
        ("detect", asked, moondream.prepare_detect, ({"image_url": "data:,", "object": "o"},), QUESTIONS),
        ("point", asked, moondream.prepare_point, ({"image_url": "data:,", "object": "o"},), QUESTIONS),
    ]
    found = [
        Target(name, bodies_of(sound), on_core(core, prepare_body, **more), (RequestError,))
        for name, core, prepare_body, sound, more in table
    ]
    found.append(
        Target("responses", bodies_of((response, {"input": "hi"})), _response(asked), (RequestError,))
    )
    question = {"role": "user", "content": [{"type": "input_text", "text": "t"}]}
    sound_told = ({"input": [question, ANSWER, *items[2:]]}, response_tools)
    found.append(Target("responses-templated", bodies_of(sound_told), _response(told), (RequestError,)))
    return found


def _lane_event(data: bytes) -> object:
    text = data.decode(errors="surrogateescape")
    response_bodies.lane_of(text)
    return response_bodies.parse_event(text)


def _data_url(data: bytes) -> object:
    url = data.decode(errors="replace")
    parts = data_urls.split(url)
    data_urls.decoded_bytes(url, parts)
    return data_urls.unpack(url[parts.begin :].encode(errors="surrogatepass"), is_base64=parts.is_base64)


def _grammar(data: bytes) -> object:
    kind = KINDS[data[0] % len(KINDS)] if data else KINDS[0]
    return spell(Grammar(kind, data[1:].decode(errors="surrogateescape")))


def _schema(data: bytes) -> object:
    prepared = prepare(data.decode(errors="replace"), lambda schema: False)
    return simpler(prepared)


def _headers(data: bytes) -> object:
    text = data.decode("latin-1")
    access = Access(FakeCore().config) if _ACCESS is None else _ACCESS
    for line in text.split("\n"):
        access.origin_allowed(line, "h:1")
        same_site(line, line)
        access.cors_origin(line)
    access.check_host(text)
    return None


_ACCESS = Access(
    FakeCore(api_keys="k-1234567890", cors_origins="https://*.app.example", host="0.0.0.0").config
)
_URLS = (
    b"data:image/png;base64,iVBORw0KGgo=",
    b"data:,a%20b",
    b" DATA:text/plain;charset=x;base64,AA-_#f",
    b"https://h/x.png",
)
_SCHEMAS: tuple[Any, ...] = (
    SCHEMA,
    {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"oneOf": [{"type": "string", "pattern": "^a+$"}, {"const": 1}]}}},
    {"type": "array", "prefixItems": [{"type": "integer", "minimum": 1, "maximum": 5, "multipleOf": 2}], "items": False, "minItems": 1},
    {"if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}, "else": {"required": ["c"]}, "dependentSchemas": {"a": {}}},
    {"allOf": [{"patternProperties": {"^x": {"format": "date"}}}], "unevaluatedProperties": False, "anyOf": [{"enum": [1, "a", None]}]},
)  # fmt: skip
_PATTERNS = (
    rb"^[a-z]{1,3}\d+$",
    rb"(?:a|b)*?(?=c)",
    rb"\u{1F600}\p{L}[^\w\s-]",
    rb"(a{2,}){3}",
    rb"(?<n>x)\k<n>",
)


def text_targets() -> list[Target]:
    """Events of lanes, data URLs, grammars, schemas, patterns, headers."""
    lanes = (
        CREATE,
        {"type": "response.cancel", "stream_id": "a"},
        {"type": "degas.authenticate", "api_key": "k"},
    )
    grammars = (
        b'\0{"type":"object"}',
        b"\1{}",
        b"\2a+(b|c){2,9}",
        b'\3["a","b"]',
        b'\4start: "a" | start "b"',
    )
    headers = (b"127.0.0.1:8080", b"https://x.app.example\nnull", b"[::1]:80", b"localhost")
    return [
        Target("lanes", bodies_of(lanes), _lane_event, (RequestError,)),
        Target("data-urls", bytes_of(_URLS), _data_url, (data_urls.NotADataUrl,)),
        Target("grammars", bytes_of(grammars), _grammar, (GrammarError,)),
        Target("schemas", bodies_of(_SCHEMAS), _schema, (GrammarError,)),
        Target(
            "patterns",
            bytes_of(_PATTERNS),
            lambda data: translate(data.decode(errors="replace")),
            (GrammarError,),
        ),
        Target("headers", bytes_of(headers), _headers, (RequestError,)),
        Target(
            "origins",
            bytes_of(headers),
            lambda data: read_origin(data.decode(errors="replace")),
            (ValueError,),
        ),
    ]
