"""Read a YAML config so that every value can be traced to its line, and no file can crash or stall the reader."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rslp.errors import ConfigError, Problem, StoreError
from rslp.files.checksums import is_unchanged
from rslp.files.nodes import MAX_DEPTH, Braced, Loader, NodeReader, Template, Unquoted, line_of, plain_scalar
from rslp.files.stores import Store, is_remote

MAX_BYTES = 4_000_000

# A placeholder: {PATCH_SIZE} or {256/PATCH_SIZE}; or an environment variable: ${VAR}.
_PLACEHOLDER = re.compile(r"(?<!\$)\{[ \t]*(?:\d+[ \t]*/[ \t]*)?[A-Z][A-Z0-9_]*[ \t]*\}|\$\{[A-Za-z_][A-Za-z0-9_]*\}")
_INLINE_NESTING = re.compile(rf"(?:[-?][ \t]+){{{MAX_DEPTH},}}")
_BRACKET = re.compile(r"[\[\]{}]")

__all__ = ["MAX_BYTES", "Braced", "Document", "Template", "Unquoted", "parse_yaml", "plain_scalar", "read_yaml"]


@dataclass(frozen=True)
class Document:
    """One config file, read.

    Attributes:
        name: the path as it is shown to the user.
        data: plain mappings, lists and scalars; a scalar with a placeholder in it is a ``Template``.
        text: the file's text.
        sha256: hash of the file's bytes.
        folder: absolute folder (or remote prefix) that the file's relative paths refer to first.
    """

    name: str
    data: Any
    text: str = field(repr=False)
    sha256: str
    folder: str
    _root: yaml.Node | None = field(repr=False, compare=False, default=None)
    _marks: dict[int, dict[Any, tuple[int, yaml.Node]]] = field(repr=False, compare=False, default_factory=dict)

    def line(self, key_path: tuple[str | int, ...]) -> int | None:
        """Give the 1-based line where a key stands.

        Args:
            key_path: keys and list positions from the root; keys are found with and without a trailing ``+``.

        Returns:
            The line, or None when the file does not hold that key.
        """
        return line_of(self._root, key_path, marks=self._marks)

    def nearest_line(self, key_path: tuple[str | int, ...]) -> int | None:
        """Give the line of the key, or of the closest of its parents that the file holds (1 for the file itself)."""
        for length in range(len(key_path), 0, -1):
            line = self.line(key_path[:length])
            if line is not None:
                return line
        return 1


def read_yaml(path: str | Path, *, name: str | None = None) -> Document:
    """Read one YAML file, local or remote (``gs://…``).

    Args:
        path: the file.
        name: how to call it in messages; the path itself when left out.

    Returns:
        The document.

    Raises:
        ConfigError: the file is missing, unreadable, too large, not UTF-8, not sound YAML, or not as its checksum says.
    """
    shown = str(path) if name is None else name
    raw = _read_bytes(str(path), shown)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise _fault("is not UTF-8 text; save the file as UTF-8", shown, line) from None
    if not is_unchanged(text):
        what = "is damaged, or was changed by hand: the checksum in its first line is that of another text; launch the "
        raise _fault(f"{what}run again to have it written anew, or remove that line", shown, 1)
    remote = "://" in str(path)
    folder = str(path).rsplit("/", 1)[0] if remote else str(Path(path).absolute().parent)
    return parse_yaml(text, name=shown, folder=folder, sha256=hashlib.sha256(raw).hexdigest())


def parse_yaml(text: str, *, name: str, folder: str, sha256: str | None = None) -> Document:
    """Turn YAML text into a document; arguments and errors as in ``read_yaml``.

    Raises:
        ConfigError: the text is not sound YAML.
    """
    _check_depth(text, name)
    held: list[str] = []

    def hide(match: re.Match[str]) -> str:
        held.append(match.group())
        return f"\ue000{len(held) - 1}\ue001"

    # Both are hidden from the parser: unquoted they would be read as mappings, or break the line they stand in.
    if "\ue000" in text:
        raise _fault("holds the private character U+E000, which is not allowed in a config", name, None)
    hidden = _PLACEHOLDER.sub(hide, text)
    try:
        root = yaml.compose(hidden, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise _fault(f"is not valid YAML: {what}", name, None if mark is None else mark.line + 1) from None
    except yaml.YAMLError as error:
        raise _fault(f"is not valid YAML: {str(error).splitlines()[0]}", name, None) from None
    reader = NodeReader(name=name, held=tuple(held))
    data = None if root is None else reader.read(root)
    if reader.problems:
        raise ConfigError(reader.problems)
    digest = hashlib.sha256(text.encode()).hexdigest() if sha256 is None else sha256
    return Document(name=name, data=data, text=text, sha256=digest, folder=folder, _root=root)


def _fault(what: str, name: str, line: int | None) -> ConfigError:
    return ConfigError(Problem(what, file=name, line=line))


def _read_bytes(path: str, name: str) -> bytes:
    if is_remote(path):
        return _within_limit(_from_store(path, name), name)
    try:
        with Path(path).open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _fault("no such file", name, None) from None
    except IsADirectoryError:
        raise _fault("is a folder; a YAML file is wanted", name, None) from None
    except (OSError, ValueError) as error:
        raise _fault(f"cannot be read: {error or type(error).__name__}", name, None) from None
    return _within_limit(raw, name)


def _from_store(path: str, name: str) -> bytes:
    folder, _, leaf = path.rpartition("/")
    try:
        raw = Store(folder, patience=0).read(leaf)
    except (StoreError, ValueError) as error:
        raise _fault(f"cannot be read: {error}", name, None) from None
    if raw is None:
        raise _fault("no such file", name, None)
    return raw


def _within_limit(raw: bytes, name: str) -> bytes:
    if len(raw) > MAX_BYTES:
        raise _fault(f"is larger than {MAX_BYTES // 1_000_000} MB; that is no config file", name, None)
    return raw


def _check_depth(text: str, name: str) -> None:
    """Refuse absurd nesting before the C parser sees it: there, it would overrun the stack."""
    depth = 0
    deepest = _INLINE_NESTING.search(text)
    at = deepest.start() if deepest else None
    for match in _BRACKET.finditer(text):
        depth = depth + 1 if match.group() in "[{" else max(0, depth - 1)
        if depth > MAX_DEPTH:
            at = match.start()
            break
    if at is not None:
        raise _fault(f"is nested deeper than {MAX_DEPTH} levels", name, text.count("\n", 0, at) + 1)
