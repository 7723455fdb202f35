"""What two releases say of a symbol, as text that can be compared."""

from __future__ import annotations

import ast
import copy
import difflib

from sglang_kvc.tools.upstream_diff.symbols import (
    FUNCTIONS,
    Function,
    Symbol,
    parameters,
)


def signature_text(symbol: Symbol) -> str:
    """Parameters with defaults and kinds, without annotations."""
    if symbol.function is None:
        return ", ".join(parameters(symbol) or ())
    return ast.unparse(_untyped(copy.deepcopy(symbol.function)).args)


def body_text(symbol: Symbol) -> list[str]:
    """Lines of all definitions without comments, types, help texts and formatting.

    Of a class only its head and its fields: its methods are members of their own.
    """
    lines: list[str] = []
    for node in symbol.nodes:
        node = copy.deepcopy(node)
        if isinstance(node, ast.ClassDef):
            node.body = [n for n in node.body if not isinstance(n, FUNCTIONS)]
            node.body = node.body or [ast.Pass()]
        for inner in ast.walk(node):
            if isinstance(inner, FUNCTIONS):
                _untyped(inner)
            if isinstance(inner, (*FUNCTIONS, ast.ClassDef)):
                _drop_docstring(inner)
            elif isinstance(inner, ast.AnnAssign):
                inner.annotation = _bare_type(inner.annotation)
        lines += ast.unparse(node).splitlines()
    return lines


def head_text(node: ast.ClassDef) -> str:
    """Decorators, bases and keywords of a class."""
    bases = ", ".join(ast.unparse(n) for n in (*node.bases, *node.keywords))
    decorators = [f"@{ast.unparse(n)}" for n in node.decorator_list]
    return " ".join([*decorators, f"{node.name}({bases})"])


def changed_lines(old: list[str], new: list[str]) -> list[str]:
    """A unified diff without its head; empty if nothing differs."""
    return list(difflib.unified_diff(old, new, n=2, lineterm=""))[2:]


def amount(diff: list[str], new: list[str]) -> str:
    """How much a diff changes, for example ``+12 -3 of 80 lines``."""
    added = sum(line.startswith("+") for line in diff)
    removed = sum(line.startswith("-") for line in diff)
    return f"+{added} -{removed} of {len(new)} lines"


def difference(old: tuple[str, ...], new: tuple[str, ...]) -> str:
    """Names that went and came, for example ``-chunked +cache_salt``."""
    went = [f"-{name}" for name in old if name not in new]
    came = [f"+{name}" for name in new if name not in old]
    return " ".join([*went, *came]) or "another order"


def shortened(text: str, most: int = 72) -> str:
    """The text, cut with three dots if it is too long for a table."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _drop_docstring(node: ast.AST) -> None:
    body: list[ast.stmt] = node.body  # type: ignore[attr-defined]
    first = body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        body[:] = body[1:] or [ast.Pass()]


def _untyped(node: Function) -> Function:
    """The function, now without annotations."""
    node.returns = None
    for inner in ast.walk(node.args):
        if isinstance(inner, ast.arg):
            inner.annotation = None
    return node


def _bare_type(annotation: ast.expr) -> ast.expr:
    """The type in ``A[type, help, ...]``, SGLang's way to declare a setting."""
    if isinstance(annotation, ast.Subscript):
        is_annotated = ast.unparse(annotation.value) in ("A", "Annotated")
        if is_annotated and isinstance(annotation.slice, ast.Tuple):
            return annotation.slice.elts[0]
    return annotation
