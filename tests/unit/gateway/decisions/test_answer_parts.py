"""Answers read as they stream: thinking, text and tool calls, however the text is cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.decisions.answer_parts import (
    DIALECTS,
    AnswerReader,
    CallArguments,
    CallOpened,
    Part,
    Said,
    ThinkingTags,
    Thought,
)

Calls = list[tuple[str, object]]

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.text(st.sampled_from('ab"\\{}[]<>/|é\n '), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab<", max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
ARGUMENTS = st.dictionaries(st.from_regex(r"[a-z]{1,4}", fullmatch=True), JSON_VALUES, max_size=3)
CALLS = st.lists(st.tuples(st.sampled_from(["f", "get_weather", "a.b"]), ARGUMENTS), min_size=1, max_size=3)
TEXTS = st.text(st.sampled_from("ab <\n{[t"), max_size=12)


def read(reader: AnswerReader, pieces: list[str]) -> tuple[str, str, Calls]:
    """What an answer says, thinks and calls."""
    parts: list[Part] = []
    for piece in pieces:
        parts += reader.feed(piece)
    parts += reader.close()
    said = "".join(part.text for part in parts if isinstance(part, Said))
    thought = "".join(part.text for part in parts if isinstance(part, Thought))
    names = [part.name for part in parts if isinstance(part, CallOpened)]
    assert [part.index for part in parts if isinstance(part, CallOpened)] == list(range(len(names)))
    arguments = [""] * len(names)
    for part in parts:
        if isinstance(part, CallArguments):
            arguments[part.index] += part.text
    return said, thought, list(zip(names, (json.loads(text) for text in arguments), strict=True))


def cut(text: str, data: st.DataObject) -> list[str]:
    """The text in pieces of any size."""
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def written(dialect: str, calls: Calls) -> str:
    """The calls as a family writes them."""
    objects = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
    listed = ", ".join(objects)
    python = ", ".join(
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"  # type: ignore[attr-defined]
        for name, arguments in calls
    )
    return {
        "tagged": "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects),
        "mistral": f"[TOOL_CALLS] [{listed}]",
        "lfm": f"<|tool_call_start|>[{python}]<|tool_call_end|>",
        "granite": f"<|tool_call|>[{listed}]",
        "llama": "; ".join(objects).replace('"arguments"', '"parameters"'),
        "pythonic": f"[{python}]",
        "forced": f"[{listed}]",
    }[dialect]


@settings(max_examples=150, deadline=None)
@given(
    dialect=st.sampled_from(sorted(DIALECTS)),
    calls=CALLS,
    thought=st.sampled_from(["", "so\n\nit is"]),
    data=st.data(),
)
def test_every_dialect_reads_back_what_was_called_however_it_is_cut(
    dialect: str, calls: Calls, thought: str, data: st.DataObject
) -> None:
    if dialect == "llama":  # its keys are replaced in the written text
        calls = [(name, {"a": 1}) for name, _ in calls]
    text = written(dialect, calls)
    if thought:
        text = f"<think>\n{thought}\n</think>\n\n{text}"
    pieces = cut(text, data)
    assert read(AnswerReader(DIALECTS[dialect], ThinkingTags()), pieces) == ("", thought, calls)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, calls=CALLS, data=st.data())
def test_text_before_calls_is_said_without_the_white_space_between(
    text: str, calls: Calls, data: st.DataObject
) -> None:
    pieces = cut(f"{text}\n{written('tagged', calls)}\n", data)
    said, _, found = read(AnswerReader(DIALECTS["tagged"]), pieces)
    assert (said, found) == (text.rstrip(), calls)


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from('<>/_tolcahink{}"[]:,=() \nab'), max_size=40), data=st.data())
@pytest.mark.parametrize("dialect", sorted(DIALECTS))
def test_parts_do_not_depend_on_how_any_text_is_cut(dialect: str, text: str, data: st.DataObject) -> None:
    whole = AnswerReader(DIALECTS[dialect], ThinkingTags())
    cut_up = AnswerReader(DIALECTS[dialect], ThinkingTags())
    pieces = cut(text, data)

    def joined(parts: list[Part]) -> tuple[str, str, int]:
        said = "".join(part.text for part in parts if isinstance(part, Said))
        thought = "".join(part.text for part in parts if isinstance(part, Thought))
        return said, thought, sum(isinstance(part, CallOpened) for part in parts)

    one = whole.feed(text) + whole.close()
    many = [part for piece in pieces for part in cut_up.feed(piece)] + cut_up.close()
    assert joined(one) == joined(many)


def test_a_call_streams_its_arguments_as_they_come() -> None:
    reader = AnswerReader(DIALECTS["tagged"])
    assert reader.feed('<tool_call>{"name": "f", "arguments": {"city"') == [
        CallOpened(0, "f"),
        CallArguments(0, '{"city"'),
    ]
    assert reader.feed(': "Os') == [CallArguments(0, ': "Os')]
    assert reader.feed('lo"}}</tool') == [CallArguments(0, 'lo"}')]
    assert reader.feed("_call>") == [] == reader.close()


def test_arguments_before_the_name_wait_for_it() -> None:
    reader = AnswerReader(DIALECTS["tagged"])
    assert reader.feed('<tool_call>{"arguments": {"a": 1}, "na') == []
    assert reader.feed('me": "f"}</tool_call>') == [CallOpened(0, "f"), CallArguments(0, '{"a": 1}')]


@pytest.mark.parametrize(
    ("dialect", "text", "calls"),
    [
        ("tagged", '<tool_call>{"name": "f"}</tool_call>', [("f", {})]),
        ("tagged", '<tool_call>{"name": "f", "arguments": null}</tool_call>', [("f", {})]),
        ("tagged", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [("f", {"a": 1})]),
        ("tagged", '<tool_call>{"type":"function","function":{"name":"f","arguments":{"a":1}}}</tool_call>', [("f", {"a": 1})]),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]x1[ARGS]{}', [("f", {"a": 1}), ("g", {})]),
        ("mistral", '[TOOL_CALLS]f{"a": "}"}', [("f", {"a": "}"})]),
        ("llama", '<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}', [("f", {"a": 1})]),
        ("granite", '<|tool_call|>[{"name": "f", "arguments": {}}]<|/tool_call|>', [("f", {})]),
        ("lfm", '<|tool_call_start|>{"name": "f", "arguments": {}}<|tool_call_end|>', [("f", {})]),
        (
            "lfm",
            """<|tool_call_start|>[f(or=1, a="x, or=2", if='(in=3)')]<|tool_call_end|>""",
            [("f", {"or": 1, "a": "x, or=2", "if": "(in=3)"})],
        ),
    ],
)  # fmt: skip
def test_other_layouts_that_models_write(dialect: str, text: str, calls: Calls) -> None:
    for size in (1, 3, len(text)):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert read(AnswerReader(DIALECTS[dialect]), pieces) == ("", "", calls)


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        ("tagged", "see <tool_call>nothing</tool_call>"),
        ("tagged", 'a <tool_call>{"x": 1}'),
        ("tagged", "a < b and <tool"),
        ("mistral", "[TOOL_CALLS] "),
        ("llama", '{"x": 1} is an object'),
        ("pythonic", "[1, 2] is a list"),
        ("pythonic", "[f(1)]"),
        ("lfm", "<|tool_call_start|>f(a=1"),
    ],
)
def test_what_is_no_call_is_said(dialect: str, text: str) -> None:
    for size in (1, len(text)):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        said, thought, calls = read(AnswerReader(DIALECTS[dialect]), pieces)
        assert (said, thought, calls) == (text, "", [])


def test_thinking_opened_by_the_prompt_and_thinking_that_never_ends() -> None:
    said, thought, _ = read(
        AnswerReader(None, ThinkingTags(), thinks_first=True), ["hm", "m</thi", "nk>\n\nyes"]
    )
    assert (said, thought) == ("yes", "hmm")
    said, thought, _ = read(AnswerReader(None, ThinkingTags()), ["\n<think>", "for ever "])
    assert (said, thought) == ("", "for ever ")


def test_a_plain_answer_is_passed_through_letter_by_letter() -> None:
    reader = AnswerReader()
    assert [reader.feed(piece) for piece in (" a", " ", "<b")] == [[Said(" a")], [Said(" ")], [Said("<b")]]
    assert reader.close() == []
