"""Instantiate classes from config values by the type hints of their constructors, without jsonargparse.

jsonargparse tries each value as each member of a union, and parses nested classes several times. Here a value that is
ambiguous, needs a conversion or is invalid raises ``AmbiguousValue``, and the caller uses jsonargparse instead.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from functools import cache
from typing import Any

import torch
import yaml
from rasterio.crs import CRS
from rslearn.utils import jsonargparse as registered
from rslearn.utils.geometry import ResolutionFactor

from rslp.runtime import class_paths

_WORD = re.compile(r"[A-Za-z_/][\w/-]*(\.[A-Za-z_][\w/-]*)*")
# Words that YAML 1.1, YAML 1.2 or JSON reads as another type than string.
_OTHER = frozenset(("null", "true", "false", "yes", "no", "on", "off", "y", "n", "nan", "inf", "infinity", "none"))


def is_plain(text: str, *, or_null: bool = False) -> bool:
    """Whether a string of a config, parsed as YAML once more, stays the same string.

    Args:
        text: the string.
        or_null: accept any string that does not become null.
    """
    if _WORD.fullmatch(text):
        return text.lower() not in _OTHER
    try:
        parsed = yaml.safe_load(text)
    except yaml.YAMLError:
        return or_null
    return parsed is not None if or_null else bool(parsed == text)


_LISTS = (list, Sequence, MutableSequence, Iterable, Collection)
_MAPPINGS = (dict, Mapping, MutableMapping)
_SCALARS = (bool, int, float, str, type(None))
# Types of values in a config, without None, which as a default fits every type.
_CONFIG_TYPES = (bool, int, float, str, list, tuple, dict, set)
# Types for which rslearn registers a conversion with jsonargparse.
_REGISTERED: dict[Any, Callable[[Any], Any]] = {
    CRS: registered.crs_deserializer,
    datetime: registered.datetime_deserializer,
    ResolutionFactor: registered.resolution_factor_deserializer,
}


class AmbiguousValue(Exception):
    """It is not certain how jsonargparse would read the value."""


@dataclass(frozen=True)
class PlannedCall:
    """A call of a class.

    Attributes:
        kind: the class.
        arguments: all arguments in the order of the signature, with defaults; nested classes are planned calls.
    """

    kind: Callable[..., Any]
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class _Argument:
    """Type hint and default of a constructor's argument."""

    hint: Any
    default: Any


def construct(plan: Any) -> Any:
    """Execute a plan: arguments first, in the order of the signature, as jsonargparse does."""
    if isinstance(plan, PlannedCall):
        return plan.kind(**{name: construct(argument) for name, argument in plan.arguments.items()})
    if type(plan) in (list, tuple, set):
        return type(plan)(construct(item) for item in plan)
    if type(plan) is dict:
        return {key: construct(item) for key, item in plan.items()}
    return plan


def plan_value(value: Any, hint: Any) -> Any:
    """Plan how a value of a config becomes one of a type; ``construct`` executes the plan.

    Args:
        value: the value in the config.
        hint: the type hint.

    Raises:
        AmbiguousValue: jsonargparse has to decide.
    """
    origin = typing.get_origin(hint) or hint
    if isinstance(value, str) and not is_plain(value, or_null=_is_text(hint)):
        raise AmbiguousValue(f"{value!r} may be more than a string")
    if origin in (typing.Union, types.UnionType):
        return _union(value, typing.get_args(hint))
    if hint is Any or hint is object:
        return _anything(value)
    if origin is typing.Literal:
        return _literal(value, typing.get_args(hint))
    if hint in _SCALARS or hint is None:
        return _scalar(value, type(None) if hint is None else hint)
    if origin in (*_LISTS, *_MAPPINGS, tuple, set):
        return _container(value, origin, typing.get_args(hint))
    if inspect.isclass(hint):
        return _class(value, hint)
    raise AmbiguousValue(f"{hint} is not known here")


def plan_call(kind: type, arguments: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> PlannedCall:
    """Plan the call of a class with arguments from a config.

    Args:
        kind: the class.
        arguments: its arguments.
        defaults: values in place of the signature's own defaults.

    Raises:
        AmbiguousValue: an argument is unknown, missing or ambiguous.
    """
    known = _signature(kind)
    if unknown := [name for name in arguments if name not in known]:
        raise AmbiguousValue(f"{kind.__name__} names no argument {unknown[0]!r}")
    planned = {}
    for name, argument in known.items():
        given = arguments.get(name, (defaults or {}).get(name, inspect.Parameter.empty))
        if given is not inspect.Parameter.empty:
            planned[name] = plan_value(given, argument.hint)
        elif argument.default is inspect.Parameter.empty:
            raise AmbiguousValue(f"{kind.__name__} needs {name!r}")
        else:
            planned[name] = _default(argument)
    return PlannedCall(kind, planned)


def _default(argument: _Argument) -> Any:
    """A copy of an argument's default, read like a value of a config."""
    default = argument.default
    if isinstance(default, Enum) or not isinstance(default, _CONFIG_TYPES):
        return default
    return plan_value(default, argument.hint)


@cache
def _signature(kind: Any) -> Mapping[str, _Argument]:
    """The arguments of a class by name.

    Raises:
        AmbiguousValue: not all of them are named and typed.
    """
    if inspect.isabstract(kind) or kind.__new__ not in (object.__new__, torch.nn.Module.__new__):
        raise AmbiguousValue(f"{kind.__name__} is not made in the ordinary way")
    if kind.__init__ in (object.__init__, torch.nn.Module.__init__, torch.nn.Identity.__init__):
        return {}
    try:
        hints = typing.get_type_hints(kind.__init__)
    except (NameError, TypeError, AttributeError) as error:
        raise AmbiguousValue(f"{kind.__name__} has types that are known to type checkers alone") from error
    arguments = {}
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            # **kwargs goes to a base class with defaults; a config that sets one of them is left to jsonargparse.
            continue
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise AmbiguousValue(f"{kind.__name__} takes arguments without a name")
        arguments[name] = _Argument(hints.get(name), parameter.default)
        if name not in hints:
            raise AmbiguousValue(f"{kind.__name__} does not say of what type {name!r} is")
    return arguments


def _class(value: Any, hint: type) -> Any:
    if hint in _REGISTERED:
        return _convert(_REGISTERED[hint], value)
    if issubclass(hint, Enum):
        if type(value) is not str or value not in hint.__members__:
            raise AmbiguousValue(f"{value!r} is no name in {hint.__name__}")
        return hint[value]
    if not isinstance(value, Mapping) or getattr(hint, "_is_protocol", False) or hint.__module__ == "builtins":
        raise AmbiguousValue(f"{value!r} is no description of a {hint.__name__}")
    if "class_path" not in value:
        # Without class_path, a mapping has the arguments of the class in the hint.
        return plan_call(hint, value)
    if set(value) - {"class_path", "init_args"}:
        raise AmbiguousValue(f"{sorted(value)} are more than a class and its arguments")
    arguments = value.get("init_args", {})
    try:
        kind = class_paths.resolve(str(value["class_path"]), (hint,))
    except (ImportError, AttributeError, ValueError) as error:
        raise AmbiguousValue(str(error)) from error
    if not inspect.isclass(kind) or not isinstance(arguments, Mapping):
        raise AmbiguousValue(f"{value['class_path']} is no class with arguments")
    return plan_call(kind, arguments)


def _convert(convert: Callable[[Any], Any], value: Any) -> Any:
    if type(value) not in (str, int):
        raise AmbiguousValue(f"{value!r} is given in more than one word")
    try:
        return convert(value)
    except (ValueError, TypeError) as error:
        raise AmbiguousValue(str(error)) from error


def _is_text(hint: Any) -> bool:
    """Whether a hint is ``str`` or ``str | None``."""
    return hint is str or set(typing.get_args(hint)) == {str, type(None)}


def _scalar(value: Any, hint: Any) -> Any:
    if type(value) is hint:
        return value
    if hint is float and type(value) is int:
        return float(value)
    raise AmbiguousValue(f"{value!r} is not quite {hint.__name__}")


def _literal(value: Any, options: Sequence[Any]) -> Any:
    if not any(type(option) is type(value) and option == value for option in options):
        raise AmbiguousValue(f"{value!r} is not among {options}")
    return value


def _anything(value: Any) -> Any:
    if isinstance(value, Mapping):
        if "class_path" in value:
            raise AmbiguousValue("a class may stand for itself or be made")
        return {key: _anything(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_anything(item) for item in value)
    if type(value) not in _SCALARS:
        raise AmbiguousValue(f"{value!r} is no plain value")
    return value


def _container(value: Any, origin: Any, inner: tuple[Any, ...]) -> Any:
    if origin in _MAPPINGS:
        if not isinstance(value, Mapping):
            raise AmbiguousValue(f"{value!r} is no mapping")
        key_hint, item_hint = inner or (str, Any)
        # Of keys, jsonargparse converts only those to int.
        return {_scalar(key, key_hint): plan_value(item, item_hint) for key, item in value.items()}
    if not isinstance(value, list | tuple | set):
        raise AmbiguousValue(f"{value!r} is no list")
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        if len(inner) != len(value):
            raise AmbiguousValue(f"{value!r} is of another length")
        return tuple(plan_value(item, hint) for item, hint in zip(value, inner, strict=True))
    items = [plan_value(item, inner[0] if inner else Any) for item in value]
    return tuple(items) if origin is tuple else set(items) if origin is set else items


def _union(value: Any, options: Sequence[Any]) -> Any:
    """Plan a value of a union; all members that accept the value have to agree."""
    if value is None and type(None) in options:
        return None
    if type(value) is int:
        # typing caches unions: Union[float, int] may have the order of an earlier Union[int, float].
        options = [int] if int in options else options
    readings = []
    for option in options:
        try:
            readings.append(plan_value(value, option))
        except AmbiguousValue:
            continue
    if not readings or any(not _same(reading, readings[0]) for reading in readings):
        raise AmbiguousValue(f"{value!r} has {len(readings)} readings as one of {options}")
    return readings[0]


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b and repr(a) == repr(b)
