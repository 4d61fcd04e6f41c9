"""Make every class of a config that was refused, deepest first, so that each one that fails is named."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser

from rslp.check.findings import Finding, KeyPath
from rslp.check.signatures import class_of, items_of, parameters, telling_line
from rslp.errors import ConfigError, UserError
from rslp.train.cli import user_error

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
    error = user_error(error) or error
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
