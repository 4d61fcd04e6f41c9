"""Which part of a config is wrong: arguments by the signatures of their classes, and classes made one by one.

The run's parser stops at the first fault and answers with pages. This walk asks the same library about one part after
the other, so that every fault is found and each has its key.
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
from rslp.errors import ConfigError, KeyPath, UserError
from rslp.runtime.class_paths import resolve
from rslp.suggest import did_you_mean
from rslp.train.build import as_user_error


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


def argument_problems(value: Any, kind: Any, at: KeyPath) -> list[Finding]:
    """What is wrong with a value that should be of a type; nothing if the parser takes it.

    Args:
        value: what the config holds.
        kind: the type.
        at: where it stands.
    """
    message = _refusal(value, kind)
    if message is None:
        return []
    deeper = [fault for part in _parts(value, kind, at) for fault in part]
    if isinstance(value, list) and len(deeper) > 1 and all(fault.at[:-1] == at for fault in deeper):
        return [Finding(f"{deeper[0].what} (and {len(deeper) - 1} more here)", deeper[0].at)]
    return deeper or [Finding(_unfit(value, kind) or telling_line(message), at)]


def _refusal(value: Any, kind: Any) -> str | None:
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=kind)
        parser.parse_object({"value": copy.deepcopy(value)})
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        return str(error)
    return None


def _parts(value: Any, kind: Any, at: KeyPath) -> Iterator[list[Finding]]:
    """The faults of the parts of a value that was refused as a whole."""
    if isinstance(value, Mapping) and isinstance(path := value.get("class_path"), str):
        unknown = _import_fault(path, at)
        if unknown:
            yield [unknown]
            return
        strange = [key for key in value if key not in ("class_path", "init_args", "dict_kwargs")]
        yield [Finding(f"unknown key{did_you_mean(key, ['class_path', 'init_args'])}", (*at, key)) for key in strange]
    found = class_of(value, kind)
    if found is None:
        for key, item, inner in items_of(value, kind):
            yield argument_problems(item, inner, (*at, key))
        return
    made, arguments, inside = found
    place, known = (*at, *inside), parameters(made)
    name = getattr(made, "__name__", str(made))
    for key, argument in arguments.items():
        if key in known:
            yield argument_problems(argument, known[key].type, (*place, key))
        else:
            yield [Finding(f"{name} has no argument {key!r}{did_you_mean(key, known)}", (*place, key))]
    missing = [key for key, parameter in known.items() if parameter.required and key not in arguments]
    if missing:
        yield [Finding(f"{name} needs the argument {listed(missing)}", at)]


def _import_fault(path: str, at: KeyPath) -> Finding | None:
    try:
        resolve(path, (object,))
    except (ImportError, ValueError) as error:
        other = "; rslearn_projects has a package of this name too: copy the class into a module of your own"
        return Finding(f"{path!r} can't be imported: {error}{other * path.startswith('rslp.')}", (*at, "class_path"))
    except AttributeError:
        module, _, name = path.rpartition(".")
        known = [key for key in dir(importlib.import_module(module)) if not key.startswith("_")]
        return Finding(f"module {module} has no {name!r}{did_you_mean(name, known)}", (*at, "class_path"))
    return None


def _unfit(value: Any, kind: Any) -> str | None:
    """Say what was wanted; None where the parser's own words are better."""
    if not isinstance(value, Mapping | list):
        quotes = "; write it in quotes" if str in options_of(kind) and value is not None else ""
        return f"expected {spoken(kind)}; got {value!r}{quotes}"
    named = any(inspect.isclass(option) for option in options_of(kind))
    if named and isinstance(value, Mapping) and "class_path" in value and class_of(value, kind) is None:
        return f"expected {spoken(kind)}; got the class {str(value['class_path']).rpartition('.')[2]}"
    return None


# What constructors of rslearn, Lightning and torch raise at arguments that they don't like.
MADE_WRONG = (ValueError, TypeError, KeyError, AttributeError, AssertionError, RuntimeError, OSError, ImportError)

_MIXTURE = "mixture."
# Fields of the mixture -> the arguments of the data module that set them.
_ARGUMENTS = {"mode": "sample_mode", "stop": "refill_batches", "limits": "per_dataset_patch_limit"}


@dataclass(frozen=True)
class Node:
    """A class that a config asks for.

    Attributes:
        kind: the class, or the function that makes one.
        arguments: its arguments.
        at: where the arguments stand.
    """

    kind: Any
    arguments: Mapping[str, Any]
    at: KeyPath


def make(node: Node) -> Any:
    """Parse the arguments of one class and make it.

    Raises:
        ArgumentError: the parser refuses them.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(node.kind, "x", fail_untyped=False)
    return parser.instantiate_classes(parser.parse_object({"x": copy.deepcopy(dict(node.arguments))}))["x"]


def nodes_of(value: Any, kind: Any, at: KeyPath) -> Iterator[Node]:
    """The classes that a value asks for, deepest first."""
    found = class_of(value, kind)
    if found is not None:
        made, arguments, inside = found
        known = parameters(made)
        for name, argument in arguments.items():
            if name in known:
                yield from nodes_of(argument, known[name].type, (*at, *inside, name))
        yield Node(made, arguments, (*at, *inside))
    else:
        for key, item, inner in items_of(value, kind):
            yield from nodes_of(item, inner, (*at, key))


def constructor_faults(value: Any, kind: Any, at: KeyPath) -> tuple[list[Finding], dict[KeyPath, Any]]:
    """Make every class that a value asks for, deepest first; one that holds a broken one is left out.

    Returns:
        What is wrong, and what was made, by the place of its arguments.
    """
    findings: list[Finding] = []
    made: dict[KeyPath, Any] = {}
    broken: list[KeyPath] = []
    for node in nodes_of(value, kind, at):
        if any(place[: len(node.at)] == node.at for place in broken):
            continue
        try:
            made[node.at] = make(node)
        except argparse.ArgumentError:
            broken.append(node.at)  # faults_of says it better
        except (*MADE_WRONG, UserError) as error:
            broken.append(node.at)
            findings += _raised(node, error)
    return findings, made


def _raised(node: Node, error: BaseException) -> list[Finding]:
    name = getattr(node.kind, "__name__", str(node.kind))
    error = as_user_error(error) or error
    if isinstance(error, ConfigError):
        findings = []
        for problem in error.problems:
            # `HeliosNormalize.band_names.x` names the argument within the class, `data.init_args.x` in the config.
            key = problem.key.removeprefix(f"{name}.").removeprefix(f"{'.'.join(map(str, node.at))}.")
            words = argument_of(key)
            known = words[:1] and (words[0] in node.arguments or words[0] in parameters(node.kind))
            findings.append(Finding(f"{name}: {problem.what}", (*node.at, *words) if known else node.at))
        return findings
    if isinstance(error, UserError):
        return [Finding(" ".join(str(error).split()), (*node.at, *_named_in(node, str(error))))]
    return [Finding(f"{name} refuses its arguments: {telling_line(str(error)) or type(error).__name__}", node.at)]


def argument_of(key: str) -> KeyPath:
    """The argument that a message's key is about: the mixture's own words are not those that a config has.

    Args:
        key: dotted key, for example ``mixture.limits.crops``.
    """
    if not key.startswith(_MIXTURE):
        return tuple(key.split(".")) if key else ()
    first, *rest = key.removeprefix(_MIXTURE).split(".")
    return (_ARGUMENTS.get(first, first), *rest)


def _named_in(node: Node, message: str) -> KeyPath:
    """The argument whose value a message quotes, or whose name; the last of these in the message."""
    words = {name: str(value) for name, value in node.arguments.items() if isinstance(value, str | int)}
    spoken = [name for name in words if name.replace("_", " ") in message or name in message]
    quoted = [name for name, value in words.items() if len(value) > 3 and value in message]
    return tuple((spoken or quoted)[:1])
