"""Find functions, classes and their members in a release, by syntax alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sglang_kvc.tools.upstream_diff.release import Release

Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_MOST_HOPS = 12
# Since 0.5.20 the fields of ServerArgs are declared here, in classes with _NS_PATH, and
# put together when the module is imported.
_ASSEMBLED = {"ServerArgs": ("sglang/srt/arg_groups/fields", "_NS_PATH")}


@dataclass(frozen=True)
class Symbol:
    """What a name stands for.

    Parameters
    ----------
    name : str
        Last part of its name.
    module : str
        Module that defines it, after re-exports were followed.
    path : str
        File of that module inside the release.
    nodes : tuple of ast.AST
        All its definitions, for example a property and its setter.
    owner : str
        Class that defines it; empty for a name of the module.
    declared : bool
        Whether it is declared: in a class body, by ``__init__`` or in the module.
        Others are attributes that some method sets.
    """

    name: str
    module: str
    path: str
    nodes: tuple[ast.AST, ...]
    owner: str = ""
    declared: bool = True

    @property
    def line(self) -> int:
        """Line of the first definition."""
        line: int = getattr(self.nodes[0], "lineno", 0)
        return line

    @property
    def where(self) -> str:
        """File and line, without the folder that all share."""
        return f"{self.path.removeprefix('sglang/srt/')}:{self.line}"

    @property
    def function(self) -> Function | None:
        """The function, if it is one."""
        node = self.nodes[0]
        return node if isinstance(node, FUNCTIONS) else None

    @property
    def class_node(self) -> ast.ClassDef | None:
        """The class, if it is one."""
        node = self.nodes[0]
        return node if isinstance(node, ast.ClassDef) else None


def find(release: Release, target: str) -> Symbol | None:
    """Find ``module:qualified.name``, through re-exports and base classes.

    The ``__init__`` that a dataclass does not write down is the class itself.
    """
    module, _, path = target.partition(":")
    first, *rest = path.split(".")
    symbol = _in_module(release, module, first, _MOST_HOPS)
    for name in rest:
        if symbol is None:
            return None
        node = symbol.class_node
        if node is None:
            # An attribute of an object, such as envs.SOME_VARIABLE: look in its class.
            symbol = _class_of_value(release, symbol)
            node = symbol.class_node if symbol else None
        if symbol is None or node is None:
            return None
        found = members(release, symbol).get(name)
        if found is None and name == "__init__" and is_record(node):
            return symbol
        symbol = found
    return symbol


def members(release: Release, symbol: Symbol) -> dict[str, Symbol]:
    """Fields and methods of a class by name, those of its bases included."""
    return _members(release, symbol, _MOST_HOPS)


def parameters(symbol: Symbol) -> tuple[str, ...] | None:
    """Names of the parameters in order, without stars; None if it is no function.

    For a class, those of its own ``__init__``; for a record, the fields of its body.
    """
    node = symbol.class_node
    function = symbol.function
    if node is not None:
        inits = [n for n in node.body if getattr(n, "name", "") == "__init__"]
        if not inits:
            return tuple(field_names(node)) if is_record(node) else ()
        function = inits[0] if isinstance(inits[0], FUNCTIONS) else None
    if function is None:
        return None
    args = function.args
    named = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
    return tuple(arg.arg for arg in named if arg is not None)


def is_record(node: ast.ClassDef) -> bool:
    """Whether a class makes its ``__init__`` of its fields."""
    marks = ("dataclass", "Struct", "NamedTuple")
    head = [*node.decorator_list, *node.bases]
    return any(mark in ast.unparse(item) for item in head for mark in marks)


def field_names(node: ast.ClassDef) -> list[str]:
    """Annotated fields of a class body, in order."""
    return [
        item.target.id
        for item in node.body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and "ClassVar" not in ast.unparse(item.annotation)
    ]


def statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body, also those inside if, try and with."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            for name in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body)


def _in_module(release: Release, module: str, name: str, hops: int) -> Symbol | None:
    parsed = release.parse(module)
    if parsed is None or not hops:
        return None
    path, tree = parsed
    body = list(statements(tree.body))
    nodes = tuple(node for node in body if name in _defined_names(node))
    if nodes:
        return Symbol(name, module, path, nodes)
    for node in body:
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            if name in (alias.asname, alias.name) or alias.name == "*":
                assert isinstance(node, ast.ImportFrom)
                origin = _absolute(node, module, path)
                theirs = name if alias.name == "*" else alias.name
                found = _in_module(release, origin, theirs, hops - 1)
                if found is not None:
                    return found
    return None


def _defined_names(node: ast.AST) -> set[str]:
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return {node.name}
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        targets = [node.target]
    inner = (name for target in targets for name in ast.walk(target))
    names = (n for n in inner if isinstance(n, ast.Name))
    return {n.id for n in names if isinstance(n.ctx, ast.Store)}


def _absolute(node: ast.ImportFrom, module: str, path: str) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    keep = len(parts) - node.level + path.endswith("/__init__.py")
    return ".".join([*parts[:keep], *([node.module] if node.module else [])])


def _members(release: Release, symbol: Symbol, hops: int) -> dict[str, Symbol]:
    node = symbol.class_node
    found: dict[str, Symbol] = {}
    if node is None or not hops:
        return found
    for base in reversed(node.bases):
        name = ast.unparse(base).partition("[")[0]
        origin = _in_module(release, symbol.module, name, _MOST_HOPS)
        if origin is not None and origin.class_node is not node:
            found |= _members(release, origin, hops - 1)
    own: dict[str, list[ast.AST]] = {}
    for item in statements(node.body):
        for name in _defined_names(item):
            own.setdefault(name, []).append(item)
    declared = {**own, **_set_on_self(node, only_init=True)}
    for names, is_declared in ((_set_on_self(node), False), (declared, True)):
        for name, nodes in names.items():
            found[name] = Symbol(
                name, symbol.module, symbol.path, tuple(nodes), node.name, is_declared
            )
    folder, mark = _ASSEMBLED.get(node.name, ("", ""))
    for module in release.modules_in(folder) if folder else ():
        found |= _marked_fields(release, module, mark)
    return found


def _marked_fields(release: Release, module: str, mark: str) -> dict[str, Symbol]:
    parsed = release.parse(module)
    found: dict[str, Symbol] = {}
    path, tree = parsed if parsed else ("", ast.Module([], []))
    for node in tree.body:
        names = [name for n in getattr(node, "body", []) for name in _defined_names(n)]
        if isinstance(node, ast.ClassDef) and mark in names:
            for item in node.body:
                for name in _defined_names(item) & set(field_names(node)):
                    found[name] = Symbol(name, module, path, (item,), node.name)
    return found


def _set_on_self(
    node: ast.ClassDef, only_init: bool = False
) -> dict[str, list[ast.AST]]:
    """Attributes that methods set on their first parameter, at their first place."""
    found: dict[str, list[ast.AST]] = {}
    for method in node.body:
        if not isinstance(method, FUNCTIONS) or not method.args.args:
            continue
        if only_init and method.name != "__init__":
            continue
        first = method.args.args[0].arg
        for item in ast.walk(method):
            for name in _attributes_set(item, first):
                found.setdefault(name, [item])
    return found


def _attributes_set(item: ast.AST, owner: str) -> list[str]:
    if isinstance(item, ast.Assign):
        targets = item.targets
    elif isinstance(item, ast.AnnAssign):
        targets = [item.target]
    else:
        return []
    inner = (node for target in targets for node in ast.walk(target))
    return [
        node.attr
        for node in inner
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == owner
    ]


def _class_of_value(release: Release, symbol: Symbol) -> Symbol | None:
    """Class of an object that is made by calling it, as in ``envs = Envs()``."""
    value = getattr(symbol.nodes[0], "value", None)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        return _in_module(release, symbol.module, value.func.id, _MOST_HOPS)
    return None
