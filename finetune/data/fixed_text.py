"""The text that a chat template writes around the contents of messages, kept for the next row.

Running a template takes 40 us and more, three times a row. Many templates only copy contents into
their text, perhaps without the spaces at their ends. Then conversations with the same roles have
the same text around their contents, and the template runs once for all of them.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

CONTENTS = ("content", "context")  # what `Template` gives a message beside its role
# White space that `trim` removes and no template writes, and a noncharacter; see `split`.
PAD, MARK = "\u2003", "\ufdd1"
_MARKED = re.compile(f"({PAD}?){MARK}([0-9]+){MARK}({PAD}?)")
# Methods of a dict, which a template would find before a key of that name.
_METHODS = frozenset(dir(dict))
# Tests that ask for the type of a value; all contents are text.
_OF_TYPE = frozenset(
    ("defined", "undefined", "string", "none", "mapping", "number", "boolean", "iterable")
)
# Names that reach messages by another way, and one whose text is drawn anew.
_NOT_FOLLOWED = frozenset(("self", "caller", "varargs", "kwargs", "super", "loop", "lipsum"))
# What an expression has: nothing of a message, text with contents, a content, a message, a list of
# messages.
PLAIN, TEXT, CONTENT, MESSAGE, LIST = range(5)


class Piece(NamedTuple):
    """Fixed text, and the content behind it: its number, and whether spaces at its ends go."""

    before: str
    content: int
    is_trimmed: bool


class FixedText(NamedTuple):
    pieces: tuple[Piece, ...]
    end: str

    def around(self, contents: Sequence[str]) -> str:
        """Return the text of a conversation with these contents."""
        parts: list[str] = []
        for before, content, is_trimmed in self.pieces:
            text = contents[content]
            parts += (before, text.strip() if is_trimmed else text)
        return "".join((*parts, self.end))


def marked(number: int) -> str:
    """Return a content that `split` finds again."""
    return f"{PAD}{MARK}{number}{MARK}{PAD}"


def split(text: str) -> FixedText | None:
    """Cut a text at `marked` contents; None where a template has changed one."""
    pieces, at = [], 0
    for match in _MARKED.finditer(text):
        if bool(match[1]) != bool(match[3]):
            return None
        pieces.append(Piece(text[at : match.start()], int(match[2]), not match[1]))
        at = match.end()
    found = FixedText(tuple(pieces), text[at:])
    fixed = "".join((*(piece.before for piece in pieces), found.end))
    return None if PAD in fixed or MARK in fixed else found


def copies_contents(tree: Any) -> bool:
    """Return whether a template (jinja2.nodes.Template) only copies the contents of messages.

    What else it does may depend on roles, tools and everything but contents. It knows the usual
    expressions; a template with others counts as one that does more.
    """
    reading = _Reading()
    try:
        while True:  # a name that is assigned below may be read above it, in a loop
            before = dict(reading.names)
            reading.statements(tree.body)
            if reading.names == before:
                return True
    except _DoesMore:
        return False


class _DoesMore(Exception):
    """The template does more with contents than to copy them."""


class _Reading:
    """Follows contents through a template, by names that may have them."""

    def __init__(self) -> None:
        self.names = {"messages": LIST}

    def statements(self, found: Sequence[Any]) -> None:
        for each in found:
            visit = getattr(self, f"_{type(each).__name__.lower()}", None)
            if visit is None or type(each).__name__ not in ("Output", "For", "If", "Assign"):
                raise _DoesMore
            visit(each)

    def _output(self, node: Any) -> None:
        for each in node.nodes:
            if self.kind(each) not in (PLAIN, TEXT, CONTENT):
                raise _DoesMore

    def _for(self, node: Any) -> None:
        found = self.kind(node.iter)
        if found == LIST and type(node.target).__name__ == "Name":
            self._name(node.target.name, MESSAGE)
        elif found != PLAIN:
            raise _DoesMore
        if node.test is not None:
            self._require_plain(node.test)
        self.statements(node.body)
        self.statements(node.else_)

    def _if(self, node: Any) -> None:
        if not self._is_context(node.test):
            self._require_plain(node.test)
        for each in (node.body, node.elif_, node.else_):
            self.statements(each)

    def _assign(self, node: Any) -> None:
        found = self.kind(node.node)
        if type(node.target).__name__ == "Name":
            self._name(node.target.name, TEXT if found == CONTENT else found)
        elif found != PLAIN:
            raise _DoesMore

    def _name(self, name: str, kind: int) -> None:
        """Note what a name has; one that has had something else is not followed."""
        if kind == PLAIN:
            return
        if self.names.setdefault(name, kind) != kind:
            raise _DoesMore

    def _is_context(self, node: Any) -> bool:
        """Return whether a node is the context of a message, which is never empty."""
        return self.kind(node) == CONTENT and _key(node) == "context"

    def _require_plain(self, *found: Any) -> None:
        for each in found:
            if each is not None and self.kind(each) != PLAIN:
                raise _DoesMore

    def kind(self, node: Any) -> int:
        """Return what an expression has. Raise _DoesMore for one that is not known."""
        visit = getattr(self, f"_of_{type(node).__name__.lower()}", None)
        if visit is not None:
            return int(visit(node))
        if type(node).__name__ not in _PLAIN_IF_ITS_PARTS_ARE:
            raise _DoesMore
        self._require_plain(*node.iter_child_nodes())
        return PLAIN

    def _of_name(self, node: Any) -> int:
        if node.name in _NOT_FOLLOWED:
            raise _DoesMore
        return self.names.get(node.name, PLAIN)

    def _of_getattr(self, node: Any) -> int:
        return self._part(node.node, node.attr)

    def _of_getitem(self, node: Any) -> int:
        if type(node.arg).__name__ == "Slice":
            self._require_plain(node.arg.start, node.arg.stop, node.arg.step)
            found = self.kind(node.node)
            return self._one_of(found, LIST, PLAIN)
        if isinstance(key := _key(node), str):
            return self._part(node.node, key)
        self._require_plain(node.arg)
        found = self.kind(node.node)
        return MESSAGE if found == LIST else self._one_of(found, PLAIN)

    def _part(self, node: Any, key: str) -> int:
        """Return what a part of a node has, such as `message.role`."""
        if type(node).__name__ == "Name" and node.name == "loop":
            if key in ("previtem", "nextitem", "changed", "cycle"):
                raise _DoesMore
            return PLAIN
        found = self._one_of(self.kind(node), MESSAGE, PLAIN)
        if found == PLAIN:
            return PLAIN
        if key in _METHODS:
            raise _DoesMore
        return CONTENT if key in CONTENTS else PLAIN

    def _of_add(self, node: Any) -> int:
        return self._joined((node.left, node.right))

    def _of_concat(self, node: Any) -> int:
        return self._joined(node.nodes)

    def _joined(self, found: Sequence[Any]) -> int:
        kinds = {self._one_of(self.kind(each), PLAIN, TEXT, CONTENT) for each in found}
        return PLAIN if kinds == {PLAIN} else TEXT

    def _of_condexpr(self, node: Any) -> int:
        self._require_plain(node.test)
        return self._joined([each for each in (node.expr1, node.expr2) if each is not None])

    def _of_filter(self, node: Any) -> int:
        self._require_plain(*node.args, *node.kwargs, node.dyn_args, node.dyn_kwargs)
        if node.name == "random":
            raise _DoesMore
        found = self.kind(node.node)
        if found == CONTENT and node.name == "trim" and _takes_nothing(node):
            return CONTENT
        if found == LIST and node.name in ("length", "count"):
            return PLAIN
        return self._one_of(found, PLAIN)

    def _of_call(self, node: Any) -> int:
        self._require_plain(*node.args, *node.kwargs, node.dyn_args, node.dyn_kwargs)
        called = node.node
        is_strip = type(called).__name__ == "Getattr" and called.attr == "strip"
        if is_strip and _takes_nothing(node) and self.kind(called.node) == CONTENT:
            return CONTENT
        return self._one_of(self.kind(called), PLAIN)

    def _of_test(self, node: Any) -> int:
        self._require_plain(*node.args, *node.kwargs, node.dyn_args, node.dyn_kwargs)
        allowed = (PLAIN, CONTENT) if node.name in _OF_TYPE else (PLAIN,)
        self._one_of(self.kind(node.node), *allowed)
        return PLAIN

    def _of_compare(self, node: Any) -> int:
        for each in node.ops:  # a key in a message: the same for the same roles
            allowed = (PLAIN, MESSAGE) if each.op in ("in", "notin") else (PLAIN,)
            self._one_of(self.kind(each.expr), *allowed)
        self._require_plain(node.expr)
        return PLAIN

    @staticmethod
    def _one_of(found: int, *allowed: int) -> int:
        if found not in allowed:
            raise _DoesMore
        return found


_PLAIN_IF_ITS_PARTS_ARE = frozenset((
    "Const", "TemplateData", "And", "Or", "Not", "Neg", "Pos", "Sub", "Mul", "Div", "FloorDiv",
    "Mod", "Pow", "List", "Tuple", "Dict", "Pair", "Keyword",
))  # fmt: skip


def _takes_nothing(node: Any) -> bool:
    """Return whether a call or a filter has no arguments."""
    return not (node.args or node.kwargs or node.dyn_args or node.dyn_kwargs)


def _key(node: Any) -> Any:
    """Return the constant key of `message.content` or `message['content']`; else None."""
    if type(node).__name__ == "Getattr":
        return node.attr
    is_const = type(node).__name__ == "Getitem" and type(node.arg).__name__ == "Const"
    return node.arg.value if is_const else None
