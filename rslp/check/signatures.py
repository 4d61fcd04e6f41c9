"""Classes that a config names, and what their arguments may be, as the run's parser sees them."""

from __future__ import annotations

import argparse
import enum
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse import ArgumentParser

from rslp.check.findings import KeyPath
from rslp.class_paths import resolve


@dataclass(frozen=True)
class Parameter:
    """An argument of a class: its name, type, and whether it must be given."""

    name: str
    type: Any
    required: bool


def parameters(kind: Any) -> dict[str, Parameter]:
    """The arguments of a class as the parser knows them, those of its bases behind ``**kwargs`` too."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "x", fail_untyped=False)
    needed = _needed(parser)
    found = {}
    for action in parser._actions:
        root, _, name = action.dest.partition(".")
        if root == "x" and name and not name.endswith(".help"):
            found[name] = Parameter(name, getattr(action, "_typehint", None) or Any, action.dest in needed)
    return found


def _needed(parser: ArgumentParser) -> list[str]:
    """The required arguments, which only the parser's complaint about their absence tells."""
    try:
        parser.parse_object({})
    except argparse.ArgumentError as error:
        if "required" in str(error):
            return re.findall(r"x\.\w+", str(error))
    return []


def class_of(value: Any, kind: Any) -> tuple[Any, Mapping[str, Any], KeyPath] | None:
    """The class that a mapping stands for, its arguments and where they stand in it; None if it is none of the type."""
    if not isinstance(value, Mapping):
        return None
    if isinstance(value.get("class_path"), str):
        kinds = tuple(option for option in options_of(kind) if inspect.isclass(option))
        try:
            # Where the type says nothing, as in the run's parser: a torch module, or nothing.
            found = resolve(value["class_path"], kinds or (torch.nn.Module,))
        except (ImportError, AttributeError, ValueError):
            return None
        arguments = value.get("init_args")
        return found, arguments if isinstance(arguments, Mapping) else {}, ("init_args",)
    for option in options_of(kind):
        if inspect.isclass(option) and option.__module__ != "builtins" and not typing.get_origin(option):
            return option, value, ()
    return None


def items_of(value: Any, kind: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Key, item and type of what a mapping or list holds."""
    for option in options_of(kind):
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if not inspect.isclass(origin) or not arguments:
            continue
        if isinstance(value, Mapping) and issubclass(origin, Mapping) and len(arguments) == 2:
            yield from ((key, item, arguments[1]) for key, item in value.items())
            return
        if isinstance(value, list) and not issubclass(origin, Mapping):
            yield from ((i, item, arguments[0]) for i, item in enumerate(value))
            return
    if isinstance(value, list):
        yield from ((i, item, Any) for i, item in enumerate(value) if isinstance(item, Mapping))


def options_of(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(option for member in typing.get_args(kind) for option in options_of(member))
    return (kind,)


def spoken(kind: Any) -> str:
    """A type as a person says it: ``int or null``, ``one of random, cycle``."""
    options = []
    for option in options_of(kind):
        if typing.get_origin(option) is typing.Literal:
            options.append(f"one of {', '.join(map(str, typing.get_args(option)))}")
        elif inspect.isclass(option) and issubclass(option, enum.Enum):
            options.append(f"one of {', '.join(option.__members__)}")
        elif option is type(None):
            options.append("null")
        elif typing.get_origin(option) is None and inspect.isclass(option):
            options.append(option.__name__)
        else:
            options.append(str(option).replace("typing.", ""))
    return " or ".join(options)


def telling_line(message: str) -> str:
    """The first line of the parser's message that says what is wrong."""
    lines = [line.strip(" -\t") for line in message.splitlines() if line.strip(" -\t")]
    telling = [line for line in lines if re.search(r"[Ee]xpected|valid|import|required|does not", line)]
    return (telling or lines or [""])[0][:300]
