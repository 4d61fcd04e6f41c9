"""Merge configs: overlays, the one rule of merging, the arguments that classes take, origins of values, differences."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rslp.errors import ConfigError, KeyPath, Problem, dotted
from rslp.io import Document

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
class Overlay:
    """A piece of a file.

    Attributes:
        tree: the piece; a key ``callbacks+`` appends its items to the list ``callbacks`` of the overlays below.
        target: key path in the run config where the piece goes.
        document: the file it is from.
        source: key path of the piece in that file.
        moved: for keys that were renamed or moved: key path within the piece -> key path in the file.
    """

    tree: Any
    target: KeyPath
    document: Document
    source: KeyPath
    moved: Mapping[KeyPath, KeyPath] = field(default_factory=dict)

    def line(self, within: KeyPath) -> int | None:
        """The line in the file of a key of the piece, or of its nearest parent."""
        return self.document.nearest_line(self.path_in_file(within))

    def written(self, within: KeyPath) -> Any:
        """The value as the file has it, with its placeholders; None where the file does not hold the key."""
        return pick(self.document.data, self.path_in_file(within))

    def path_in_file(self, within: KeyPath) -> KeyPath:
        """The key path in the file of a key of the piece."""
        for length in range(len(within), -1, -1):
            old = self.moved.get(within[:length])
            if old is not None:
                return (*old, *within[length:])
        return (*self.source, *within)

    def with_tree(self, tree: Any, moved: Mapping[KeyPath, KeyPath]) -> Overlay:
        """The overlay with another tree.

        Args:
            tree: the new tree.
            moved: for keys that were renamed or moved: key path in the new tree -> key path in the present one.
        """
        in_file = {new: self.path_in_file(old) for new, old in moved.items()}
        return Overlay(tree, self.target, self.document, self.source, {**self.moved, **in_file})

    def problem(self, message: str, within: KeyPath) -> Problem:
        """A problem with a key of the piece: its line is the file's, its name that of the present version."""
        return Problem(message, self.document.name, self.line(within), dotted((*self.source, *within)))


@dataclass(frozen=True, slots=True)
class ValueOrigin:
    """One file that sets a value of the run config.

    Attributes:
        overlay: the piece of the file.
        within: key path of the value in the piece.
        value: the value that it sets.
        won: whether the run config has this value; a list to which overlays appended has several origins that won.
    """

    overlay: Overlay
    within: KeyPath
    value: Any
    won: bool

    @property
    def key(self) -> KeyPath:
        """The value's key path in the file."""
        return self.overlay.path_in_file(self.within)

    def line(self, below: KeyPath = ()) -> int | None:
        """The 1-based line of the value, or of a part of it."""
        return self.overlay.line((*self.within, *below))


@dataclass(frozen=True)
class ClassReplacement:
    """An overlay that names another class than the overlays below it.

    Attributes:
        overlay: the overlay.
        key_path: key path, in the run config, of the mapping that names the class.
        old: the replaced class path.
        new: the new class path.
        kept: arguments of the old class that stay.
        dropped: arguments of the old class that the new one does not take.
        known: whether the arguments that the new class takes are known.
    """

    overlay: Overlay
    key_path: KeyPath
    old: str
    new: str
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    known: bool

    def problem(self, message: str) -> Problem:
        """A problem with the ``class_path`` that the overlay names."""
        return self.overlay.problem(message, (*self.key_path, "class_path")[len(self.overlay.target) :])


# The files that set each value, by its key path in the run config; the last of those that won sets it.
Origins = dict[KeyPath, list[ValueOrigin]]


def merge(base: Any, over: Any) -> Any:
    """Lay one config over another.

    A mapping is merged into a mapping, key by key and recursively; a key ending in ``+`` appends its list to the list
    below; anything else replaces what is below. So an empty mapping over a mapping changes nothing. Where another class
    is named, those arguments below stay that the new class takes; for an unknown class, all of them.

    Args:
        base: the config below.
        over: the config above, which wins.

    Returns:
        The merged config, without ``+`` keys. Neither argument is changed; unchanged parts are shared with them.

    Raises:
        ConfigError: a ``+`` key whose value, or the value below, is no list; ``init_args`` that are no mapping.
    """
    return _Merger(known_arguments).merge(base, over, ())


def merge_overlays(
    overlays: Sequence[Overlay],
    *,
    accepts: Accepts = known_arguments,
    replaced: list[ClassReplacement] | None = None,
    origins: Origins | None = None,
) -> dict[str, Any]:
    """Merge a stack of overlays, as ``merge`` does.

    Args:
        overlays: the stack, bottom first: later ones win.
        accepts: gives the arguments that a class takes.
        replaced: each overlay that names another class than those below is appended to it.
        origins: the files that set each value are added to it. Of arguments that were dropped with their class, no
            origin has won. There are further entries, of values that a mapping or a text above them has replaced.

    Raises:
        ConfigError: a ``+`` key that cannot append, or ``init_args`` that are replaced by nothing; with file and line.
    """
    result: dict[str, Any] = {}
    for overlay in overlays:
        merger = _Merger(accepts, overlay, [] if replaced is None else replaced, {} if origins is None else origins)
        result = merger.merge(result, nest(overlay.tree, overlay.target), ())
    return result


def problem_at(overlays: Sequence[Overlay], key_path: KeyPath, message: str) -> Problem:
    """A problem with a key path of the run config, at its place in the file that set it."""
    for length in range(len(key_path), 0, -1):
        for overlay in reversed(overlays):
            start = len(overlay.target)
            if key_path[:length][:start] == overlay.target and _holds(overlay.tree, key_path[start:length]):
                return overlay.problem(message, key_path[start:])
    return Problem(message, key=dotted(key_path))


def _holds(tree: Any, key_path: KeyPath) -> bool:
    """Whether a piece has a key path, of which each key may have a ``+``."""
    for key in key_path:
        if isinstance(tree, Mapping):
            key = key if key in tree else f"{key}+"
            if key not in tree:
                return False
        elif not isinstance(tree, list) or not isinstance(key, int) or key >= len(tree):
            return False
        tree = tree[key]
    return True


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
    """A copy of the tree with another value at a key path; what is no mapping on the way there becomes one."""
    below = tree if isinstance(tree, Mapping) else {}
    return {**below, key_path[0]: put(below.get(key_path[0]), key_path[1:], value)} if key_path else value


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


# Keys from the root; ``*`` is any key, a tuple any of its keys.
Pattern = tuple[str | int | tuple[str, ...], ...]


def matching(tree: Any, pattern: Pattern, key_path: KeyPath = ()) -> Iterator[KeyPath]:
    """The key paths of the mappings that match a pattern."""
    if isinstance(tree, Mapping):
        if not pattern:
            yield key_path
            return
        wanted = pattern[0] if isinstance(pattern[0], tuple) else pattern[:1]
        for key in [key for key in tree if key in wanted or wanted == ("*",)]:
            yield from matching(tree[key], pattern[1:], (*key_path, key))


@dataclass(frozen=True)
class _Merger:
    """Lays configs over others; an overlay, where there is one, locates problems and is the origin of values."""

    accepts: Accepts
    overlay: Overlay | None = None
    replaced: list[ClassReplacement] = field(default_factory=list)
    origins: Origins = field(default_factory=dict)

    def merge(self, base: Any, over: Any, key_path: KeyPath) -> Any:
        """The value at a key path: ``over`` laid onto ``base`` by the merge rule."""
        if not isinstance(over, dict) or not over:
            self._record(key_path, over)
            return base if isinstance(over, dict) and isinstance(base, dict) else over
        result = dict(base) if isinstance(base, dict) else {}
        old, new = result.get("class_path"), over.get("class_path")
        if isinstance(old, str) and isinstance(new, str) and old != new:
            result = self._with_accepted(result, new, key_path)
        for key, value in over.items():
            if not is_plus(key):
                if key == "init_args":
                    self._refuse_to_empty(result.get(key), value, (*key_path, key))
                result[key] = self.merge(result.get(key), value, (*key_path, key))
        for key in filter(is_plus, over):
            result[key[:-1]] = self._append(result.get(key[:-1]), over[key], (*key_path, key))
        return result

    def _record(self, key_path: KeyPath, value: Any, *, appended: bool = False) -> None:
        """Add this overlay to the origins of a value; one that is not appended beats the origins below."""
        if self.overlay is not None:
            if not appended:
                self._beat(key_path)
            origin = ValueOrigin(self.overlay, key_path[len(self.overlay.target) :], value, won=True)
            self.origins.setdefault(key_path, []).append(origin)

    def _beat(self, key_path: KeyPath) -> None:
        if key_path in self.origins:
            self.origins[key_path] = [replace(origin, won=False) for origin in self.origins[key_path]]

    def _with_accepted(self, below: dict[Any, Any], new: str, key_path: KeyPath) -> dict[Any, Any]:
        """The config below without the arguments that the new class does not take."""
        names = self.accepts(new)
        arguments = below.get("init_args")
        arguments = arguments if isinstance(arguments, dict) else {}
        dropped = [] if names is None else [name for name in arguments if name not in names]
        kept = {name: value for name, value in arguments.items() if name not in dropped}
        lost: list[KeyPath] = [(*key_path, "init_args", name) for name in dropped]
        result = {key: value for key, value in below.items() if key != "init_args" or kept}
        if kept:
            result["init_args"] = kept
        # jsonargparse's `dict_kwargs` are for a class that takes any argument, not for one of known arguments.
        if names is not None and result.pop("dict_kwargs", None) is not None:
            dropped.append("dict_kwargs")
            lost.append((*key_path, "dict_kwargs"))
        if self.overlay is not None:
            for value_path in [path for path in self.origins for start in lost if path[: len(start)] == start]:
                self._beat(value_path)
            names_kept, names_dropped = tuple(map(str, kept)), tuple(map(str, dropped))
            change = (key_path, below["class_path"], new, names_kept, names_dropped, names is not None)
            self.replaced.append(ClassReplacement(self.overlay, *change))
        return result

    def _refuse_to_empty(self, below: Any, over: Any, key_path: KeyPath) -> None:
        if isinstance(below, dict) and below and not isinstance(over, dict):
            got, names = "null" if over is None else short(over), ", ".join(map(str, below))
            raise self._error(f"must be a mapping; {got} would drop the arguments below it: {names}", key_path)

    def _append(self, below: Any, items: Any, key_path: KeyPath) -> list[Any]:
        if not isinstance(items, list):
            raise self._error(f"a key with + appends a list; got {short(items)}", key_path)
        if below is not None and not isinstance(below, list):
            raise self._error(f"+ appends to a list, but below it stands {short(below)}", key_path)
        self._record((*key_path[:-1], plus_target(key_path[-1])), items, appended=True)
        return [*(below or []), *items]

    def _error(self, message: str, key_path: KeyPath) -> ConfigError:
        if self.overlay is None:
            return ConfigError(Problem(message, key=dotted(key_path)))
        return ConfigError(self.overlay.problem(message, key_path[len(self.overlay.target) :]))


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
