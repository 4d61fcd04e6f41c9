"""Make the objects that a config describes by ``class_path`` and ``init_args``; the check, a run and packing use it.

``plan`` imports the classes and compares each argument with the annotation of its constructor; nothing else of them is
run. A value that does not fit is an ``Invalid`` in the plan, so that all problems of a config are reported at once.
``Construction`` calls the constructors, deepest first. Values are converted as jsonargparse does for rslearn and
Lightning: whole numbers to floats, texts to numbers and to the types that rslearn registers with jsonargparse.
"""

from __future__ import annotations

import collections.abc
import functools
import importlib
import inspect
import operator
import re
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import get_registered_type
from lightning.fabric.utilities.exceptions import MisconfigurationException

import rslp
from rslp import upstream
from rslp.config.migrate import RENAMED_CLASSES
from rslp.errors import ConfigError, KeyPath, MachineError, UserError
from rslp.io import plain_scalar
from rslp.runtime.class_paths import resolve
from rslp.runtime.extras import LOGGERS, remedy
from rslp.runtime.memory import is_out_of_memory
from rslp.suggest import did_you_mean

# What constructors of rslearn, Lightning and torch raise for wrong arguments.
CONSTRUCTOR_ERRORS = (
    *(ValueError, TypeError, KeyError, AttributeError, AssertionError, RuntimeError, OSError, ImportError),
    MisconfigurationException,
)
_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
_SCALARS = (bool, int, float, str, type(None))
# Types of a container in annotations -> the type that is made.
_CONTAINERS: dict[Any, Callable[[list[Any]], Any]] = {
    list: list,
    tuple: tuple,
    set: set,
    frozenset: frozenset,
    collections.abc.Sequence: list,
    collections.abc.MutableSequence: list,
    collections.abc.Iterable: list,
    collections.abc.Collection: list,
}
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_MIXTURE = "mixture."
# Fields of the mixture -> the arguments of the data module that set them.
_MIXTURE_ARGUMENTS = {"mode": "sample_mode", "stop": "refill_batches", "limits": "per_dataset_patch_limit"}


@dataclass(frozen=True)
class Invalid:
    """A value that does not fit its place in a config.

    Attributes:
        what: the message: the mistake, the value, what was expected.
        at: key path in the config.
    """

    what: str
    at: KeyPath = ()


@dataclass(frozen=True)
class Call:
    """A planned call of a class, or of a function that returns an object of a class.

    Attributes:
        kind: the class or function.
        arguments: its arguments, in the order of its signature; classes among them are calls.
        at: key path of the arguments in the config.
        invalid: arguments that are unknown or missing.
    """

    kind: Callable[..., Any]
    arguments: Mapping[str, Any]
    at: KeyPath = ()
    invalid: tuple[Invalid, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """Annotation and default of an argument of a class; the default is ``inspect.Parameter.empty`` if there is none."""

    hint: Any
    default: Any


def plan(value: Any, hint: Any, at: KeyPath = ()) -> Any:
    """Plan how a value of a config becomes one of a type.

    Args:
        value: the value in the config, or an object that is already made.
        hint: the type.
        at: key path of the value.

    Returns:
        A tree of lists, mappings, scalars, ``Call`` and ``Invalid``.
    """
    planned = _planned(value, hint, at)
    if isinstance(planned, Invalid) and planned.at == at and type(value) is str and value != (scalar := _scalar(value)):
        again = _planned(scalar, hint, at)
        return planned if isinstance(again, Invalid) else again
    return planned


def problems(planned: Any) -> Iterator[Invalid]:
    """Everything in a plan that does not fit; of several items of one list the first, with the number of the others."""
    if isinstance(planned, Invalid):
        yield planned
    elif isinstance(planned, Call):
        yield from planned.invalid
        yield from problems(dict(planned.arguments))
    elif isinstance(planned, dict):
        for item in planned.values():
            yield from problems(item)
    elif isinstance(planned, list | tuple):
        invalid = [item for item in planned if isinstance(item, Invalid)]
        if len(invalid) > 1:
            yield Invalid(f"{invalid[0].what} (and {len(invalid) - 1} more here)", invalid[0].at)
        for item in planned if len(invalid) < 2 else [item for item in planned if item not in invalid]:
            yield from problems(item)


def plan_call(
    kind: Any, arguments: Mapping[Any, Any], at: KeyPath = (), *, unchecked: Mapping[str, Any] | None = None
) -> Call:
    """Plan the call of a class.

    Args:
        kind: the class, or a function that returns an object of one.
        arguments: its arguments in the config.
        at: their key path.
        unchecked: further arguments, which are passed as they are.
    """
    (known, takes_more), name = parameters(kind), _name(kind)
    # Null where the default is null is right whatever the annotation says.
    given = [key for key in known if key in arguments and (arguments[key], known[key].default) != (None, None)]
    planned = {key: plan(arguments[key], known[key].hint, (*at, key)) for key in given}
    unknown = [key for key in arguments if key not in known]
    invalid = []
    if takes_more:
        planned |= {key: _anything(arguments[key], (*at, key)) for key in unknown}
    else:
        hints = [did_you_mean(key, known, otherwise="it has") for key in unknown]
        invalid = [
            Invalid(f"{name} has no argument {key!r}{hint}", (*at, key))
            for key, hint in zip(unknown, hints, strict=True)
        ]
    extra = unchecked or {}
    required = [key for key, parameter in known.items() if parameter.default is inspect.Parameter.empty]
    if missing := [key for key in required if key not in {**arguments, **extra}]:
        invalid.append(
            Invalid(f"{name} needs the argument {', '.join(missing)}", at[:-1] if at[-1:] == ("init_args",) else at)
        )
    return Call(kind, {**planned, **extra}, at, tuple(invalid))


@cache
def parameters(kind: Any) -> tuple[Mapping[str, Parameter], bool]:
    """The arguments of a class or function by name, and whether it takes others, of which nothing is known.

    ``**kwargs`` stand for the arguments of the next base class in the method resolution order.
    """
    if not inspect.isclass(kind) or "__signature__" in vars(kind):
        return _parameters(kind, bound=True)
    known: dict[str, Parameter] = {}
    takes_more = False
    for base in kind.__mro__[:-1]:
        if base is torch.nn.Module:
            return known, False
        if "__init__" in vars(base):
            own, takes_more = _parameters(vars(base)["__init__"], bound=False)
            # A class may itself give its base class a required argument.
            inherited = {name: replace(p, default=...) for name, p in own.items() if name not in known}
            known |= inherited if known else own
            if not takes_more:
                break
    return known, takes_more


def _parameters(function: Any, *, bound: bool) -> tuple[dict[str, Parameter], bool]:
    """The named arguments of one function, without ``self`` if it is not bound, and whether it takes others."""
    try:
        listed = list(inspect.signature(function).parameters.values())[0 if bound else 1 :]
    except (TypeError, ValueError):
        return {}, True
    hints = _hints(function)
    named = {
        parameter.name: Parameter(hints.get(parameter.name, Any), parameter.default)
        for parameter in listed
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    return named, any(parameter.kind is parameter.VAR_KEYWORD for parameter in listed)


def _hints(function: Any) -> dict[str, Any]:
    """The annotations of a function; those that only type checkers can evaluate are ``Any``."""
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        annotations = getattr(inspect.unwrap(function), "__annotations__", {})
        return {name: hint for name, hint in annotations.items() if not isinstance(hint, str)}


def _planned(value: Any, hint: Any, at: KeyPath) -> Any:
    hint = _bare(hint)
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if hint is Any:
        return _scalar(value) if type(value) is str else _anything(value, at)
    if origin in (typing.Union, types.UnionType):
        return _union(value, inner, at)
    if origin in _MAPPINGS:
        return _mapping(value, hint, at)
    if origin in _CONTAINERS:
        return _items(value, hint, at)
    if origin in (type, collections.abc.Callable):
        return _named_object(value, hint, at)
    if origin is typing.Literal or hint in _SCALARS or _registered(hint) or _is_enum(hint):
        try:
            return _leaf(value, hint)
        except (ValueError, TypeError, KeyError, AttributeError):
            return _mismatch(value, hint, at)
    if inspect.isclass(origin):
        return _class(value, origin, at)
    return Invalid(f"{type_text(hint)} can't be given in a config", at)


def _bare(hint: Any) -> Any:
    """An annotation without what only type checkers use."""
    if isinstance(hint, typing.NewType):
        return _bare(hint.__supertype__)
    if typing.get_origin(hint) in (typing.Annotated, typing.Required, typing.NotRequired):
        return _bare(typing.get_args(hint)[0])
    return Any if hint is object or isinstance(hint, typing.TypeVar) else type(None) if hint is None else hint


def _is_enum(hint: Any) -> bool:
    return inspect.isclass(hint) and issubclass(hint, Enum)


def _registered(hint: Any) -> Any:
    """What converts values to a type that is registered with jsonargparse, by itself or by rslearn; None if none."""
    if not inspect.isclass(hint):
        return None
    # rslearn parses the configs of datasets by jsonargparse itself, when their classes are made.
    upstream.prepare_parser()
    return get_registered_type(hint)


def _scalar(text: str) -> Any:
    """The number, truth value or null that a text would be without quotes; otherwise the text."""
    value = plain_scalar(text)
    return value if isinstance(value, _SCALARS) else text


def _leaf(value: Any, hint: Any) -> Any:
    """Convert a scalar; raise ``ValueError``, ``TypeError`` or ``KeyError`` if it does not fit."""
    if typing.get_origin(hint) is typing.Literal:
        if not any(type(option) is type(value) and option == value for option in typing.get_args(hint)):
            raise ValueError
        return value
    if hint in _SCALARS:
        if type(value) is hint or (hint is float and type(value) is int):
            return hint(value) if hint is float else value
        raise TypeError
    if _is_enum(hint):
        return value if isinstance(value, hint) else hint[value]
    registered = _registered(hint)
    return value if registered.is_value_of_type(value) else registered.deserializer(value)


def _mismatch(value: Any, hint: Any, at: KeyPath) -> Invalid:
    """Say what was expected instead of a value."""
    got, hint_text = repr(value), ""
    if isinstance(value, Mapping) and isinstance(path := value.get("class_path"), str):
        got = f"the class {path.rpartition('.')[2]}"
    elif _takes_text(hint) and isinstance(value, bool | int | float):
        hint_text = "; write it in quotes"
    elif isinstance(value, str) and typing.get_origin(hint) is typing.Literal:
        hint_text = did_you_mean(value, typing.get_args(hint))
    return Invalid(f"expected {type_text(hint)}; got {got[:300]}{hint_text}", at)


def _takes_text(hint: Any) -> bool:
    if typing.get_origin(hint) is typing.Literal:
        return all(isinstance(option, str) for option in typing.get_args(hint))
    return str in _options(hint)


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(option for member in typing.get_args(hint) for option in _options(member))
    return (_bare(hint),)


def type_text(hint: Any) -> str:
    """A type in words: ``int or null``, ``one of random, cycle``."""
    texts = []
    for option in _options(hint):
        if typing.get_origin(option) is typing.Literal:
            texts.append(f"one of {', '.join(map(str, typing.get_args(option)))}")
        elif _is_enum(option):
            texts.append(f"one of {', '.join(option.__members__)}")
        elif option is type(None):
            texts.append("null")
        elif typing.get_origin(option) is None and inspect.isclass(option):
            texts.append(option.__name__)
        else:
            # Without the modules of classes: `list[Callback]`.
            texts.append(re.sub(r"\b(?:\w+\.)+(?=\w)", "", str(option)))
    return " or ".join(texts)


def _union(value: Any, options: tuple[Any, ...], at: KeyPath) -> Any:
    """Plan a value as the member of its own type, else as the first that accepts it, else as the nearest one."""
    if type(value) in options:
        return value if type(value) in _SCALARS else plan(value, type(value), at)
    trials: list[tuple[int, int, Any]] = []
    for option in options:
        planned = plan(value, option, at)
        invalid = list(problems(planned))
        if not invalid:
            return planned
        if all(problem.at != at for problem in invalid):
            trials.append((len(invalid), len(trials), planned))
    return min(trials)[2] if trials else _mismatch(value, functools.reduce(operator.or_, options), at)


def _anything(value: Any, at: KeyPath) -> Any:
    """Plan a value of any type: of classes, only torch modules are made there."""
    if isinstance(value, Mapping):
        if isinstance(value.get("class_path"), str) and not set(value) - set(_CLASS_KEYS):
            return _class(value, torch.nn.Module, at)
        return {key: _anything(item, (*at, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_anything(item, (*at, i)) for i, item in enumerate(value)]
    return value


def _mapping(value: Any, hint: Any, at: KeyPath) -> Any:
    if not isinstance(value, Mapping):
        return _mismatch(value, hint, at)
    if not typing.get_args(hint):
        return dict(value)
    key_hint, item_hint = typing.get_args(hint)
    planned = {key: plan(item, item_hint, (*at, key)) for key, item in value.items()}
    if key_hint is not int:
        # Names that YAML takes for numbers or truth values stay as they are.
        return planned
    keys = {key: plan(key, int, (*at, key)) for key in value}
    return {keys[key]: keys[key] if isinstance(keys[key], Invalid) else item for key, item in planned.items()}


def _items(value: Any, hint: Any, at: KeyPath) -> Any:
    origin, hints = typing.get_origin(hint) or hint, typing.get_args(hint)
    fixed = origin is tuple and bool(hints) and hints[-1] is not Ellipsis
    if not isinstance(value, list | tuple | set) or (fixed and len(hints) != len(value)):
        return _mismatch(value, hint, at)
    if not hints:
        return _CONTAINERS[origin](list(value))
    items = [plan(item, hints[i] if fixed else hints[0], (*at, i)) for i, item in enumerate(value)]
    return items if any(isinstance(item, Invalid) for item in items) else _CONTAINERS[origin](items)


def _named_object(value: Any, hint: Any, at: KeyPath) -> Any:
    """Plan a class or function itself, named by its dotted path; for a function also an object that can be called."""
    if isinstance(value, Mapping) and "class_path" in value and typing.get_origin(hint) is not type:
        return _class(value, collections.abc.Callable, at)
    if not isinstance(value, str) or "." not in value:
        return value if callable(value) else _mismatch(value, hint, at)
    named = _imported(value, at)
    wanted = (typing.get_args(hint) or (object,))[0] if (typing.get_origin(hint) or hint) is type else None
    fits = callable(named) if wanted is None else inspect.isclass(named) and issubclass(named, wanted)
    return named if isinstance(named, Invalid) or fits else _mismatch(value, hint, at)


def _class(value: Any, hint: Any, at: KeyPath) -> Any:
    """Plan an object of a class, from a class path with arguments, or from the arguments of the annotated class."""
    if _fits(type(value), hint):
        return value
    if isinstance(value, str) and value.replace(".", "").isidentifier():
        value = {"class_path": value}
    return _described(value, hint, at) if isinstance(value, Mapping) else _mismatch(value, hint, at)


def _described(value: Mapping[Any, Any], hint: Any, at: KeyPath) -> Any:
    """Plan an object of a class that a mapping describes."""
    if "class_path" not in value:
        plain = hint.__module__ != "builtins" and not inspect.isabstract(hint)
        return plan_call(hint, value, at) if plain else _mismatch(value, hint, at)
    if unknown := [key for key in value if key not in _CLASS_KEYS]:
        instead = did_you_mean(unknown[0], _CLASS_KEYS) or "; arguments belong under init_args"
        return Invalid(f"unknown key beside class_path{instead}", (*at, unknown[0]))
    kind = _imported(value["class_path"], (*at, "class_path"), hint)
    if isinstance(kind, Invalid):
        return kind
    if not _fits(kind if inspect.isclass(kind) else _hints(kind).get("return"), hint):
        return _mismatch(value, hint, at)
    if inspect.isabstract(kind):
        return Invalid(f"{_name(kind)} is abstract: name one of its subclasses", (*at, "class_path"))
    given = {key: value.get(key) or {} for key in _CLASS_KEYS[1:]}
    for key in given:
        if not isinstance(given[key], Mapping):
            return Invalid(f"expected arguments by name; got {given[key]!r}", (*at, key))
    return plan_call(kind, given["init_args"], (*at, "init_args"), unchecked=given["dict_kwargs"])


def _fits(kind: Any, hint: Any) -> bool:
    try:
        return inspect.isclass(kind) and issubclass(kind, hint)
    except TypeError:
        # A protocol that can't be checked at run time.
        return False


def _imported(path: Any, at: KeyPath, base: Any = None) -> Any:
    """Import a class or function by its path, or a class by its name alone among the subclasses of a base class."""
    if not isinstance(path, str):
        return Invalid(f"must be the dotted path of a class; got {path!r}", at)
    if "." not in path and inspect.isclass(base):
        kinds = list(dict.fromkeys(kind for kind in _subclasses(base) if kind.__name__ == path))
        if len(kinds) == 1:
            return kinds[0]
    try:
        return resolve(path)
    except (ImportError, ValueError) as error:
        if path in RENAMED_CLASSES:
            return Invalid(f"{path!r} is {RENAMED_CLASSES[path]!r} now", at)
        hint = "; rslearn_projects has a package of this name too: copy the class into a module of your own"
        return Invalid(f"{path!r} can't be imported: {error}{hint * path.startswith('rslp.')}", at)
    except AttributeError:
        module, _, name = path.rpartition(".")
        known = [key for key in dir(importlib.import_module(module)) if not key.startswith("_")]
        return Invalid(f"module {module} has no {name!r}{did_you_mean(name, known)}", at)


def _subclasses(kind: Any) -> Iterator[type]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


@dataclass
class Construction:
    """Makes the objects of plans.

    Attributes:
        objects: the objects of classes by the key path of their arguments.
        problems: the arguments that a constructor refused.
    """

    objects: dict[KeyPath, Any] = field(default_factory=dict)
    problems: list[Invalid] = field(default_factory=list)

    def make(self, planned: Any) -> Any:
        """Make an object, the arguments first, in the order of the signature.

        Returns:
            The object; the first ``Invalid`` in it if it can't be made. Its sound parts are made nevertheless.

        Raises:
            MachineError: memory or disk runs out.
        """
        if isinstance(planned, Call):
            return self._call(planned)
        if type(planned) in (list, tuple):
            items = [self.make(item) for item in planned]
            return _first_invalid(items) or type(planned)(items)
        if type(planned) is dict:
            made = {key: self.make(item) for key, item in planned.items()}
            return _first_invalid(made.values()) or made
        return planned

    def _call(self, call: Call) -> Any:
        arguments = {name: self.make(argument) for name, argument in call.arguments.items()}
        if invalid := _first_invalid([*call.invalid, *arguments.values()]):
            return invalid
        try:
            made = self.objects[call.at] = call.kind(**arguments)
        except (*CONSTRUCTOR_ERRORS, UserError) as error:
            if isinstance(error, MachineError) or is_out_of_memory(error) or _is_defect(error):
                raise
            refused = _refusals(call, error)
            self.problems += refused
            return refused[0]
        return made


def _first_invalid(items: Any) -> Invalid | None:
    return next((item for item in items if isinstance(item, Invalid)), None)


def _is_defect(error: BaseException) -> bool:
    """Whether an exception is no refusal of arguments, but raised by our own code."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    ours = bool(frames) and Path(frames[-1].filename).is_relative_to(Path(rslp.__file__).parent)
    return ours and not isinstance(error, UserError)


def _refusals(call: Call, error: BaseException) -> list[Invalid]:
    """The problems that a constructor raised, at the arguments that they name."""
    name = _name(call.kind)
    if isinstance(error, ImportError) and (extra := LOGGERS.get(name)):
        return [Invalid(f"{name} needs a package that is not installed; {remedy(extra)}", call.at)]
    if not isinstance(error, UserError):
        text = " ".join(str(error).split())[:300]
        return [Invalid(f"{name} refuses its arguments: {text or type(error).__name__}", call.at)]
    if not isinstance(error, ConfigError):
        return [Invalid(" ".join(str(error).split()), (*call.at, *_mentioned_argument(call, str(error))))]
    refused = []
    for problem in error.problems:
        # The key may begin with the class (`HeliosNormalize.band_names.x`) or with the config's own key path.
        argument = argument_of(problem.key.removeprefix(f"{name}.").removeprefix(f"{'.'.join(map(str, call.at))}."))
        known = argument[:1] and argument[0] in parameters(call.kind)[0]
        refused.append(
            Invalid(problem.what, (*call.at, *argument)) if known else Invalid(f"{name}: {problem.what}", call.at)
        )
    return refused


def argument_of(key: str) -> KeyPath:
    """The key path, within the data module's arguments, of the key in an error message.

    Args:
        key: dotted key; fields of the mixture have other names there than in configs (``mixture.limits.crops``).
    """
    if not key.startswith(_MIXTURE):
        return tuple(key.split(".")) if key else ()
    first, *rest = key.removeprefix(_MIXTURE).split(".")
    return (_MIXTURE_ARGUMENTS.get(first, first), *rest)


def _mentioned_argument(call: Call, message: str) -> KeyPath:
    """The first argument whose name stands in a message, or else whose value does."""
    values = {name: str(value) for name, value in call.arguments.items() if isinstance(value, str | int)}
    named = [name for name in values if name.replace("_", " ") in message or name in message]
    quoted = [name for name, value in values.items() if len(value) > 3 and value in message]
    return tuple((named or quoted)[:1])


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))
