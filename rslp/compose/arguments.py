"""The arguments of known classes, from a table that ships with the code: nothing is imported to look one up."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

TABLE = Path(__file__).with_name("vocabulary.json")

# Gives the arguments that a class takes by its class path; None where that is not known, or where it takes any.
Accepts = Callable[[str], frozenset[str] | None]


@functools.cache
def table() -> Mapping[str, frozenset[str] | None]:
    """Give the argument names by class path; None where a class takes any."""
    raw = json.loads(TABLE.read_text(encoding="utf-8"))
    return {path: None if names is None else frozenset(names) for path, names in raw.items()}


def known_arguments(class_path: str) -> frozenset[str] | None:
    """Give the arguments that a class takes; None where that is not known, or where it takes any."""
    return table().get(class_path)


def any_arguments(_: str) -> None:
    """Say of every class that its arguments are not known: for configs that keep the class paths of another version."""
