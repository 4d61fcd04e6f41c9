"""Docstrings, comments and names use the glossary's words: dialect that was once replaced does not come back."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORDS = Path(__file__).with_name("banned_words.txt")
# The example's own recipe is a file that it writes.
FILES = [path for path in sorted((ROOT / "rslp").rglob("*.py")) if "example" not in path.parts]


def section(title: str) -> list[str]:
    """The entries below a title of ``banned_words.txt``."""
    blocks = re.split(r"^\[(\w+)\]$", WORDS.read_text(), flags=re.M)
    lines = dict(zip(blocks[1::2], blocks[2::2], strict=True))[title].splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Line number and text of each line of a comment or docstring."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            text = node.body[0]
            assert isinstance(text, ast.Expr)
            yield from enumerate(source.splitlines()[text.lineno - 1 : text.end_lineno], text.lineno)


def names(source: str) -> Iterator[tuple[int, str]]:
    """Line number and name of each function, class, argument, variable and attribute that is defined."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id


def offences(source: str) -> list[str]:
    """What a source says in words that the glossary replaced."""
    phrases = [re.compile(pattern) for pattern in section("phrases")]
    banned = set(section("names"))
    found = [f"{line}: {text.strip()}" for line, text in prose(source) if any(p.search(text) for p in phrases)]
    return found + [f"{line}: {name}" for line, name in names(source) if name.strip("_") in banned]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_speaks_plainly(path: Path) -> None:
    assert offences(path.read_text()) == []


def test_dialect_is_noticed() -> None:
    assert offences('def shelf() -> None:\n    """Refuse what can\'t be."""\n') == [
        '2: """Refuse what can\'t be."""',
        "1: shelf",
    ]
    assert offences('def records() -> None:\n    """Return the records."""\n') == []
