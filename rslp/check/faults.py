"""Which part of a config the parser refuses: a walk along the types of the arguments.

The run's parser stops at the first fault and answers with pages. This walk asks the same library about one part after
the other, so that every fault is found and each has its key.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import ArgumentParser

from rslp.check.findings import Finding, KeyPath, listed
from rslp.check.signatures import class_of, items_of, options_of, parameters, spoken, telling_line
from rslp.class_paths import resolve
from rslp.suggest import did_you_mean


def faults_of(value: Any, kind: Any, at: KeyPath) -> list[Finding]:
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
            yield faults_of(item, inner, (*at, key))
        return
    made, arguments, inside = found
    place, known = (*at, *inside), parameters(made)
    name = getattr(made, "__name__", str(made))
    for key, argument in arguments.items():
        if key in known:
            yield faults_of(argument, known[key].type, (*place, key))
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
