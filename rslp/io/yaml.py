"""YAML configs: read with the line of every value and safe against any content; written for people to read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rslp.errors import ConfigError, KeyPath, Problem, StoreError, dotted
from rslp.io.checksums import is_unchanged
from rslp.io.objectstore import ObjectStore, is_remote

__all__ = ["MAX_BYTES", "Braced", "Document", "Template", "Unquoted", "parse_yaml", "plain_scalar", "read_yaml"]

MAX_BYTES = 4_000_000
# Values in a file, an alias (`*name`) counted with all values that it stands for.
MAX_NODES = 400_000
# Mappings and lists within each other.
MAX_DEPTH = 100

# A placeholder: {PATCH_SIZE} or {256/PATCH_SIZE}; or an environment variable: ${VAR}.
_PLACEHOLDER = re.compile(r"(?<!\$)\{[ \t]*(?:\d+[ \t]*/[ \t]*)?[A-Z][A-Z0-9_]*[ \t]*\}|\$\{[A-Za-z_][A-Za-z0-9_]*\}")
# Stands for a placeholder in the text that the parser sees: its number between two private characters of Unicode.
_TOKEN = re.compile("\ue000(\\d+)\ue001")
# A text that may be a number once its variables are expanded: `${SIZE}`, `1e-${POWER}`.
_MAY_BE_NUMBER = re.compile(r"[0-9eE.+_-]*(?:\$\{[A-Za-z_][A-Za-z0-9_]*\}[0-9eE.+_-]*)+\Z")
# Floats of YAML 1.2 that YAML 1.1, and so PyYAML, takes for texts: `1e-4`.
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+\Z")
# Lists, or mappings with `?`, that are opened within each other on one line: `- - - 1`.
_INLINE_NESTING = re.compile(rf"(?:[-?][ \t]+){{{MAX_DEPTH},}}")
_BRACKET = re.compile(r"[\[\]{}]")
_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_SCALARS = yaml.constructor.SafeConstructor()
# Makes the value of a scalar other than a text, by its tag; no other tag is allowed.
_CONVERT: dict[str, Any] = {
    f"{_TAG}null": lambda _: None,
    f"{_TAG}bool": _SCALARS.construct_yaml_bool,
    f"{_TAG}int": _SCALARS.construct_yaml_int,
    f"{_TAG}float": _SCALARS.construct_yaml_float,
    f"{_TAG}timestamp": _SCALARS.construct_yaml_timestamp,
}
# By the `id()` of the node of a mapping or list: key or position -> (1-based line, node of the value).
_LineIndex = dict[int, dict[Any, tuple[int, yaml.Node]]]


class Loader(yaml.CSafeLoader):
    """PyYAML's C loader, with the floats of YAML 1.2: ``1e-4`` is a number, not a text."""


class _Resolver(yaml.resolver.Resolver):
    """Decides the tag of an unquoted text as ``Loader`` does, for texts that are in no file."""


for _class in (Loader, _Resolver):
    _class.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))
_RESOLVER = _Resolver()


class Template(str):
    """A scalar with placeholders of constants (``{PATCH_SIZE}``) in it, as it was written.

    Attributes:
        plain: whether it was unquoted: once filled it may become a number (``8``, not ``"8"``).
    """

    __slots__ = ("plain",)
    plain: bool

    def __new__(cls, text: str, *, plain: bool) -> Template:
        """Make a template of the text."""
        template = super().__new__(cls, text)
        template.plain = plain
        return template


class Unquoted(str):
    """An unquoted text with a ``${VAR}`` in it, which may become a number when the variable is expanded."""

    __slots__ = ()


class Braced(dict[Any, Any]):
    """The mapping that an unquoted ``{word}`` is in YAML, one key without a value; perhaps a misspelt placeholder."""


@dataclass(frozen=True)
class Document:
    """One config file, read.

    Attributes:
        name: the path as it is shown to the user.
        data: plain mappings, lists and scalars; a scalar with a placeholder in it is a ``Template``.
        text: the file's text.
        sha256: hash of the file's bytes.
        folder: absolute folder, or URL, of the file; its relative paths are looked up there first.
    """

    name: str
    data: Any
    text: str = field(repr=False)
    sha256: str
    folder: str
    _root: yaml.Node | None = field(repr=False, compare=False, default=None)
    _index: _LineIndex = field(repr=False, compare=False, default_factory=dict)

    def line(self, key_path: KeyPath) -> int | None:
        """The 1-based line of a key, or None when the file does not hold it.

        Args:
            key_path: keys and list positions from the root; ``key`` also finds ``key+``.
        """
        node, line = self._root, 1
        for key in key_path:
            if node is None or isinstance(node, yaml.ScalarNode):
                return None
            index = self._index.get(id(node))
            if index is None:
                index = self._index[id(node)] = _index_of(node)
            entry = index.get(key) or (index.get(f"{key}+") if isinstance(key, str) else None)
            if entry is None:
                return None
            line, node = entry
        return line if self._root is not None else None

    def nearest_line(self, key_path: KeyPath) -> int | None:
        """The line of a key, or of the closest of its parents that the file holds (1 for the file itself)."""
        for length in range(len(key_path), 0, -1):
            line = self.line(key_path[:length])
            if line is not None:
                return line
        return 1

    def problem(self, message: str, key_path: KeyPath) -> Problem:
        """A problem with a key of the file, at its line or that of its nearest parent."""
        return Problem(message, self.name, self.nearest_line(key_path), dotted(key_path))


def _index_of(node: yaml.Node) -> dict[Any, tuple[int, yaml.Node]]:
    """Line and node of each value of a mapping or list, by key or position; with the keys that ``<<`` takes over."""
    if isinstance(node, yaml.SequenceNode):
        return {position: (child.start_mark.line + 1, child) for position, child in enumerate(node.value)}
    index: dict[Any, tuple[int, yaml.Node]] = {}
    for key_node, value_node in node.value:
        if key_node.tag == _MERGE:
            for parent in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                for key, entry in _index_of(parent).items():
                    index.setdefault(key, entry)
            continue
        if isinstance(key_node, yaml.ScalarNode):
            entry = (key_node.start_mark.line + 1, value_node)
            index[key_node.value] = entry
            if key_node.tag in _CONVERT:
                with suppress(ValueError, KeyError, AttributeError):  # reported when the value is read
                    index[_CONVERT[key_node.tag](key_node)] = entry
    return index


def read_yaml(path: str | Path, *, name: str | None = None) -> Document:
    """Read one YAML file, local or remote (``gs://…``).

    Args:
        path: the file.
        name: its name in messages; the path itself when left out.

    Raises:
        ConfigError: the file is missing, unreadable, too large, not UTF-8, invalid YAML, or its checksum is wrong.
    """
    shown = str(path) if name is None else name
    raw = _read_remote(str(path), shown) if is_remote(str(path)) else _read_local(Path(path), shown)
    if len(raw) > MAX_BYTES:
        raise _error(f"is larger than {MAX_BYTES // 1_000_000} MB; that is no config file", shown, None)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise _error("is not UTF-8 text; save the file as UTF-8", shown, line) from None
    if not is_unchanged(text):
        message = "is damaged, or was changed by hand: the checksum in its first line is that of another text; launch "
        raise _error(f"{message}the run again to have it written anew, or remove that line", shown, 1)
    folder = str(path).rsplit("/", 1)[0] if is_remote(str(path)) else str(Path(path).absolute().parent)
    return parse_yaml(text, name=shown, folder=folder, sha256=hashlib.sha256(raw).hexdigest())


def _error(message: str, name: str, line: int | None) -> ConfigError:
    return ConfigError(Problem(message, file=name, line=line))


def _read_local(path: Path, name: str) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _error("no such file", name, None) from None
    except IsADirectoryError:
        raise _error("is a folder; a YAML file is wanted", name, None) from None
    except (OSError, ValueError) as error:
        raise _error(f"cannot be read: {error or type(error).__name__}", name, None) from None


def _read_remote(url: str, name: str) -> bytes:
    folder, _, file = url.rpartition("/")
    try:
        raw = ObjectStore(folder, patience=0).read(file)
    except (StoreError, ValueError) as error:
        raise _error(f"cannot be read: {error}", name, None) from None
    if raw is None:
        raise _error("no such file", name, None)
    return raw


def parse_yaml(text: str, *, name: str, folder: str, sha256: str | None = None) -> Document:
    """Turn YAML text into a document; the arguments are those of ``Document``.

    Raises:
        ConfigError: the text is not valid YAML, or holds values that a config may not have.
    """
    _refuse_deep_nesting(text, name)
    if "\ue000" in text:
        raise _error("holds the private character U+E000, which is not allowed in a config", name, None)
    placeholders: list[str] = []

    def mask(match: re.Match[str]) -> str:
        placeholders.append(match.group())
        return f"\ue000{len(placeholders) - 1}\ue001"

    # Hidden from the parser, to which an unquoted `{PATCH_SIZE}` is a mapping, and `{256/PATCH_SIZE}px` an error.
    hidden = _PLACEHOLDER.sub(mask, text)
    try:
        root = yaml.compose(hidden, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = " ".join(part for part in (error.context, error.problem) if part)
        raise _error(f"is not valid YAML: {message}", name, None if mark is None else mark.line + 1) from None
    except yaml.YAMLError as error:
        raise _error(f"is not valid YAML: {str(error).splitlines()[0]}", name, None) from None
    reader = _NodeReader(name=name, placeholders=tuple(placeholders))
    data = None if root is None else reader.read(root)
    if reader.problems:
        raise ConfigError(reader.problems)
    digest = hashlib.sha256(text.encode()).hexdigest() if sha256 is None else sha256
    return Document(name=name, data=data, text=text, sha256=digest, folder=folder, _root=root)


def _refuse_deep_nesting(text: str, name: str) -> None:
    """Raise ``ConfigError`` for very deep nesting before the C parser sees it, whose stack would overflow."""
    depth = 0
    nesting = _INLINE_NESTING.search(text)
    offset = nesting.start() if nesting else None
    for match in _BRACKET.finditer(text):
        depth = depth + 1 if match.group() in "[{" else max(0, depth - 1)
        if depth > MAX_DEPTH:
            offset = match.start()
            break
    if offset is not None:
        raise _error(f"is nested deeper than {MAX_DEPTH} levels", name, text.count("\n", 0, offset) + 1)


class _NodeReader:
    """Builds values from PyYAML's nodes, and collects the problems.

    Args:
        name: the file's name in messages.
        placeholders: the texts that were hidden from the parser, by number.
    """

    def __init__(self, *, name: str, placeholders: tuple[str, ...]) -> None:
        self.problems: list[Problem] = []
        self._name = name
        self._placeholders = placeholders
        # By the `id()` of a node: its value, and the number of values in it.
        self._built: dict[int, tuple[Any, int]] = {}
        # The ids of the nodes that contain the one that is being read.
        self._open: set[int] = set()

    def read(self, root: yaml.Node) -> Any:
        """The value of a whole document; an alias is the same object as what it stands for, but counts in full."""
        value, size = self._build(root)
        if size > MAX_NODES:
            self._add_problem(f"its aliases expand to more than {MAX_NODES} values", root)
        return value

    def _build(self, node: yaml.Node) -> tuple[Any, int]:
        """The value of a node, and the number of values in it."""
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node), 1
        built = self._built.get(id(node))
        if built is not None:
            return built
        if id(node) in self._open:
            self._add_problem("an alias refers to itself", node)
            return None, 1
        if len(self._open) >= MAX_DEPTH:
            self._add_problem(f"is nested deeper than {MAX_DEPTH} levels", node)
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
                self._add_problem("stands twice in the same mapping; keep one", key_node, key=str(key))
            result[key] = value
        if inherited:
            result = {**inherited, **result}
        return result, total

    def _inherit(self, into: dict[Any, Any], value: Any, node: yaml.Node) -> None:
        """Add what a key ``<<`` (YAML's merge) takes over from other mappings; earlier ones win."""
        for parent in value if isinstance(value, list) else [value]:
            if not isinstance(parent, dict):
                self._add_problem("<< wants a mapping, or a list of mappings", node)
                return
            for key, inherited in parent.items():
                into.setdefault(key, inherited)

    def _key(self, node: yaml.Node) -> Hashable:
        if isinstance(node, yaml.ScalarNode):
            key: Hashable = self._scalar(node)
            return key
        self._add_problem("a key must be a single value, not a list or a mapping", node)
        return f"line {node.start_mark.line + 1}"

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        """The value of a scalar; with a placeholder it is a ``Template``, with a variable ``Unquoted`` or a text."""
        text: str = node.value
        plain = not node.style
        if self._placeholders and "\ue000" in text:
            placeholders = [self._placeholders[int(number)] for number in _TOKEN.findall(text)]
            text = _TOKEN.sub(lambda match: self._placeholders[int(match.group(1))], text)
            if not all(placeholder.startswith("$") for placeholder in placeholders):
                return Template(text, plain=plain)
            return Unquoted(text) if plain and _MAY_BE_NUMBER.match(text) else text
        if node.tag in (f"{_TAG}str", f"{_TAG}value"):
            return text
        convert = _CONVERT.get(node.tag)
        if convert is None:
            self._add_problem(f"the YAML tag {node.tag!r} is not allowed", node)
            return text
        try:
            return convert(node)
        except (ValueError, KeyError, AttributeError):
            self._add_problem(f"{text!r} is no valid {node.tag.removeprefix(_TAG)}", node)
            return text

    def _check_tag(self, node: yaml.Node, wanted: str) -> None:
        if node.tag != f"{_TAG}{wanted}":
            self._add_problem(f"the YAML tag {node.tag!r} is not allowed", node)

    def _add_problem(self, message: str, node: yaml.Node, *, key: str = "") -> None:
        self.problems.append(Problem(message, file=self._name, line=node.start_mark.line + 1, key=key))


def _is_braced(node: yaml.Node) -> bool:
    """Whether a node is written ``{word}``."""
    if not isinstance(node, yaml.MappingNode) or not node.flow_style or len(node.value) != 1:
        return False
    key, value = node.value[0]
    # No colon: the empty value stands where the key ends.
    return isinstance(key, yaml.ScalarNode) and key.end_mark.index == value.start_mark.index == value.end_mark.index


def plain_scalar(text: str) -> Any:
    """The value that an unquoted text has in YAML: ``18`` is a number, ``true`` a truth value."""
    node = yaml.ScalarNode(_RESOLVER.resolve(yaml.ScalarNode, text, (True, False)), text)  # type: ignore[no-untyped-call]
    convert = _CONVERT.get(node.tag)
    return text if convert is None else convert(node)


# A list of scalars that is not longer, in characters, is written on one line.
_WIDTH = 110


def dump_yaml(data: Any) -> str:
    """Write mappings, lists and scalars as YAML; keys stay in their order.

    Args:
        data: a value as ``read_yaml`` reads it; an ``Unquoted`` text is written without quotes.

    Returns:
        Text that reads back as equal data.
    """
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 30)
    return text.removesuffix("...\n")


class _Dumper(yaml.CSafeDumper):
    """PyYAML's writer for the values of a config."""

    def ignore_aliases(self, data: Any) -> bool:
        """True: a value that several keys share is written out for each of them."""
        del data
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Write a text: of several lines as a block (``|``), in quotes where it would be read as another value."""
    # PyYAML quotes what it would not read back as a text; `read_yaml` also reads 1e-4 and variables as other values.
    quoted = "${" in text or not isinstance(plain_scalar(text), str)
    style = "|" if "\n" in text else "'" if quoted and text.isprintable() else None
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


def _list(dumper: _Dumper, items: list[Any]) -> yaml.SequenceNode:
    """Write a list, on one line if it is short."""
    return dumper.represent_sequence(f"{_TAG}seq", items, flow_style=_is_short(items))


def _is_short(items: list[Any]) -> bool:
    """Whether a list is written on one line: scalars and short lists alone, of up to ``_WIDTH`` characters."""
    # `Unquoted` is left out, since not every reader takes `${VAR}` without quotes within brackets.
    nested = all(_is_short(item) if isinstance(item, list) else not isinstance(item, dict | Unquoted) for item in items)
    return nested and len(str(items)) <= _WIDTH


_Dumper.add_representer(list, _list)
_Dumper.add_representer(str, _text)
_Dumper.add_multi_representer(str, _text)
_Dumper.add_representer(Unquoted, lambda dumper, text: dumper.represent_scalar(f"{_TAG}str", str(text)))
