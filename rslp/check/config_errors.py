"""Find every wrong argument of a config, with its key: by the signatures of classes, and by making them one by one.

The run's parser stops at the first error and prints pages. The functions here ask the same library about one part of a
config after the other, so that each error is found and has its key.
"""

from __future__ import annotations

import argparse
import copy
import enum
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse import ArgumentParser

from rslp.check.findings import Finding, listed
from rslp.config.migrate import RENAMED_CLASSES
from rslp.errors import ConfigError, KeyPath, UserError
from rslp.runtime.class_paths import resolve
from rslp.suggest import did_you_mean
from rslp.train.build import as_user_error
from rslp.upstream.command_line import parser_options

# What constructors of rslearn, Lightning and torch raise for wrong arguments.
CONSTRUCTOR_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    AssertionError,
    RuntimeError,
    OSError,
    ImportError,
)

_MIXTURE = "mixture."
# Fields of the mixture, and the arguments of the data module that set them.
_ARGUMENTS = {"mode": "sample_mode", "stop": "refill_batches", "limits": "per_dataset_patch_limit"}


@dataclass(frozen=True)
class Parameter:
    """Type of an argument of a class, and whether it must be given."""

    type: Any
    required: bool


def parameters(kind: Any) -> dict[str, Parameter]:
    """The arguments of a class as the parser knows them, including those that ``**kwargs`` passes to its bases."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "x", fail_untyped=False)
    required = _required(parser)
    known = {}
    for action in parser_options(parser):
        root, _, name = action.dest.partition(".")
        if root == "x" and name and not name.endswith(".help"):
            known[name] = Parameter(getattr(action, "_typehint", None) or Any, action.dest in required)
    return known


def _required(parser: ArgumentParser) -> list[str]:
    """The required arguments; the parser names them only in its error about their absence."""
    try:
        parser.parse_object({})
    except argparse.ArgumentError as error:
        if "required" in str(error):
            return re.findall(r"x\.\w+", str(error))
    return []


def class_of(value: Any, kind: Any) -> tuple[Any, Mapping[str, Any], KeyPath] | None:
    """The class that a mapping describes, its arguments, and their key path within; None if none of that type."""
    if not isinstance(value, Mapping):
        return None
    if isinstance(value.get("class_path"), str):
        kinds = tuple(option for option in options_of(kind) if inspect.isclass(option))
        try:
            # Without a type the run's parser takes torch modules alone.
            resolved = resolve(value["class_path"], kinds or (torch.nn.Module,))
        except (ImportError, AttributeError, ValueError):
            return None
        arguments = value.get("init_args")
        return resolved, arguments if isinstance(arguments, Mapping) else {}, ("init_args",)
    for option in options_of(kind):
        if inspect.isclass(option) and option.__module__ != "builtins" and not typing.get_origin(option):
            return option, value, ()
    return None


def items_of(value: Any, kind: Any) -> Iterator[tuple[Any, Any, Any]]:
    """The items of a mapping or list of a type: key or position, item, and the type that the item should have."""
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


def type_text(kind: Any) -> str:
    """A type in words: ``int or null``, ``one of random, cycle``."""
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


def argument_problems(value: Any, kind: Any, at: KeyPath) -> list[Finding]:
    """Find what is wrong with a part of a config; nothing if the parser accepts it.

    Args:
        value: the part of the config.
        kind: the type that it should have.
        at: its key path.
    """
    message = _parser_error(value, kind)
    if message is None:
        return []
    deeper = [finding for findings in _problems_of_parts(value, kind, at) for finding in findings]
    if isinstance(value, list) and len(deeper) > 1 and all(finding.at[:-1] == at for finding in deeper):
        return [Finding(f"{deeper[0].what} (and {len(deeper) - 1} more here)", deeper[0].at)]
    return deeper or [Finding(_expected(value, kind) or telling_line(message), at)]


def _parser_error(value: Any, kind: Any) -> str | None:
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=kind)
        parser.parse_object({"value": copy.deepcopy(value)})
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        return str(error)
    return None


def _problems_of_parts(value: Any, kind: Any, at: KeyPath) -> Iterator[list[Finding]]:
    """Find what is wrong with each argument or item of a value that the parser refused."""
    if isinstance(value, Mapping) and isinstance(path := value.get("class_path"), str):
        not_importable = _import_problem(path, at)
        if not_importable:
            yield [not_importable]
            return
        unknown = [key for key in value if key not in ("class_path", "init_args", "dict_kwargs")]
        yield [Finding(f"unknown key{did_you_mean(key, ['class_path', 'init_args'])}", (*at, key)) for key in unknown]
    described = class_of(value, kind)
    if described is None:
        for key, item, item_kind in items_of(value, kind):
            yield argument_problems(item, item_kind, (*at, key))
        return
    cls, arguments, inside = described
    key_path, known = (*at, *inside), parameters(cls)
    name = getattr(cls, "__name__", str(cls))
    for key, argument in arguments.items():
        if key in known:
            yield argument_problems(argument, known[key].type, (*key_path, key))
        else:
            yield [Finding(f"{name} has no argument {key!r}{did_you_mean(key, known)}", (*key_path, key))]
    missing = [key for key, parameter in known.items() if parameter.required and key not in arguments]
    if missing:
        yield [Finding(f"{name} needs the argument {listed(missing)}", at)]


def _import_problem(path: str, at: KeyPath) -> Finding | None:
    try:
        resolve(path, (object,))
    except (ImportError, ValueError) as error:
        if path in RENAMED_CLASSES:
            return Finding(f"{path!r} is {RENAMED_CLASSES[path]!r} now", (*at, "class_path"))
        hint = "; rslearn_projects has a package of this name too: copy the class into a module of your own"
        return Finding(f"{path!r} can't be imported: {error}{hint * path.startswith('rslp.')}", (*at, "class_path"))
    except AttributeError:
        module, _, name = path.rpartition(".")
        known = [key for key in dir(importlib.import_module(module)) if not key.startswith("_")]
        return Finding(f"module {module} has no {name!r}{did_you_mean(name, known)}", (*at, "class_path"))
    return None


def _expected(value: Any, kind: Any) -> str | None:
    """Which type was expected instead of a value; None where the parser's own message is clearer."""
    if not isinstance(value, Mapping | list):
        quotes = "; write it in quotes" if str in options_of(kind) and value is not None else ""
        return f"expected {type_text(kind)}; got {value!r}{quotes}"
    named = any(inspect.isclass(option) for option in options_of(kind))
    if named and isinstance(value, Mapping) and "class_path" in value and class_of(value, kind) is None:
        return f"expected {type_text(kind)}; got the class {str(value['class_path']).rpartition('.')[2]}"
    return None


@dataclass(frozen=True)
class Node:
    """A class that a config describes.

    Attributes:
        kind: the class, or the function that makes an object of one.
        arguments: its arguments.
        at: key path of the arguments.
    """

    kind: Any
    arguments: Mapping[str, Any]
    at: KeyPath


def make(node: Node) -> Any:
    """Parse the arguments of one class and make it.

    Raises:
        ArgumentError: the parser refuses the arguments.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(node.kind, "x", fail_untyped=False)
    return parser.instantiate_classes(parser.parse_object({"x": copy.deepcopy(dict(node.arguments))}))["x"]


def nodes_of(value: Any, kind: Any, at: KeyPath) -> Iterator[Node]:
    """The classes that a part of a config describes, deepest first."""
    described = class_of(value, kind)
    if described is not None:
        cls, arguments, inside = described
        known = parameters(cls)
        for name, argument in arguments.items():
            if name in known:
                yield from nodes_of(argument, known[name].type, (*at, *inside, name))
        yield Node(cls, arguments, (*at, *inside))
    else:
        for key, item, item_kind in items_of(value, kind):
            yield from nodes_of(item, item_kind, (*at, key))


def constructor_faults(value: Any, kind: Any, at: KeyPath) -> tuple[list[Finding], dict[KeyPath, Any]]:
    """Make every class that a part of a config describes, deepest first, except those around one that failed.

    Returns:
        The errors of constructors, and the objects by the key path of their arguments.
    """
    findings: list[Finding] = []
    objects: dict[KeyPath, Any] = {}
    broken: list[KeyPath] = []
    for node in nodes_of(value, kind, at):
        if any(key_path[: len(node.at)] == node.at for key_path in broken):
            continue
        try:
            objects[node.at] = make(node)
        except argparse.ArgumentError:
            broken.append(node.at)  # argument_problems reports it, more clearly
        except (*CONSTRUCTOR_ERRORS, UserError) as error:
            broken.append(node.at)
            findings += _constructor_findings(node, error)
    return findings, objects


def _constructor_findings(node: Node, error: BaseException) -> list[Finding]:
    name = getattr(node.kind, "__name__", str(node.kind))
    error = as_user_error(error) or error
    if isinstance(error, ConfigError):
        findings = []
        for problem in error.problems:
            # The key may begin with the class (`HeliosNormalize.band_names.x`) or with the config's own key path.
            key = problem.key.removeprefix(f"{name}.").removeprefix(f"{'.'.join(map(str, node.at))}.")
            argument = argument_of(key)
            known = argument[:1] and (argument[0] in node.arguments or argument[0] in parameters(node.kind))
            findings.append(Finding(f"{name}: {problem.what}", (*node.at, *argument) if known else node.at))
        return findings
    if isinstance(error, UserError):
        return [Finding(" ".join(str(error).split()), (*node.at, *_mentioned_argument(node, str(error))))]
    return [Finding(f"{name} refuses its arguments: {telling_line(str(error)) or type(error).__name__}", node.at)]


def argument_of(key: str) -> KeyPath:
    """The key path, within the data module's arguments, of the key in an error message.

    Args:
        key: dotted key; fields of the mixture have other names there than in configs (``mixture.limits.crops``).
    """
    if not key.startswith(_MIXTURE):
        return tuple(key.split(".")) if key else ()
    first, *rest = key.removeprefix(_MIXTURE).split(".")
    return (_ARGUMENTS.get(first, first), *rest)


def _mentioned_argument(node: Node, message: str) -> KeyPath:
    """The first argument whose name stands in a message, or else whose value does."""
    values = {name: str(value) for name, value in node.arguments.items() if isinstance(value, str | int)}
    named = [name for name in values if name.replace("_", " ") in message or name in message]
    quoted = [name for name, value in values.items() if len(value) > 3 and value in message]
    return tuple((named or quoted)[:1])
