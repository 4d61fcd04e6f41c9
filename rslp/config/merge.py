"""Merge configs: the one rule for all of them, the arguments that classes take, and the difference of two configs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rslp.errors import ConfigError, KeyPath, Problem, dotted

TABLE = Path(__file__).with_name("vocabulary.json")

# Gives the arguments that a class takes, by its class path; None where they are not known, or where it takes any.
Accepts = Callable[[str], frozenset[str] | None]


@functools.cache
def table() -> Mapping[str, frozenset[str] | None]:
    """The argument names by class path; None where a class takes any."""
    raw = json.loads(TABLE.read_text(encoding="utf-8"))
    return {path: None if names is None else frozenset(names) for path, names in raw.items()}


def known_arguments(class_path: str) -> frozenset[str] | None:
    """The arguments that a class takes; None where they are not known, or where it takes any."""
    return table().get(class_path)


def any_arguments(_: str) -> None:
    """None: the arguments of a class are not known, in a config that keeps class paths of another version."""


@dataclass(frozen=True)
class ClassChange:
    """A class that replaces another one, because an overlay names it.

    Attributes:
        key_path: key path of the mapping that names the class.
        old: the replaced class path.
        new: the new class path.
        kept: arguments of the old class that stay.
        dropped: arguments of the old class that the new one does not take.
        known: whether the arguments that the new class takes are known.
    """

    key_path: KeyPath
    old: str
    new: str
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    known: bool


def merge(base: Any, over: Any, *, accepts: Accepts = known_arguments, changes: list[ClassChange] | None = None) -> Any:
    """Lay one config over another.

    A mapping is merged into a mapping, key by key and recursively; a key ending in ``+`` appends its list to the list
    below; anything else replaces what is below. So an empty mapping over a mapping changes nothing. Where another class
    is named, those arguments below stay that the new class takes; for an unknown class, all of them.

    Args:
        base: the config below.
        over: the config above, which wins.
        accepts: gives the arguments that a class takes.
        changes: each replaced class is appended to it.

    Returns:
        The merged config, without ``+`` keys. Neither argument is changed; unchanged parts are shared with them.

    Raises:
        ConfigError: a ``+`` key whose value, or the value below, is no list; ``init_args`` that are no mapping.
    """
    return _Merger(accepts, changes).merge(base, over, ())


def plus_target(key: Any) -> Any:
    """The key without its ``+``; other keys as they are."""
    return key[:-1] if is_plus(key) else key


def is_plus(key: Any) -> bool:
    """Whether a key appends to a list."""
    return isinstance(key, str) and len(key) > 1 and key.endswith("+")


def nest(tree: Any, key_path: KeyPath) -> Any:
    """Make a config that holds another one: ``nest(x, ("a", "b"))`` is ``{"a": {"b": x}}``."""
    for key in reversed(key_path):
        tree = {key: tree}
    return tree


def put(tree: Any, key_path: KeyPath, value: Any) -> Any:
    """A copy of the tree with another value at a key path; missing mappings on the way there are added."""
    return {**(tree or {}), key_path[0]: put((tree or {}).get(key_path[0]), key_path[1:], value)} if key_path else value


def pick(tree: Any, key_path: KeyPath) -> Any:
    """The value at a key path, or None; list positions count as keys."""
    for key in key_path:
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

    def merge(self, base: Any, over: Any, key_path: KeyPath) -> Any:
        """The value at a key path: ``over`` laid onto ``base`` by the merge rule."""
        if not isinstance(over, dict):
            return over
        result = dict(base) if isinstance(base, dict) else {}
        old, new = result.get("class_path"), over.get("class_path")
        if isinstance(old, str) and isinstance(new, str) and old != new:
            result = self._with_accepted(result, new, key_path)
        appended = []
        for key, value in over.items():
            if is_plus(key):
                appended.append(key)
            elif isinstance(value, dict):
                result[key] = self.merge(result.get(key), value, (*key_path, key))
            else:
                if key == "init_args":
                    _refuse_to_empty(result.get(key), value, (*key_path, key))
                result[key] = value
        for key in appended:
            result[key[:-1]] = _append(result.get(key[:-1]), over[key], (*key_path, key))
        return result

    def _with_accepted(self, below: dict[Any, Any], new: str, key_path: KeyPath) -> dict[Any, Any]:
        """The config below without the arguments that the new class does not take."""
        names = self.accepts(new)
        arguments = below.get("init_args")
        arguments = arguments if isinstance(arguments, dict) else {}
        dropped = () if names is None else tuple(name for name in arguments if name not in names)
        kept = {name: value for name, value in arguments.items() if name not in dropped}
        result = {key: value for key, value in below.items() if key != "init_args" or kept}
        if kept:
            result["init_args"] = kept
        if names is not None and result.pop("dict_kwargs", None) is not None:
            dropped += ("dict_kwargs",)
        if self.changes is not None:
            names_kept, names_dropped = tuple(map(str, kept)), tuple(map(str, dropped))
            known = names is not None
            self.changes.append(ClassChange(key_path, below["class_path"], new, names_kept, names_dropped, known))
        return result


def _refuse_to_empty(below: Any, over: Any, key_path: KeyPath) -> None:
    if isinstance(below, dict) and below:
        got, names = "null" if over is None else short(over), ", ".join(map(str, below))
        message = f"must be a mapping; {got} would drop the arguments below it: {names}"
        raise ConfigError(Problem(message, key=dotted(key_path)))


def _append(below: Any, items: Any, key_path: KeyPath) -> list[Any]:
    if not isinstance(items, list):
        raise ConfigError(Problem(f"a key with + appends a list; got {short(items)}", key=dotted(key_path)))
    if below is not None and not isinstance(below, list):
        raise ConfigError(Problem(f"+ appends to a list, but below it stands {short(below)}", key=dotted(key_path)))
    return [*(below or []), *items]


def short(value: Any, width: int = 60) -> str:
    """Write a value for a message, cut to ``width`` characters."""
    if value is None:
        return "nothing"
    text = "a mapping" if isinstance(value, Mapping) else repr(str(value) if isinstance(value, str) else value)
    return text if len(text) <= width else text[: width - 1] + "…"


def differences(old: Any, new: Any) -> list[str]:
    """List the differences, one line for each key path: ``~`` changed, ``+`` new, ``-`` gone.

    Args:
        old: the config before.
        new: the config now.
    """
    return list(_differences(old, new, ()))


def _differences(old: Any, new: Any, key_path: KeyPath) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        yield from _between(old, new, list(dict.fromkeys([*old, *new])), key_path)
    elif isinstance(old, list) and isinstance(new, list):
        longer = range(max(len(old), len(new)))
        yield from _between(dict(enumerate(old)), dict(enumerate(new)), list(longer), key_path)
    elif type(old) is not type(new) or old != new:
        yield f"~ {dotted(key_path)}: {short(old)} -> {short(new)}"


def _between(old: Mapping[Any, Any], new: Mapping[Any, Any], keys: list[Any], key_path: KeyPath) -> Iterator[str]:
    for key in keys:
        if key not in old:
            yield f"+ {dotted((*key_path, key))}: {short(new[key])}"
        elif key not in new:
            yield f"- {dotted((*key_path, key))}: {short(old[key])}"
        else:
            yield from _differences(old[key], new[key], (*key_path, key))
