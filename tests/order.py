"""Finds code whose result may depend on the order of a set, of a directory listing, or of finished work.

The order of a set of strings changes with ``PYTHONHASHSEED``, that is from one start to the next; a directory lists its
entries as the file system likes; workers finish when they do. Whoever goes through one of these sorts it first, or asks
for something that has no order (``len``, ``in``, another set), or says why the order cannot matter, in a comment
``# any order: …`` on that line or the one above.

Sets are recognised by how they are made and by annotations, module by module; nothing is imported or run.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

MARK = "# any order:"
# What gives the same whatever the order is. With a key, equal keys stay in the order in which they came.
_ORDERLESS = {"sorted", "len", "min", "max", "any", "all", "set", "frozenset", "bool", "isinstance"}
_KEYED = {"sorted", "min", "max"}
_ORDERED = {"list", "tuple", "enumerate", "zip", "map", "filter", "iter", "next", "sum", "reversed", "islice", "chain"}
_ORDERED_METHODS = {"join", "extend", "fromkeys", "from_iterable", "pop", "array", "tensor", "stack"}
_SET_NAMES = {"set", "frozenset", "Set", "AbstractSet", "MutableSet"}
_SET_METHODS = {"union", "intersection", "difference", "symmetric_difference"}
_LISTINGS = {"glob", "rglob", "iterdir", "listdir", "scandir", "walk", "iglob"}
_UNFINISHED = {"as_completed", "imap_unordered"}


@dataclass
class _Names:
    """What is known to be a set (names of attributes, of functions, by function of variables), or a listing."""

    attributes: set[str] = field(default_factory=set)
    functions: set[str] = field(default_factory=set)
    local: dict[ast.AST, set[str]] = field(default_factory=dict)
    listings: dict[ast.AST, set[str]] = field(default_factory=dict)


class Finder:
    """Looks through one module."""

    def __init__(self, source: str, functions: Collection[str] = ()) -> None:
        self._lines = source.splitlines()
        self._tree = ast.parse(source)
        self._parent = {child: node for node in ast.walk(self._tree) for child in ast.iter_child_nodes(node)}
        self._names = _Names(functions=set(functions))
        self._learn_annotations()
        self._learn_assignments()

    def found(self) -> Iterator[tuple[int, str]]:
        """Line and what is wrong there."""
        for node in ast.walk(self._tree):
            what = self._fault(node)
            if what and not self._excused(node):
                yield node.lineno, what  # type: ignore[attr-defined]

    def _excused(self, node: ast.AST) -> bool:
        while not isinstance(node, ast.stmt):
            node = self._parent[node]
        first, last = node.lineno, getattr(node, "end_lineno", node.lineno)
        if isinstance(node, ast.For | ast.While | ast.With | ast.If):
            last = node.body[0].lineno - 1
        return any(MARK in line for line in self._lines[max(0, first - 2) : max(first, last)])

    def _fault(self, node: ast.AST) -> str | None:
        if isinstance(node, ast.Call) and (_called(node) in _UNFINISHED or _is_name(node.func, "wait")):
            return f"{_called(node)}() gives what is finished first"
        if isinstance(node, ast.Call) and _is_name(node.func, "hash"):
            return "hash() of a string is another one in each process"
        if isinstance(node, ast.keyword) and node.arg == "key" and _called_name(node.value) in ("id", "hash"):
            return f"sorted by {_called_name(node.value)}(), which is another one in each process"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "pop":
            return "pop() of a set takes any of them" if not node.args and self._is_set(node.func.value) else None
        if isinstance(node, ast.expr) and (self._is_set(node) or self._is_listing(node)):
            return self._used_in_order(node)
        return None

    def _used_in_order(self, node: ast.expr) -> str | None:
        """How the place where it stands depends on its order."""
        parent = self._parent[node]
        what = "a directory listing" if self._is_listing(node) else "a set"
        if isinstance(parent, ast.comprehension) and parent.iter is node:
            return self._comprehension(self._parent[parent], what)
        if isinstance(parent, ast.For) and parent.iter is node:
            return f"a loop over {what}"
        if isinstance(parent, ast.Starred):
            return None if isinstance(self._parent[parent], ast.Set) else f"{what} is unpacked"
        if isinstance(parent, ast.YieldFrom):
            return f"yields from {what}"
        if isinstance(parent, ast.Call) and node in parent.args:
            return self._argument(parent, what)
        return None

    def _comprehension(self, owner: ast.AST, what: str) -> str | None:
        if isinstance(owner, ast.SetComp):
            return None
        if isinstance(owner, ast.GeneratorExp):
            call = self._parent[owner]
            if isinstance(call, ast.Call) and owner in call.args:
                return self._argument(call, what, of_items=True)
        return f"a comprehension over {what}"

    def _argument(self, call: ast.Call, what: str, *, of_items: bool = False) -> str | None:
        name, keyed = _called(call), any(keyword.arg == "key" for keyword in call.keywords)
        # Names in one folder are unique, so that no two are equal under a key; sets of other things may have ties.
        if name in _KEYED and keyed and what == "a set":
            return f"{name}() of {what} by a key leaves equals in any order"
        if isinstance(call.func, ast.Name) and name in _ORDERLESS:
            return None
        if name == "sum" and what == "a directory listing":
            # Sizes and counts: whole numbers.
            return None
        if of_items or name in _ORDERED or (isinstance(call.func, ast.Attribute) and name in _ORDERED_METHODS):
            return f"{name}() of {what}"
        return None

    def _is_listing(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self._names.listings.get(self._scope(node), set())
        return isinstance(node, ast.Call) and _called(node) in _LISTINGS

    def _is_set(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Set | ast.SetComp):
            return True
        if isinstance(node, ast.Call):
            name = _called(node)
            if isinstance(node.func, ast.Attribute) and name in _SET_METHODS:
                return True
            return name in self._names.functions or _is_name(node.func, "set", "frozenset")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr | ast.BitAnd | ast.Sub | ast.BitXor):
            return any(self._is_set(side) or _is_keys(side) for side in (node.left, node.right))
        if isinstance(node, ast.IfExp):
            return self._is_set(node.body) or self._is_set(node.orelse)
        if isinstance(node, ast.Attribute):
            return node.attr in self._names.attributes
        return isinstance(node, ast.Name) and node.id in self._names.local.get(self._scope(node), set())

    def _scope(self, node: ast.AST) -> ast.AST:
        while not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Module | ast.Lambda):
            node = self._parent[node]
        return node

    def _learn_annotations(self) -> None:
        for node in ast.walk(self._tree):
            if isinstance(node, ast.FunctionDef):
                if _says_set(node.returns):
                    self._names.functions.add(node.name)
                for argument in [*node.args.args, *node.args.kwonlyargs]:
                    if _says_set(argument.annotation):
                        self._names.local.setdefault(node, set()).add(argument.arg)
            elif isinstance(node, ast.AnnAssign) and _says_set(node.annotation):
                self._call_a_set(node.target)

    def _learn_assignments(self) -> None:
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Assign) and self._is_set(node.value):
                for target in node.targets:
                    self._call_a_set(target)
            elif isinstance(node, ast.Assign) and self._is_listing(node.value):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
                self._names.listings.setdefault(self._scope(node), set()).update(names)

    def _call_a_set(self, target: ast.expr) -> None:
        if isinstance(target, ast.Attribute):
            self._names.attributes.add(target.attr)
        elif isinstance(target, ast.Name):
            scope = self._parent[target]
            while not isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef | ast.Module | ast.ClassDef):
                scope = self._parent[scope]
            if isinstance(scope, ast.ClassDef):
                self._names.attributes.add(target.id)
            else:
                self._names.local.setdefault(scope, set()).add(target.id)


def _is_name(node: ast.expr, *names: str) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def _called(call: ast.Call) -> str:
    return _called_name(call.func)


def _called_name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _is_keys(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and _called(node) == "keys"


def _says_set(annotation: ast.expr | None) -> bool:
    if isinstance(annotation, ast.Subscript):
        annotation = annotation.value
    return annotation is not None and _called_name(annotation) in _SET_NAMES


def functions_of_sets(sources: Collection[str]) -> set[str]:
    """The names of functions that give a set wherever they are defined."""
    says: dict[str, bool] = {}
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                says[node.name] = says.get(node.name, True) and _says_set(node.returns)
    return {name for name, always in says.items() if always}


def faults(root: Path, *, without: str | None = None) -> list[str]:
    """All such places below a folder, as ``file:line: what``; ``without``: a folder in it that is left out."""
    paths = [path for path in sorted(root.rglob("*.py")) if path.relative_to(root).parts[0] != without]
    sources = {path: path.read_text(encoding="utf-8") for path in paths}
    functions = functions_of_sets(sources.values())
    return [
        f"{path.relative_to(root.parent)}:{line}: {what}"
        for path, source in sources.items()
        for line, what in Finder(source, functions).found()
    ]
