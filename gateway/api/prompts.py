"""Owns turning chat messages into a prompt: token ids and pictures. No sockets; runs on the gateway's loop.

Two kinds of model, and both get the whole conversation with all its pictures: those with a chat template through it, Moondream
as a row of its queries (`gateway.api.query_turns`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from gateway.api.clips import Clip, ClipPart, VideoPart, VideoUrlPart, clip_of, no_clips, prepare_clips
from gateway.api.fields import Known
from gateway.api.histories import check_no_history, check_shown
from gateway.api.parameters import Json
from gateway.api.pictures import place_pictures, prepare_pictures, shown_of, takes_several
from gateway.api.query_turns import QueryTurn, compose_turns
from gateway.api.spoken import Reading, opens_thinking, reading_of
from gateway.api.tools import ToolsAsked, told
from gateway.generation import (
    ChatOptions,
    Core,
    PreparedImage,
    RequestError,
    ServedModel,
    Shown,
    no_pictures,
)
from shared.clips import num_positions
from shared.errors import ErrorCode
from shared.pictures import check_bounds
from shared.protocol import ModelCard, PromptValue

_USUAL: Final = ChatOptions()
_PASSED: Final = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
_passed = operator.attrgetter(*_PASSED)
_WITHOUT_LANGUAGE: Final = ("sim", "fake")  # stand-ins for a model: any rendering is as good as another


class ImageUrl(Known, kw_only=True):
    """`image_url` of a content part."""

    IGNORED = ("detail",)  # pictures are read at the one size that the model has

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class TextPart(Known, tag_field="type", tag="text", kw_only=True):
    """A piece of text."""

    IGNORED = ("cache_control", "prompt_cache_breakpoint")  # the prefix cache needs no marks

    text: str
    cache_control: Any = None
    prompt_cache_breakpoint: Any = None


class ImagePart(Known, tag_field="type", tag="image_url", kw_only=True):
    """A picture."""

    IGNORED = ("cache_control", "prompt_cache_breakpoint", "uuid")

    image_url: ImageUrl
    cache_control: Any = None
    prompt_cache_breakpoint: Any = None
    uuid: str | None = None


ContentPart = TextPart | ImagePart | VideoUrlPart | VideoPart


class FunctionCall(Known, kw_only=True):
    """`function` of a tool call."""

    name: str
    arguments: str | Json | None = None


class ToolCall(Known, kw_only=True):
    """A call that an earlier answer made."""

    REFUSED = ("custom",)
    IGNORED = ("index",)  # its place in a stream, which clients leave in what they put together

    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall
    index: int | None = None
    custom: Any = None

    def for_template(self) -> Json:
        """As templates read it."""
        told = {"id": self.id, "type": self.type, "function": msgspec.to_builtins(self.function)}
        return {name: value for name, value in told.items() if value is not None}


class Message(Known, kw_only=True):
    """One turn of a conversation."""

    REFUSED = ("audio", "function_call", "refusal")
    IGNORED = (
        "annotations",
        "cache_control",
        "id",
        "provider_specific_fields",
        "reasoning_details",
        "thinking_blocks",
    )

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[ContentPart], Meta(max_length=256)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=256)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    prefix: bool | None = None  # of the last message: the answer goes on with it
    # what clients leave in answers that they send back
    annotations: Any = None
    audio: Any = None
    cache_control: Any = None
    function_call: Any = None
    id: Any = None
    provider_specific_fields: Any = None
    reasoning_details: Any = None
    refusal: Any = None
    thinking_blocks: Any = None

    def for_template(self) -> Json:
        """Everything of the message that a template may read, under the interface's own names."""
        content: Any = self.content
        if isinstance(content, list):
            content = [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": "image" if isinstance(part, ImagePart) else "video"}
                for part in content
            ]
        role = "system" if self.role == "developer" else self.role
        passed = zip(_PASSED, _passed(self), strict=True)
        given: Json = {name: value for name, value in passed if value is not None}
        if self.tool_calls is not None:
            given["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return {"role": role, "content": content, **given}

    @property
    def num_pictures(self) -> int:
        """Pictures among its parts."""
        content = self.content if isinstance(self.content, list) else ()
        return sum(isinstance(part, ImagePart) for part in content)

    def picture_chars(self) -> int:
        """Characters of its pictures' and videos' URLs."""
        content = self.content if isinstance(self.content, list) else ()
        stills = sum(len(part.image_url.url) for part in content if isinstance(part, ImagePart))
        return stills + sum(part.chars() for part in content if isinstance(part, ClipPart))

    def text(self) -> str:
        """All its text, in order."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content or () if isinstance(part, TextPart))


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt for the worker: token ids without the pictures' positions, and the pictures."""

    ids: list[int]
    images: list[PreparedImage] = field(default_factory=list)
    strip_start: bool = False  # the model's answers begin with a space that belongs to its template
    drop_space: bool = False  # as `GenerateRequest.drop_space`
    reading: Reading = field(default_factory=Reading)
    values: Sequence[PromptValue] = ()  # as `GenerateRequest.values`

    @property
    def num_tokens(self) -> int:
        """Its length with the pictures' positions."""
        return len(self.ids) + sum(image.num_tokens for image in self.images)

    def num_positions(self, card: ModelCard) -> int:
        """How far it reaches: its tokens, unless a video's time goes further."""
        if card.image is None or not self.images:
            return self.num_tokens
        reached = num_positions(card.image, len(self.ids), [image.spec for image in self.images])
        return max(self.num_tokens, reached)


async def compose_chat(
    core: Core,
    model: ServedModel,
    messages: Sequence[Message],
    options: ChatOptions | None = None,
    *,
    tools: ToolsAsked | None = None,
    is_constrained: bool = False,
) -> Prompt:
    """The prompt for a conversation, and how its answers are read. Raises `RequestError`.

    `options` are those a client gave, if any; `is_constrained`: the answer's form is asked for, other than by `tools`.
    """
    if not messages:
        raise RequestError(ErrorCode.INVALID_REQUEST, "messages: at least one is needed", param="messages")
    size, max_chars = sum(len(message.text()) for message in messages), core.config.max_prompt_chars
    if size > max_chars:
        message = f"messages: {size} characters; at most {max_chars} are accepted"
        raise RequestError(ErrorCode.PAYLOAD_TOO_LARGE, message, param="messages")
    asks_otherwise = takes_questions(model.card) or model.card.family in _WITHOUT_LANGUAGE
    if asks_otherwise and options is not None:
        message = f"model {model.card.model_id} has no chat template that could follow this"
        raise RequestError(ErrorCode.UNSUPPORTED, message, param=_asked_for(options))
    reading = reading_of(model, tools, is_constrained=is_constrained)
    clips = clips_of(messages)
    if clips and (model.card.image is None or model.card.image.clip is None):
        part, where = clips[0]
        raise no_clips(model.card, f"{where}.{part.field}")
    if takes_questions(model.card):
        check_no_history(model, [message.for_template() for message in messages])
        turns = [QueryTurn(message.role, message.text(), message.num_pictures) for message in messages]
        ids, images = await compose_turns(core, model, turns, pictures_of(messages))
        return Prompt(ids, images, strip_start=True, reading=reading)
    prompt = await _compose_template(core, model, messages, options or _USUAL, tools)
    if opens_thinking(model, reading, prompt.ids):
        reading = replace(reading, thinks_first=True)
    return Prompt(prompt.ids, prompt.images, prompt.strip_start, prompt.drop_space, reading)


def _asked_for(options: ChatOptions) -> str:
    if options.template is not None:
        return "chat_template"
    if options.variables:
        return "chat_template_kwargs"
    return "continue_final_message" if options.continue_final_message else "add_generation_prompt"


def effort_variables(effort: str | None) -> Json:
    """What a template is told of how much to think."""
    if effort is None:
        return {}
    return {"reasoning_effort": effort, "enable_thinking": effort not in ("none", "minimal")}


def takes_questions(card: ModelCard) -> bool:
    """Whether the model is asked by queries, as Moondream is, and has no chat template."""
    return card.family == "moondream" or "query_prefix" in card.templates


async def _compose_template(
    core: Core,
    model: ServedModel,
    messages: Sequence[Message],
    options: ChatOptions,
    tools: ToolsAsked | None,
) -> Prompt:
    card = model.card
    pictures, clips = pictures_of(messages), clips_of(messages)
    if pictures and not takes_several(card):
        raise no_pictures(card, pictures[-1][1])
    if card.family in _WITHOUT_LANGUAGE:
        text = "\n".join(message.text() for message in messages)
        bos = [] if card.bos_id is None else [card.bos_id]
        return Prompt([*bos, *await model.encode(text)])
    turns = [message.for_template() for message in messages]
    places: Sequence[int] = range(len(turns))
    if model.chat_format is not None and not model.chat_format.shows_tools:
        turns, places = told(tools, turns)
    elif tools is not None:
        options = replace(options, tools=tools.for_template())
    images: list[PreparedImage] = []
    if pictures or clips:
        asked = [clip_of(part, where) for part, where in clips]
        images, shown = await _prepare(core, model, messages, pictures, asked)
        options = replace(options, pictures=shown)
    ids = await model.encode_chat(turns, options)
    await check_shown(model, turns, options, ids, places)
    ids, images = place_pictures(model, ids, images)
    # An answer that continues a message keeps its first space; an answer in a turn of its own drops it.
    return Prompt(ids, images, drop_space=model.drops_first_space and not options.continue_final_message)


async def _prepare(
    core: Core,
    model: ServedModel,
    messages: Sequence[Message],
    pictures: Sequence[tuple[str, str]],
    clips: Sequence[Clip],
) -> tuple[list[PreparedImage], list[Shown]]:
    """Pictures and groups of videos' frames in the order of the messages' parts, and what stands for each part."""
    stills = iter(await prepare_pictures(core, model, pictures) if pictures else [])
    moving = iter(await prepare_clips(core, model, clips))
    images: list[PreparedImage] = []
    shown: list[Shown] = []
    for message in messages:
        for part in message.content if isinstance(message.content, list) else ():
            if isinstance(part, ImagePart):
                images.append(next(stills))
                shown.append(shown_of(model.card, images[-1]))
            elif isinstance(part, ClipPart):
                clip = next(moving)
                images += clip.images
                shown.append(clip.shown)
    spec = model.card.image
    assert spec is not None
    if clips and (fault := check_bounds(spec, [image.spec for image in images])):
        raise RequestError(ErrorCode.PAYLOAD_TOO_LARGE, fault, param=clips[-1].param)
    return images, shown


def clips_of(messages: Sequence[Message]) -> list[tuple[ClipPart, str]]:
    """Every part that is a video, and its field's name, in order."""
    return [
        (part, f"messages[{index}].content[{place}]")
        for index, message in enumerate(messages)
        if isinstance(message.content, list)
        for place, part in enumerate(message.content)
        if isinstance(part, ClipPart)
    ]


def pictures_of(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """The URL and the field's name of every picture, in order."""
    return [
        (part.image_url.url, f"messages[{index}].content[{place}].image_url.url")
        for index, message in enumerate(messages)
        if isinstance(message.content, list)
        for place, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]


def task_prompt(
    card: ModelCard, task: str, argument: Sequence[int] = (), *, suffix: str | None = None
) -> list[int]:
    """BOS, the task's template and its argument, in Moondream's order. Raises `RequestError` UNSUPPORTED.

    `suffix` names another template than the task's own. `task` is query, detect, point (which have a prefix and a suffix) or caption_short, caption_normal, …
    """
    whole = card.templates.get(task)
    prefix = card.templates.get(f"{task}_prefix")
    if whole is None and prefix is None:
        message = (
            f"model {card.model_id} cannot {task.replace('_', ' ')}; what it can do is "
            f"{', '.join(card.capabilities) or 'in /v1/models'}"
        )
        raise RequestError(ErrorCode.UNSUPPORTED, message)
    bos = [] if card.bos_id is None else [card.bos_id]
    if whole is not None:
        return [*bos, *whole]
    return [*bos, *(prefix or ()), *argument, *card.templates.get(suffix or f"{task}_suffix", ())]
