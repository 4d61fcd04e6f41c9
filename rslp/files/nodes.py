"""From YAML nodes to plain values: duplicate keys, alias bombs and odd tags are found here, each with its line."""

from __future__ import annotations

import re
from collections.abc import Hashable
from contextlib import suppress
from typing import Any

import yaml

from rslp.errors import Problem

MAX_NODES = 400_000
MAX_DEPTH = 100

_TOKEN = re.compile("\ue000(\\d+)\ue001")
# Variables among what numbers are written with.
_MAY_BE_NUMBER = re.compile(r"[0-9eE.+_-]*(?:\$\{[A-Za-z_][A-Za-z0-9_]*\}[0-9eE.+_-]*)+\Z")
_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_SCALARS = yaml.constructor.SafeConstructor()
_CONVERT: dict[str, Any] = {
    f"{_TAG}null": lambda _: None,
    f"{_TAG}bool": _SCALARS.construct_yaml_bool,
    f"{_TAG}int": _SCALARS.construct_yaml_int,
    f"{_TAG}float": _SCALARS.construct_yaml_float,
    f"{_TAG}timestamp": _SCALARS.construct_yaml_timestamp,
}
Marks = dict[int, dict[Any, tuple[int, yaml.Node]]]


_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+\Z")


class Loader(yaml.CSafeLoader):
    """PyYAML's C loader, with the floats of YAML 1.2: ``1e-4`` is a number, not a text."""


class _Resolver(yaml.resolver.Resolver):
    """Decides the type of an unquoted text, as ``Loader`` does."""


for _class in (Loader, _Resolver):
    _class.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))
_RESOLVER = _Resolver()


class Template(str):
    """A scalar with placeholders in it, as it was written.

    Attributes:
        plain: whether it stood unquoted, so that what it becomes takes the type of its constant (``8``, not ``"8"``).
    """

    __slots__ = ("plain",)
    plain: bool

    def __new__(cls, text: str, *, plain: bool) -> Template:
        """Make a template of the text."""
        made = super().__new__(cls, text)
        made.plain = plain
        return made


class Unquoted(str):
    """A text with a ``${VAR}`` in it that stood without quotes, so that what it becomes may be a number."""

    __slots__ = ()


class Braced(dict[Any, Any]):
    """What an unquoted ``{word}`` reads as: a mapping with one key and no value; meant was a placeholder, perhaps."""


class NodeReader:
    """Builds values from nodes and collects what is wrong with them in ``problems``."""

    def __init__(self, *, name: str, held: tuple[str, ...]) -> None:
        """Make a reader.

        Args:
            name: the file's name in messages.
            held: the texts of the placeholders that were hidden from the parser, by number.
        """
        self.problems: list[Problem] = []
        self._name = name
        self._held = held
        self._built: dict[int, tuple[Any, int]] = {}
        self._open: set[int] = set()

    def read(self, root: yaml.Node) -> Any:
        """Give the value of a whole document; aliases share their value, and may not blow the document up."""
        value, size = self._build(root)
        if size > MAX_NODES:
            self._fault(f"its aliases expand to more than {MAX_NODES} values", root)
        return value

    def _build(self, node: yaml.Node) -> tuple[Any, int]:
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node), 1
        known = self._built.get(id(node))
        if known is not None:
            return known
        if id(node) in self._open:
            self._fault("an alias refers to itself", node)
            return None, 1
        if len(self._open) >= MAX_DEPTH:
            self._fault(f"is nested deeper than {MAX_DEPTH} levels", node)
            return None, 1
        self._open.add(id(node))
        built = self._sequence(node) if isinstance(node, yaml.SequenceNode) else self._mapping(node)
        self._open.discard(id(node))
        self._built[id(node)] = built
        return built

    def _sequence(self, node: yaml.Node) -> tuple[list[Any], int]:
        self._check_tag(node, "seq")
        pairs = [self._build(child) for child in node.value]
        return [value for value, _ in pairs], 1 + sum(size for _, size in pairs)

    def _mapping(self, node: yaml.Node) -> tuple[dict[Any, Any], int]:
        self._check_tag(node, "map")
        result: dict[Any, Any] = Braced() if _is_braced(node) else {}
        inherited: dict[Any, Any] = {}
        total = 1
        for key_node, value_node in node.value:
            value, size = self._build(value_node)
            total += size + 1
            if key_node.tag == _MERGE:
                self._inherit(inherited, value, key_node)
                continue
            key = self._key(key_node)
            if key in result:
                self._fault("stands twice in the same mapping; keep one", key_node, key=str(key))
            result[key] = value
        if inherited:
            result = {**inherited, **result}
        return result, total

    def _inherit(self, into: dict[Any, Any], value: Any, node: yaml.Node) -> None:
        for parent in value if isinstance(value, list) else [value]:
            if not isinstance(parent, dict):
                self._fault("<< wants a mapping, or a list of mappings", node)
                return
            for key, inherited in parent.items():
                into.setdefault(key, inherited)

    def _key(self, node: yaml.Node) -> Hashable:
        if isinstance(node, yaml.ScalarNode):
            key: Hashable = self._scalar(node)
            return key
        self._fault("a key must be a single value, not a list or a mapping", node)
        return f"line {node.start_mark.line + 1}"

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text: str = node.value
        plain = not node.style
        if self._held and "\ue000" in text:
            texts = [self._held[int(number)] for number in _TOKEN.findall(text)]
            text = _TOKEN.sub(lambda match: self._held[int(match.group(1))], text)
            if not all(one.startswith("$") for one in texts):
                return Template(text, plain=plain)
            return Unquoted(text) if plain and _MAY_BE_NUMBER.match(text) else text
        if node.tag == f"{_TAG}str" or node.tag == "tag:yaml.org,2002:value":
            return text
        convert = _CONVERT.get(node.tag)
        if convert is None:
            self._fault(f"the YAML tag {node.tag!r} is not allowed", node)
            return text
        try:
            return convert(node)
        except (ValueError, KeyError, AttributeError):
            self._fault(f"{text!r} is no valid {node.tag.removeprefix(_TAG)}", node)
            return text

    def _check_tag(self, node: yaml.Node, wanted: str) -> None:
        if node.tag != f"{_TAG}{wanted}":
            self._fault(f"the YAML tag {node.tag!r} is not allowed", node)

    def _fault(self, what: str, node: yaml.Node, *, key: str = "") -> None:
        self.problems.append(Problem(what, file=self._name, line=node.start_mark.line + 1, key=key))


def _is_braced(node: yaml.Node) -> bool:
    if not isinstance(node, yaml.MappingNode) or not node.flow_style or len(node.value) != 1:
        return False
    key, value = node.value[0]
    return isinstance(key, yaml.ScalarNode) and key.end_mark.index == value.start_mark.index == value.end_mark.index


def plain_scalar(text: str) -> Any:
    """Give the value that an unquoted text has in YAML: ``18`` is a number, ``true`` a truth value."""
    node = yaml.ScalarNode(_RESOLVER.resolve(yaml.ScalarNode, text, (True, False)), text)  # type: ignore[no-untyped-call]
    convert = _CONVERT.get(node.tag)
    return text if convert is None else convert(node)


def line_of(root: yaml.Node | None, key_path: tuple[str | int, ...], *, marks: Marks) -> int | None:
    """Give the 1-based line of a key below ``root``, or None; ``marks`` remembers the mappings that were walked."""
    node, line = root, 1
    for key in key_path:
        if node is None or isinstance(node, yaml.ScalarNode):
            return None
        index = marks.get(id(node))
        if index is None:
            index = marks[id(node)] = _index(node)
        found = index.get(key) or (index.get(f"{key}+") if isinstance(key, str) else None)
        if found is None:
            return None
        line, node = found
    return line if root is not None else None


def _index(node: yaml.Node) -> dict[Any, tuple[int, yaml.Node]]:
    if isinstance(node, yaml.SequenceNode):
        return {position: (child.start_mark.line + 1, child) for position, child in enumerate(node.value)}
    index: dict[Any, tuple[int, yaml.Node]] = {}
    for key_node, value_node in node.value:
        if key_node.tag == _MERGE:
            for parent in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                for key, place in _index(parent).items():
                    index.setdefault(key, place)
            continue
        if isinstance(key_node, yaml.ScalarNode):
            place = (key_node.start_mark.line + 1, value_node)
            index[key_node.value] = place
            if key_node.tag in _CONVERT:
                with suppress(ValueError, KeyError, AttributeError):  # told when the value is read
                    index[_CONVERT[key_node.tag](key_node)] = place
    return index
