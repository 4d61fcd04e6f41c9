"""Overlays: pieces of files that are merged into a run config; later ones win, and each value can be traced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rslp.config.merge import Accepts, ClassChange, is_plus, known_arguments, merge, nest, pick, plus_target
from rslp.errors import ConfigError, KeyPath, Problem, dotted
from rslp.io import Document


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


@dataclass(frozen=True)
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
        change: the two classes and their arguments; its key path is one of the run config.
    """

    overlay: Overlay
    change: ClassChange

    def problem(self, message: str) -> Problem:
        """A problem with the ``class_path`` that the overlay names."""
        return self.overlay.problem(message, (*self.change.key_path, "class_path")[len(self.overlay.target) :])


def merge_overlays(
    overlays: Sequence[Overlay], *, accepts: Accepts = known_arguments, replaced: list[ClassReplacement] | None = None
) -> dict[str, Any]:
    """Merge a stack of overlays.

    Args:
        overlays: the stack, bottom first: later ones win.
        accepts: gives the arguments that a class takes.
        replaced: each overlay that names another class than those below is appended to it.

    Raises:
        ConfigError: a ``+`` key that cannot append, or ``init_args`` that are replaced by nothing; with file and line.
    """
    result: dict[str, Any] = {}
    for overlay in overlays:
        changes: list[ClassChange] = []
        try:
            result = merge(result, nest(overlay.tree, overlay.target), accepts=accepts, changes=changes)
        except ConfigError as error:
            start = len(overlay.target)
            raise ConfigError(
                overlay.problem(problem.what, tuple(problem.key.split("."))[start:]) for problem in error.problems
            ) from None
        if replaced is not None:
            replaced += [ClassReplacement(overlay, change) for change in changes]
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
            tree = tree[key]
        elif isinstance(tree, list) and isinstance(key, int) and key < len(tree):
            tree = tree[key]
        else:
            return False
    return True


def trace_origins(
    overlays: Sequence[Overlay], result: Mapping[str, Any], *, accepts: Accepts = known_arguments
) -> Iterator[tuple[KeyPath, list[ValueOrigin]]]:
    """Find for every value of a run config the files that set it.

    Args:
        overlays: the stack that the config was merged from.
        result: the config; values that no overlay holds (derived ones) have no origins.
        accepts: gives the arguments that a class takes, as when the stack was merged.

    Yields:
        For each value that is no mapping with keys, its key path and its origins, bottom overlay first. So do arguments
        that were dropped with their class; none of their origins has won.
    """
    pieces = [_Piece(overlay, nest(overlay.tree, overlay.target), -len(overlay.target)) for overlay in overlays]
    yield from _Tracer(accepts).trace((), result, pieces)


@dataclass(frozen=True)
class _Piece:
    """The part of an overlay below some key path of the run config.

    Attributes:
        overlay: the overlay.
        tree: the part.
        depth: length of the key path less that of the overlay's target.
        accepted: for ``init_args``, the names that the classes of later overlays take; None for all.
        dropped: whether it was dropped with its class.
    """

    overlay: Overlay
    tree: Any
    depth: int
    accepted: frozenset[str] | None = None
    dropped: bool = False


@dataclass(frozen=True)
class _Appended:
    """The items of a ``+`` key: they are added to the list below, and do not replace it."""

    items: Any


@dataclass(frozen=True)
class _Tracer:
    """Goes down the run config and its overlays side by side.

    Attributes:
        accepts: gives the arguments that a class takes.
    """

    accepts: Accepts

    def trace(
        self, key_path: KeyPath, node: Any, pieces: Sequence[_Piece]
    ) -> Iterator[tuple[KeyPath, list[ValueOrigin]]]:
        """Yield key path and origins of the values below a node of the run config.

        Args:
            key_path: the node's key path.
            node: the node.
            pieces: the parts of the overlays at that key path, bottom first.
        """
        if not isinstance(node, dict) or not node:
            yield key_path, _origins(key_path, pieces)
            return
        below = self._below(pieces)
        for key, value in node.items():
            yield from self.trace((*key_path, key), value, below.get(key, []))
        for key in below:
            if key not in node:
                yield from self._trace_dropped((*key_path, key), below[key])

    def _trace_dropped(
        self, key_path: KeyPath, pieces: Sequence[_Piece]
    ) -> Iterator[tuple[KeyPath, list[ValueOrigin]]]:
        """As ``trace``, for a key path that the run config lacks: only values that were dropped with their class."""
        below = self._below(pieces)
        for key in below:
            yield from self._trace_dropped((*key_path, key), below[key])
        if origins := _origins(key_path, [piece for piece in pieces if piece.dropped]):
            yield key_path, origins

    def _below(self, pieces: Sequence[_Piece]) -> dict[Any, list[_Piece]]:
        """The pieces one key further down, by that key."""
        below: dict[Any, list[_Piece]] = {}
        for piece, arguments in zip(pieces, self._arguments(pieces), strict=True):
            # Within one mapping, a `key+` is merged after its `key`.
            items = (
                sorted(piece.tree.items(), key=lambda item: is_plus(item[0])) if isinstance(piece.tree, dict) else ()
            )
            for key, value in items:
                name = plus_target(key)
                dropped = piece.accepted is not None and name not in piece.accepted
                # jsonargparse's `dict_kwargs` are for a class that takes any argument, not for one of known arguments.
                dropped = piece.dropped or dropped or (name == "dict_kwargs" and arguments is not None)
                tree = _Appended(value) if is_plus(key) else value
                accepted = arguments if name == "init_args" else None
                part = _Piece(piece.overlay, tree, piece.depth + 1, accepted=accepted, dropped=dropped)
                below.setdefault(name, []).append(part)
        return below

    def _arguments(self, pieces: Sequence[_Piece]) -> list[frozenset[str] | None]:
        """For each piece, the arguments that all classes take which later pieces change to; None for all."""
        result: list[frozenset[str] | None] = [None] * len(pieces)
        current: str | None = None
        for position, piece in enumerate(pieces):
            named = piece.tree.get("class_path") if isinstance(piece.tree, dict) else None
            if not isinstance(named, str):
                continue
            names = self.accepts(named) if current not in (None, named) else None
            if names is not None:
                result[:position] = [names if old is None else names & old for old in result[:position]]
            current = named
        return result


def _origins(key_path: KeyPath, pieces: Sequence[_Piece]) -> list[ValueOrigin]:
    """The origins of the value at a key path, from the parts of the overlays there; bottom first, as they are."""
    origins = []
    winning = True
    for piece in reversed(pieces):
        value = piece.tree
        # The keys above an overlay's target were added by `nest`: no file holds them.
        if piece.depth < 0 or (isinstance(value, dict) and value):
            continue
        written = value.items if isinstance(value, _Appended) else value
        within = key_path[len(key_path) - piece.depth :]
        origins.append(ValueOrigin(piece.overlay, within, written, winning and not piece.dropped))
        winning = winning and (piece.dropped or isinstance(value, _Appended))
    return origins[::-1]
