"""Owns the answer to whether a chat template is sure to end at once, read from its syntax. Pure; runs on the gateway's loop.

Handing a short conversation to a thread and back costs more than rendering it. So the plainest templates, ChatML and its like,
are rendered where they are asked for: their only loop goes over the messages, nothing they keep can grow, and what they call
takes no longer than its text is long. Whatever else a template does, it is rendered on a thread within a deadline.
"""

from __future__ import annotations

from typing import Final

from jinja2 import nodes

_MAX_NODES: Final = 1000  # times 64 messages of a few thousand characters: milliseconds at the very worst
_PLAIN: Final = (
    nodes.And,
    nodes.Assign,
    nodes.Break,
    nodes.Compare,
    nodes.CondExpr,
    nodes.Const,
    nodes.Continue,
    nodes.Getattr,
    nodes.Getitem,
    nodes.If,
    nodes.Name,
    nodes.Not,
    nodes.Operand,
    nodes.Or,
    nodes.Output,
    nodes.Slice,
    nodes.Template,
    nodes.TemplateData,
    nodes.Test,
)
_GROWING: Final = (nodes.Add, nodes.Concat)  # in what is written only: kept, it could double in each turn
_METHODS: Final = frozenset(("endswith", "get", "lower", "lstrip", "rstrip", "startswith", "strip", "upper"))
_FUNCTIONS: Final = frozenset(("raise_exception",))
_FILTERS: Final = frozenset(("default", "length", "lower", "string", "trim", "upper"))
_TURNS: Final = "messages"


def ends_at_once(template: nodes.Template) -> bool:
    """Whether rendering takes time in proportion to messages, their characters and the template's size, and no more."""
    found = _Look()
    return found.passes(template, in_output=False, in_loop=False)


class _Look:
    def __init__(self) -> None:
        self._num_nodes = 0

    def passes(self, node: nodes.Node, *, in_output: bool, in_loop: bool) -> bool:
        self._num_nodes += 1
        if self._num_nodes > _MAX_NODES or not self._is_known(node, in_output=in_output, in_loop=in_loop):
            return False
        in_output = in_output or isinstance(node, nodes.Output)
        in_loop = in_loop or isinstance(node, nodes.For)
        return all(
            self.passes(child, in_output=in_output, in_loop=in_loop) for child in node.iter_child_nodes()
        )

    def _is_known(self, node: nodes.Node, *, in_output: bool, in_loop: bool) -> bool:
        if isinstance(node, nodes.Name):
            return node.ctx == "load" or node.name != _TURNS
        if isinstance(node, nodes.For):
            return not in_loop and not node.recursive and node.test is None and _is_turns(node.iter)
        if isinstance(node, nodes.Call):
            return node.dyn_args is None and node.dyn_kwargs is None and _is_quick(node.node)
        if isinstance(node, nodes.Filter):
            return node.name in _FILTERS
        return (in_output and isinstance(node, _GROWING)) or isinstance(node, _PLAIN)


def _is_turns(node: nodes.Node) -> bool:
    """The messages, or some of them."""
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        node = node.node
    return isinstance(node, nodes.Name) and node.name == _TURNS


def _is_quick(called: nodes.Node) -> bool:
    if isinstance(called, nodes.Name):
        return called.name in _FUNCTIONS
    return isinstance(called, nodes.Getattr) and called.attr in _METHODS
