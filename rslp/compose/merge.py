"""The one merge rule of all configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rslp.errors import ConfigError, Problem

KeyPath = tuple[str | int, ...]
# Beside a class_path: arguments that mean something to this class alone.
OF_A_CLASS = ("init_args", "dict_kwargs")


def merge(base: Any, over: Any) -> Any:
    """Lay one config over another.

    A mapping is merged into a mapping, key by key and recursively; a key ending in ``+`` appends its list to the list
    below; anything else replaces what is below. So an empty mapping over a mapping changes nothing. Where another class
    is named, the arguments below were those of the class before and fall away.

    Args:
        base: the config below.
        over: the config above, which wins.

    Returns:
        The merged config, without ``+`` keys. Neither argument is changed; unchanged parts are shared with them.

    Raises:
        ConfigError: a ``+`` key without a list, or over something that is no list.
    """
    return _merge(base, over, ())


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


def dotted(at: KeyPath) -> str:
    """Write a key path as people do: ``trainer.callbacks.0``."""
    return ".".join(map(str, at))


def _merge(base: Any, over: Any, at: KeyPath) -> Any:
    if not isinstance(over, dict):
        return over
    result = dict(base) if isinstance(base, dict) else {}
    if names_another_class(base, over):
        result = {key: value for key, value in result.items() if key not in OF_A_CLASS}
    appended = []
    for key, value in over.items():
        if is_plus(key):
            appended.append(key)
        else:
            result[key] = _merge(result.get(key), value, (*at, key)) if isinstance(value, dict) else value
    for key in appended:
        result[key[:-1]] = _append(result.get(key[:-1]), over[key], (*at, key))
    return result


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
