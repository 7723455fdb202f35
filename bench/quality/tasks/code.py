"""Python modules of the standard library: what they are for, and what they define.

The text is that of the interpreter that runs this: compare runs of one of them only.
"""

from __future__ import annotations

import ast
import functools
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from bench.quality.tasks.corpus import half
from bench.quality.tasks.sample import Draw, Sample

LEAST_WORDS = 40
"""Of a docstring that is asked for."""
CHARS = 5_000, 48_000
"""Of a module: some 1,500 to 12,000 tokens."""
NAMES = 8, 40
"""That a module defines, if they are asked for."""
SUMMARY_TOKENS, LIST_TOKENS = 400, 300
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef


@dataclass(frozen=True)
class Purpose:
    """A module without one of its docstrings, and that docstring.

    Attributes
    ----------
    code : str
    name : str
        Of the class or function; empty for the module's own.
    doc : str
    """

    code: str
    name: str
    doc: str


@functools.cache
def modules() -> tuple[str, ...]:
    """Sources of middle length, in alphabetical order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.glob("*.py")) if path.stem != "this"]
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
    return tuple(text for text in texts if CHARS[0] <= len(text) <= CHARS[1])


@functools.cache
def purposes(seed: int) -> tuple[Purpose, ...]:
    """Docstrings of half of the modules: their own first, then what they define."""
    own, inner = [], []
    for text in half(modules(), seed):
        tree = ast.parse(text)
        own += _documented(text, tree, "")
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                inner += _documented(text, node, node.name)
    return (*own, *inner)


def _documented(text: str, node: _Documented, name: str) -> list[Purpose]:
    doc = ast.get_docstring(node) or ""
    if len(doc.split()) < LEAST_WORDS:
        return []
    told = node.body[0]
    assert told.end_lineno is not None
    lines = text.splitlines(keepends=True)
    code = "".join([*lines[: told.lineno - 1], *lines[told.end_lineno :]])
    return [Purpose(code, name, doc)] if len(code) >= CHARS[0] else []


def code_purpose(draw: Draw) -> Sample:
    """What a module, a class or a function is for, against what its authors say."""
    found = purposes(draw.seed % 2)
    one = found[draw.index % len(found)]
    what = f"`{one.name}`" if one.name else "this module"
    ask = (
        f"The docstring of {what} is missing above. Write it in full: what it is for, "
        "how it is used, and what one must know of it."
    )
    return draw.sample(
        prompt=f"Read the following Python module.\n\n{one.code}\n\n{ask}",
        answers=(one.doc,),
        max_new_tokens=SUMMARY_TOKENS,
        scorer="rouge_l",
        question=ask,
    )


@functools.cache
def defining(seed: int) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Half of the modules that define a list's worth of names, with the names."""
    found = []
    for text in half(modules(), seed):
        body = ast.parse(text).body
        nodes = [n for n in body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
        names = tuple(dict.fromkeys(node.name for node in nodes))
        if NAMES[0] <= len(names) <= NAMES[1]:
            found.append((text, names))
    return tuple(found)


def code_names(draw: Draw) -> Sample:
    """All functions and classes that a module defines, or every second class of it."""
    found = defining(draw.seed % 2)
    text, names = found[draw.index % len(found)]
    turn = draw.index // len(found)
    if turn % 2:
        # Another text for the second turn: the last half of the module.
        lines = text.splitlines(keepends=True)
        text = "".join(lines[len(lines) // 2 :])
        names = tuple(n for n in names if f"\ndef {n}(" in text or _is_class(n, text))
    ask = (
        "List the names of all functions and classes that are defined at the top level "
        "of the code above, in their order, one on each line and nothing else."
    )
    return draw.sample(
        prompt=f"Read the following Python code.\n\n{text}\n\n{ask}",
        answers=names,
        max_new_tokens=LIST_TOKENS,
        scorer="listed",
        question=ask,
    )


def _is_class(name: str, text: str) -> bool:
    return any(f"\nclass {name}{end}" in text for end in "(:")
