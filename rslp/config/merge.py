"""The one merge rule of all configs, which arguments a class takes, and the difference of two configs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rslp.errors import ConfigError, KeyPath, Problem, dotted

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


@dataclass(frozen=True)
class ClassChange:
    """Another class was named over the one below.

    Attributes:
        at: key path of the mapping that names the class.
        old: class path below.
        new: class path above, which wins.
        kept: arguments from below that stay.
        dropped: arguments from below that the new class does not take.
        known: whether it is known which arguments the new class takes.
    """

    at: KeyPath
    old: str
    new: str
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    known: bool


def merge(base: Any, over: Any, *, accepts: Accepts = known_arguments, changes: list[ClassChange] | None = None) -> Any:
    """Lay one config over another.

    A mapping is merged into a mapping, key by key and recursively; a key ending in ``+`` appends its list to the list
    below; anything else replaces what is below. So an empty mapping over a mapping changes nothing. Where another class
    is named, those arguments below stay that the new class takes; of a class that is not known, all of them.

    Args:
        base: the config below.
        over: the config above, which wins.
        accepts: gives the arguments that a class takes.
        changes: gets each place where another class was named.

    Returns:
        The merged config, without ``+`` keys. Neither argument is changed; unchanged parts are shared with them.

    Raises:
        ConfigError: a ``+`` key without a list, or over something that is no list; no mapping over ``init_args``.
    """
    return _Merger(accepts, changes).merge(base, over, ())


def plus_target(key: Any) -> Any:
    """Give the key without its ``+``; other keys are given back as they are."""
    return key[:-1] if is_plus(key) else key


def is_plus(key: Any) -> bool:
    """Tell whether a key appends to a list."""
    return isinstance(key, str) and len(key) > 1 and key.endswith("+")


def names_another_class(below: Any, over: Any) -> bool:
    """Tell whether a config lays another class over the one that stands below."""
    if not isinstance(below, Mapping) or not isinstance(over, Mapping):
        return False
    old, new = below.get("class_path"), over.get("class_path")
    return isinstance(old, str) and isinstance(new, str) and old != new


def nest(tree: Any, at: KeyPath) -> Any:
    """Put a config at a place: ``nest(x, ("a", "b"))`` is ``{"a": {"b": x}}``."""
    for key in reversed(at):
        tree = {key: tree}
    return tree


def put(tree: Any, at: KeyPath, value: Any) -> Any:
    """Give the tree with another value at a place; mappings on the way there are made where they are missing."""
    return {**(tree or {}), at[0]: put((tree or {}).get(at[0]), at[1:], value)} if at else value


def pick(tree: Any, at: KeyPath) -> Any:
    """Give what stands at a place, or None; list positions count as keys."""
    for key in at:
        if isinstance(tree, Mapping):
            tree = tree.get(key)
        elif isinstance(tree, list) and isinstance(key, int) and 0 <= key < len(tree):
            tree = tree[key]
        else:
            return None
    return tree


@dataclass(frozen=True)
class _Merger:
    accepts: Accepts
    changes: list[ClassChange] | None

    def merge(self, base: Any, over: Any, at: KeyPath) -> Any:
        if not isinstance(over, dict):
            return over
        result = dict(base) if isinstance(base, dict) else {}
        if names_another_class(base, over):
            result = self._with_accepted(result, over["class_path"], at)
        appended = []
        for key, value in over.items():
            if is_plus(key):
                appended.append(key)
            elif isinstance(value, dict):
                result[key] = self.merge(result.get(key), value, (*at, key))
            else:
                if key == "init_args":
                    _refuse_to_empty(result.get(key), value, (*at, key))
                result[key] = value
        for key in appended:
            result[key[:-1]] = _append(result.get(key[:-1]), over[key], (*at, key))
        return result

    def _with_accepted(self, below: dict[Any, Any], new: str, at: KeyPath) -> dict[Any, Any]:
        """Leave out the arguments that the new class does not take."""
        names = self.accepts(new)
        given = below.get("init_args")
        arguments = given if isinstance(given, dict) else {}
        dropped = () if names is None else tuple(name for name in arguments if name not in names)
        kept = {name: value for name, value in arguments.items() if name not in dropped}
        result = {key: value for key, value in below.items() if key != "init_args" or kept}
        if kept:
            result["init_args"] = kept
        if names is not None and result.pop("dict_kwargs", None) is not None:
            dropped += ("dict_kwargs",)
        if self.changes is not None:
            told = tuple(map(str, kept)), tuple(map(str, dropped))
            self.changes.append(ClassChange(at, below["class_path"], new, *told, known=names is not None))
        return result


def _refuse_to_empty(below: Any, over: Any, at: KeyPath) -> None:
    if isinstance(below, dict) and below:
        names = ", ".join(map(str, below))
        what = (
            f"must be a mapping; {'null' if over is None else short(over)} would drop the arguments below it: {names}"
        )
        raise ConfigError(Problem(what, key=dotted(at)))


def _append(below: Any, items: Any, at: KeyPath) -> list[Any]:
    if not isinstance(items, list):
        raise ConfigError(Problem(f"a key with + appends a list; got {short(items)}", key=dotted(at)))
    if below is not None and not isinstance(below, list):
        raise ConfigError(Problem(f"+ appends to a list, but below it stands {short(below)}", key=dotted(at)))
    return [*(below or []), *items]


def short(value: Any, width: int = 60) -> str:
    """Write a value for a message: the text, cut when it is long, with its kind where that helps."""
    if value is None:
        return "nothing"
    text = "a mapping" if isinstance(value, Mapping) else repr(str(value) if isinstance(value, str) else value)
    return text if len(text) <= width else text[: width - 1] + "…"


def differences(old: Any, new: Any) -> list[str]:
    """List what differs, one line for each place: ``~`` changed, ``+`` new, ``-`` gone.

    Args:
        old: the config before.
        new: the config now.
    """
    return list(_differences(old, new, ()))


def _differences(old: Any, new: Any, at: KeyPath) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        yield from _between(old, new, list(dict.fromkeys([*old, *new])), at)
    elif isinstance(old, list) and isinstance(new, list):
        longer = range(max(len(old), len(new)))
        yield from _between(dict(enumerate(old)), dict(enumerate(new)), list(longer), at)
    elif type(old) is not type(new) or old != new:
        yield f"~ {dotted(at)}: {short(old)} -> {short(new)}"


def _between(old: Mapping[Any, Any], new: Mapping[Any, Any], keys: list[Any], at: KeyPath) -> Iterator[str]:
    for key in keys:
        if key not in old:
            yield f"+ {dotted((*at, key))}: {short(new[key])}"
        elif key not in new:
            yield f"- {dotted((*at, key))}: {short(old[key])}"
        else:
            yield from _differences(old[key], new[key], (*at, key))
