"""Owns the tools of a request: what is offered, what must be called, and how a model is told of them. Gateway's loop.

A model whose template shows tools gets them in its own way. Any other is told by a system message that asks for
`<tool_call>` tags, as the Hermes models use them.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from gateway.api.fields import Known
from gateway.api.parameters import Json, invalid
from gateway.api.structured import Wanted, schema_grammar
from gateway.generation import ChatFormat, RequestError, ServedModel
from shared.errors import ErrorCode

MAX_TOOLS: Final = 128
_MAX_FORCED_CALLS: Final = 8

_PLAIN_OBJECT: Final = frozenset(
    (
        "type",
        "properties",
        "required",
        "title",
        "description",
        "default",
        "examples",
        "$schema",
        "$defs",
        "definitions",
    )
)
"""The keywords beside which an object's own properties are all that is said of it."""

_encode = msgspec.json.encode


class Function(Known):
    """A function that can be called."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Tool(Known):
    """One entry of `tools`."""

    IGNORED = ("cache_control",)

    type: Literal["function"]
    function: Function
    cache_control: Any = None


@dataclass(frozen=True, slots=True)
class ToolsAsked:
    """The tools of one request, and whether one of them, or `named`, must be called."""

    tools: tuple[Tool, ...]
    is_forced: bool = False
    named: str | None = None
    is_parallel: bool = True
    param: str = "tools"

    def for_template(self) -> list[Json]:
        """As OpenAI writes them: the layout that templates expect."""
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.function.name,
                    "description": tool.function.description or "",
                    "parameters": _parameters(tool.function),
                },
            }
            for tool in self.tools
        ]

    def constraint(self) -> Wanted | None:
        """What a forced answer looks like: one call, or a list of calls. Raises `RequestError` for a schema's faults."""
        if not self.is_forced:
            return None
        allowed = [tool for tool in self.tools if self.named in (None, tool.function.name)]
        definitions = {
            # Closed where that loses nothing: a small model would add arguments until its tokens run out.
            f"tool_{i}": _moved(_closed(_parameters(tool.function)), f"#/$defs/tool_{i}")
            for i, tool in enumerate(allowed)
        }
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    "arguments": {"$ref": f"#/$defs/tool_{i}"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for i, tool in enumerate(allowed)
        ]
        call: Json = calls[0] if len(calls) == 1 else {"anyOf": calls}
        if self.is_parallel and self.named is None:
            call = {"type": "array", "items": call, "minItems": 1, "maxItems": _MAX_FORCED_CALLS}
        is_strict = any(tool.function.strict for tool in allowed)
        # Unless a function asks for strictness, keywords that no constraint can keep are left out of it.
        return schema_grammar({**call, "$defs": definitions}, self.param, strict=is_strict)


def read_tools(tools: Sequence[Tool] | None, choice: Any, is_parallel: bool | None) -> ToolsAsked | None:
    """What a body asks for; None where no tool can be called. Raises `RequestError` naming the field."""
    offered = tuple(tools or ())
    if len(offered) > MAX_TOOLS:
        raise invalid(f"at most {MAX_TOOLS} tools are taken", "tools")
    names = [tool.function.name for tool in offered]
    for index, tool in enumerate(offered):
        if tool.function.name in names[:index]:
            raise invalid("another tool has this name", f"tools[{index}].function.name")
        kind = (tool.function.parameters or {}).get("type", "object")
        if kind != "object":
            raise invalid(
                'a function\'s parameters are an object: "type" must be "object"',
                f"tools[{index}].function.parameters",
            )
    mode, named = _read_choice(choice)
    if mode in ("required", "named") and not offered:
        raise invalid("there are no tools to choose from; give some in tools", "tool_choice")
    if named is not None and named not in names:
        raise invalid(f"no tool is called {named!r}; there are {', '.join(names)}", "tool_choice")
    if not offered or mode == "none":
        return None
    return ToolsAsked(offered, mode in ("required", "named"), named, is_parallel is not False)


def tool_of(name: str, description: str | None, parameters: Json | None, *, strict: bool | None) -> Tool:
    """A function as interfaces give it that have its fields in the tool itself."""
    function = Function(name=name, description=description, parameters=parameters, strict=strict)
    return Tool(type="function", function=function)


def told(asked: ToolsAsked | None, messages: Sequence[Json]) -> tuple[list[Json], list[int]]:
    """A conversation for a model whose template shows no tools: they, calls and results become text.

    The second list has, for each message that is left, the place of the one it comes from.
    """
    turns: list[Json] = []
    places: list[int] = []
    if asked is not None:
        turns, places = [{"role": "system", "content": _instructions(asked, messages)}], [0]
    for place, message in enumerate(messages):
        if message["role"] == "system" and asked is not None:
            continue  # it stands before the instructions
        turn = _as_text(message)
        if turn is not message and turn["role"] == "user" and turns and turns[-1].get("role") == "user":
            turns[-1] = {"role": "user", "content": f"{_text(turns[-1])}\n{turn['content']}"}
            continue  # results of one turn's calls are one turn
        turns.append(turn)
        places.append(place)
    return turns, places


def check_takes_tools(model: ServedModel, asked: ToolsAsked) -> None:
    """Raises `RequestError` for a model that could not know of its tools, unless the answer's form is forced."""
    if model.chat_format is None and not asked.is_forced:
        message = f'tools: model {model.card.model_id} cannot be told of tools; set tool_choice to "required"'
        raise RequestError(ErrorCode.UNSUPPORTED, message, param="tools")


def shown_marks(model: ServedModel, marks: Sequence[str]) -> list[int]:
    """The ids of those marks that are special tokens, whose text an answer would leave out."""
    return [token_id for mark in marks if (token_id := model.special_id(mark)) is not None]


def call_id(format: ChatFormat | None) -> str:
    """A new call's id. Mistral's templates take nine letters and digits, and nothing else."""
    if format is not None and format.dialect == "mistral":
        return secrets.token_hex(5)[:9]
    return f"call_{secrets.token_hex(12)}"


def _read_choice(choice: Any) -> tuple[str, str | None]:
    if choice is None:
        return "auto", None
    if choice in ("none", "auto", "required"):
        return choice, None
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and set(choice) <= {"type", "function", "name"}:
            return "named", name
    raise invalid(
        '"none", "auto", "required" or {"type": "function", "function": {"name": …}}', "tool_choice"
    )


def _parameters(function: Function) -> Json:
    return function.parameters or {"type": "object", "properties": {}}


def _closed(schema: Json) -> Json:
    """A function's parameters without others than it lists, and so on inside them; anything that combines schemas stays as it is."""
    made = dict(schema)
    listed = made.get("properties")
    if isinstance(listed, dict):
        made["properties"] = {
            name: _closed(part) if isinstance(part, dict) else part for name, part in listed.items()
        }
        if set(made) <= _PLAIN_OBJECT and all(name in listed for name in made.get("required") or ()):
            made["additionalProperties"] = False
    if isinstance(made.get("items"), dict):
        made["items"] = _closed(made["items"])
    return made


def _moved(schema: Any, place: str) -> Any:
    """A schema that stands at `place` in another: its references to itself follow."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else value
        if key in ("const", "enum", "default", "examples")
        else _moved(value, place)
        for key, value in schema.items()
    }


def _instructions(asked: ToolsAsked, messages: Sequence[Json]) -> str:
    own = [_text(message) for message in messages if message["role"] == "system"]
    tools = "\n".join(_encode(tool).decode() for tool in asked.for_template())
    many = "Several calls may follow each other." if asked.is_parallel else "Make one call at most."
    return "\n\n".join(
        (
            *own,
            "You can call these functions, given as JSON schemas:\n<tools>\n" + tools + "\n</tools>",
            "To call one, answer with its name and arguments as JSON inside tags, and nothing else:\n"
            '<tool_call>\n{"name": "the function\'s name", "arguments": {}}\n</tool_call>\n'
            + many
            + " If no function helps, answer in words.",
        )
    )


def _as_text(message: Json) -> Json:
    """The message, without calls and results other than as text."""
    if message["role"] in ("tool", "function"):
        return {"role": "user", "content": f"<tool_response>\n{_text(message)}\n</tool_response>"}
    if message.get("tool_calls"):
        calls = [_call_text(call) for call in message["tool_calls"]]
        return {"role": "assistant", "content": "\n".join(filter(None, (_text(message), *calls)))}
    return message


def _call_text(call: Any) -> str:
    function = call.get("function", {}) if isinstance(call, dict) else {}
    arguments = function.get("arguments") or "{}"
    if not isinstance(arguments, str):
        arguments = _encode(arguments).decode()
    name = _encode(function.get("name") or "").decode()
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'


def _text(message: Json) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content)
