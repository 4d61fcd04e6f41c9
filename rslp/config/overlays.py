"""A run config is a stack of layers: each is a piece of one file, put at its place. Later layers win.

Because the pieces keep their origin, every value of the result can be traced to the file and line that set it, and to
those it beat.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rslp.config.merge import (
    Accepts,
    ClassChange,
    is_plus,
    known_arguments,
    merge,
    nest,
    pick,
    plus_target,
)
from rslp.errors import ConfigError, KeyPath, Problem, dotted
from rslp.io import Document


@dataclass(frozen=True)
class Overlay:
    """A piece of a file.

    Attributes:
        tree: the piece; ``key+`` appends to lists of the layers below.
        at: where it goes in the run config.
        document: the file it is from.
        source: where it stands in that file.
        moved: for keys that were renamed on the way: new key path within the piece -> key path in the file.
    """

    tree: Any
    at: KeyPath
    document: Document
    source: KeyPath
    moved: Mapping[KeyPath, KeyPath] = field(default_factory=dict)

    def line(self, within: KeyPath) -> int | None:
        """Give the line in the file where a key of the piece stands, or that of its nearest parent."""
        return self.document.nearest_line(self.place(within))

    def written(self, within: KeyPath) -> Any:
        """Give what the file says there, with its placeholders; None where it cannot be told."""
        return pick(self.document.data, self.place(within))

    def place(self, within: KeyPath) -> KeyPath:
        """Give the key path in the file of a key of the piece."""
        for length in range(len(within), -1, -1):
            old = self.moved.get(within[:length])
            if old is not None:
                return (*old, *within[length:])
        return (*self.source, *within)

    def changed(self, tree: Any, moved: Mapping[KeyPath, KeyPath]) -> Overlay:
        """Give the layer with another tree.

        Args:
            tree: the tree.
            moved: for keys that stand elsewhere now: new key path -> key path in the tree before.
        """
        in_file = {new: self.place(old) for new, old in moved.items()}
        return Overlay(tree, self.at, self.document, self.source, {**self.moved, **in_file})

    def problem(self, what: str, within: KeyPath) -> Problem:
        """Make a problem of a key of the piece, named as it stands in the file."""
        return Problem(what, self.document.name, self.line(within), dotted((*self.source, *within)))


@dataclass(frozen=True)
class ValueOrigin:
    """One file's say in a value.

    Attributes:
        layer: the piece of a file that says it.
        within: where in the piece.
        value: what it says.
        won: whether the value of the run config comes from here (for appended lists: also from here).
    """

    layer: Overlay
    within: KeyPath
    value: Any
    won: bool

    @property
    def document(self) -> Document:
        """The file."""
        return self.layer.document

    @property
    def key(self) -> KeyPath:
        """Where the value stands in the file."""
        return self.layer.place(self.within)

    def line(self, below: KeyPath = ()) -> int | None:
        """Give the 1-based line where the value stands, or a part of it."""
        return self.layer.line((*self.within, *below))


@dataclass(frozen=True)
class ClassReplacement:
    """A layer that names another class over the one below.

    Attributes:
        layer: the layer.
        change: what it changes, with its place in the run config.
    """

    layer: Overlay
    change: ClassChange

    def problem(self, what: str) -> Problem:
        """Make a problem of the ``class_path`` that the layer names."""
        return self.layer.problem(what, (*self.change.at, "class_path")[len(self.layer.at) :])


def merge_overlays(
    layers: Sequence[Overlay], *, accepts: Accepts = known_arguments, replaced: list[ClassReplacement] | None = None
) -> dict[str, Any]:
    """Merge a stack of layers, bottom first.

    Args:
        layers: the layers.
        accepts: gives the arguments that a class takes.
        replaced: gets each place where a layer names another class than those below.

    Raises:
        ConfigError: a ``+`` key that cannot append, ``init_args`` that are emptied, with file and line.
    """
    result: dict[str, Any] = {}
    for layer in layers:
        changes: list[ClassChange] = []
        try:
            result = merge(result, nest(layer.tree, layer.at), accepts=accepts, changes=changes)
        except ConfigError as error:
            raise ConfigError(_located(error.problems, layer)) from None
        if replaced is not None:
            replaced += [ClassReplacement(layer, change) for change in changes]
    return result


def trace_origins(
    layers: Sequence[Overlay], result: Mapping[str, Any], *, accepts: Accepts = known_arguments
) -> Iterator[tuple[KeyPath, list[ValueOrigin]]]:
    """Trace every value of a run config: its key path, and who set it, bottom layer first.

    Args:
        layers: the stack the config was folded from.
        result: the config; values that no layer holds (derived ones) have no settings.
        accepts: gives the arguments that a class takes, as when the stack was folded.

    Yields:
        One pair for each leaf; a list is a leaf. Arguments that a class above does not take come too; nobody won there.
    """
    pieces = [_Piece(layer, nest(layer.tree, layer.at), -len(layer.at)) for layer in layers]
    yield from _Tracer(accepts).trace((), result, pieces)


def deciding_overlay(layers: Sequence[Overlay], at: KeyPath) -> tuple[Overlay, KeyPath] | None:
    """Find the layer that decides a key path, and the path within it; None when no layer holds it."""
    for layer in reversed(layers):
        if at[: len(layer.at)] == layer.at and _holds(layer.tree, at[len(layer.at) :]):
            return layer, at[len(layer.at) :]
    return None


def problem_at(layers: Sequence[Overlay], at: KeyPath, what: str) -> Problem:
    """Make a problem of a key path of the run config, located in the file that set it."""
    for length in range(len(at), 0, -1):
        found = deciding_overlay(layers, at[:length])
        if found is not None:
            layer, within = found
            return layer.problem(what, (*within, *at[length:]))
    return Problem(what, key=dotted(at))


def _located(problems: Iterable[Problem], layer: Overlay) -> list[Problem]:
    located = []
    for problem in problems:
        within = tuple(problem.key.split("."))[len(layer.at) :]
        located.append(layer.problem(problem.what, within))
    return located


def _holds(tree: Any, at: KeyPath) -> bool:
    for key in at:
        if isinstance(tree, Mapping):
            key = key if key in tree else f"{key}+"
            if key not in tree:
                return False
            tree = tree[key]
        elif isinstance(tree, list) and isinstance(key, int) and key < len(tree):
            tree = tree[key]
        else:
            return False
    return True


@dataclass(frozen=True)
class _Piece:
    """What a layer says below some key.

    Attributes:
        layer: the layer.
        tree: what it says.
        depth: how far below the layer's own place; negative above it.
        taken: which of the keys right below are still arguments, since a layer above names another class; None for all.
        fallen: whether it fell away because a class above does not take it.
    """

    layer: Overlay
    tree: Any
    depth: int
    taken: frozenset[str] | None = None
    fallen: bool = False


@dataclass(frozen=True)
class _Plus:
    items: Any


@dataclass(frozen=True)
class _Tracer:
    accepts: Accepts

    def trace(self, at: KeyPath, node: Any, pieces: Sequence[_Piece]) -> Iterator[tuple[KeyPath, list[ValueOrigin]]]:
        if not isinstance(node, dict) or not node:
            yield at, _settings_of(at, pieces)
            return
        below = self._below(pieces)
        for key, value in node.items():
            yield from self.trace((*at, key), value, below.get(key, []))
        for key in below:
            if key not in node:
                yield from self._is_dropped((*at, key), below[key])

    def _is_dropped(self, at: KeyPath, pieces: Sequence[_Piece]) -> Iterator[tuple[KeyPath, list[ValueOrigin]]]:
        below = self._below(pieces)
        for key in below:
            yield from self._is_dropped((*at, key), below[key])
        if found := _settings_of(at, [piece for piece in pieces if piece.fallen]):
            yield at, found

    def _below(self, pieces: Sequence[_Piece]) -> dict[Any, list[_Piece]]:
        """Go one key down."""
        below: dict[Any, list[_Piece]] = {}
        for piece, names in zip(pieces, self._accepted_above(pieces), strict=True):
            # Of one mapping, what is appended comes after what it is appended to, as in merging.
            said = sorted(piece.tree.items(), key=lambda item: is_plus(item[0])) if isinstance(piece.tree, dict) else ()
            for key, value in said:
                name = plus_target(key)
                lost = piece.taken is not None and name not in piece.taken
                lost = lost or (name == "dict_kwargs" and names is not None)
                inner = _Plus(value) if is_plus(key) else value
                taken = names if name == "init_args" else None
                made = _Piece(piece.layer, inner, piece.depth + 1, taken=taken, fallen=piece.fallen or lost)
                below.setdefault(name, []).append(made)
        return below

    def _accepted_above(self, pieces: Sequence[_Piece]) -> list[frozenset[str] | None]:
        """For each piece, the arguments that all classes named above it take; None for all."""
        taken: list[frozenset[str] | None] = [None] * len(pieces)
        current: str | None = None
        for position, piece in enumerate(pieces):
            named = piece.tree.get("class_path") if isinstance(piece.tree, dict) else None
            if not isinstance(named, str):
                continue
            names = self.accepts(named) if current not in (None, named) else None
            if names is not None:
                taken[:position] = [names if old is None else names & old for old in taken[:position]]
            current = named
        return taken


def _settings_of(at: KeyPath, pieces: Sequence[_Piece]) -> list[ValueOrigin]:
    found = []
    winning = True
    for piece in reversed(pieces):
        value = piece.tree
        # What lies above the place of a layer is only the way there, said by nobody.
        if piece.depth < 0 or (isinstance(value, dict) and value):
            continue
        plain = value.items if isinstance(value, _Plus) else value
        found.append(ValueOrigin(piece.layer, at[len(at) - piece.depth :], plain, winning and not piece.fallen))
        winning = winning and (piece.fallen or isinstance(value, _Plus))
    return found[::-1]
