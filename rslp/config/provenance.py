"""Provenance: which files the values of a run config come from, as a file beside it, as its header, or for one key."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rslp.config.compose import RunConfig
from rslp.config.merge import Origins, ValueOrigin, pick
from rslp.config.placeholders import names_in
from rslp.errors import KeyPath, UsageError, dotted
from rslp.io import Document
from rslp.suggest import did_you_mean

# Gives a file's name for the output: relative, so that the output does not depend on the checkout's folder.
Name = Callable[[Document], str]


def header(documents: Sequence[Document], name: Name, *, command: str) -> str:
    """The comment that a run config begins with: the command and the files that it was made from.

    Args:
        documents: the files, the multi-dataset config first.
        name: gives a file's name.
        command: the command that makes it anew.
    """
    lines = [
        "Made by stage 1; edit the files below and make it anew instead of editing this one:",
        f"  {command}",
        "From:",
    ]
    width = max(len(name(document)) for document in documents)
    files = dict.fromkeys((name(document), document.sha256[:16]) for document in documents)
    lines += [f"  {shown:<{width}}  sha256 {digest}" for shown, digest in files]
    return "".join(f"# {line}\n" for line in lines)


def trace_origins(tree: Mapping[str, Any], origins: Origins) -> Iterator[tuple[KeyPath, list[ValueOrigin]]]:
    """Go through the values of a run config.

    Args:
        tree: the config.
        origins: the files that set each value, as ``merge_overlays`` gives them.

    Yields:
        For each value that is no mapping with keys, its key path and its origins, bottom overlay first; none for a
        derived value. So do arguments that were dropped with their class; none of their origins has won.
    """
    dropped = [key_path for key_path, found in origins.items() if not any(origin.won for origin in found)]
    yield from _trace(tree, (), origins, dropped)


def _trace(
    node: Any, key_path: KeyPath, origins: Origins, dropped: Sequence[KeyPath]
) -> Iterator[tuple[KeyPath, list[ValueOrigin]]]:
    if not isinstance(node, dict) or not node:
        yield key_path, origins.get(key_path, [])
        return
    for key, value in node.items():
        yield from _trace(value, (*key_path, key), origins, dropped)
    depth = len(key_path)
    for path in dropped:
        if len(path) > depth and path[:depth] == key_path and path[depth] not in node:
            yield path, origins[path]


def provenance_text(run: RunConfig, name: Name) -> str:
    """The provenance of all values as JSON, one line for each: dotted key -> [{file, line, key, value, won}].

    ``key`` is the list of keys that lead to the value in the file; all three are null where stage 1 made the value.

    Args:
        run: the composed config.
        name: gives a file's name.
    """
    lines = []
    for key_path, origins in trace_origins(run.tree, run.origins):
        entries = [_entry(origin, name) for origin in origins] or [_derived(run, key_path)]
        lines.append(f"{json.dumps(dotted(key_path))}: {json.dumps(entries, default=str)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def explain(run: RunConfig, key: str, name: Name) -> str:
    """Describe which file sets one value, and which other files it wins over.

    Args:
        run: the composed config.
        key: dotted key; list positions are numbers.
        name: gives a file's name.

    Raises:
        UsageError: the run config has no such key.
    """
    traced = dict(trace_origins(run.tree, run.origins))
    for leaf, origins in traced.items():
        if dotted(leaf) == key and _is_dropped(origins):
            reason = "another class, which does not take it, took the place of the one that it was an argument of"
            return "\n".join([f"{key} fell away: {reason}", *_origin_lines(run, leaf, origins, (), name)])
    key_path = _find(run.tree, key)
    for leaf, origins in traced.items():
        if leaf and leaf == key_path[: len(leaf)]:
            within = key_path[len(leaf) :]
            lines = _origin_lines(run, leaf, origins, within, name)
            return "\n".join([f"{key} = {_shown(pick(run.tree, key_path))}", *lines])
    below = [dotted(leaf) for leaf in traced if leaf[: len(key_path)] == key_path and not _is_dropped(traced[leaf])]
    return "\n".join([f"{key} is a mapping with {len(below)} values:", *(f"  {part}" for part in below)])


def _origin_lines(run: RunConfig, leaf: KeyPath, origins: list[ValueOrigin], within: KeyPath, name: Name) -> list[str]:
    if not origins:
        return [f"  derived: {_derived(run, leaf)['derived']}"]
    lines = []
    for origin in reversed(origins):
        verb = "set by" if origin.won else "beat  "
        value = pick(origin.value, within) if within else origin.value
        lines.append(f"  {verb} {name(origin.overlay.document)}:{origin.line(within)}  {_shown(value)}")
        written = origin.overlay.written((*origin.within, *within))
        for placeholder in names_in(written):
            document, line = run.constants[placeholder]
            lines.append(f"         where {{{placeholder}}} is set by {name(document)}:{line}")
    return lines


def _is_dropped(origins: Sequence[ValueOrigin]) -> bool:
    return bool(origins) and not any(origin.won for origin in origins)


def _find(tree: Mapping[str, Any], key: str) -> KeyPath:
    """Turn a dotted key into a key path; keys may be numbers, or have dots in them."""
    key_path: list[str | int] = []
    node: Any = tree
    words = key.split(".")
    while words:
        options = list(node) if isinstance(node, Mapping) else list(range(len(node))) if isinstance(node, list) else []
        # The longest option wins.
        lengths = range(len(words), 0, -1)
        match = next(((o, n) for n in lengths for o in options if str(o) == ".".join(words[:n])), None)
        if match is None:
            hint = did_you_mean(words[0], map(str, options))
            parent = dotted(tuple(key_path)) or "the run config"
            raise UsageError(f"--explain {key}: {parent} has no {words[0]!r}{hint}")
        option, length = match
        key_path.append(option)
        node = node[option]
        words = words[length:]
    return tuple(key_path)


def _entry(origin: ValueOrigin, name: Name) -> dict[str, Any]:
    source = {"file": name(origin.overlay.document), "line": origin.line(), "key": origin.key}
    return {**source, "value": origin.value, "won": origin.won}


def _derived(run: RunConfig, key_path: KeyPath) -> dict[str, Any]:
    parents = (key_path[:length] for length in range(len(key_path), 0, -1))
    reason = next((run.derived[parent] for parent in parents if parent in run.derived), "stage 1")
    value = pick(run.tree, key_path)
    return {"file": None, "line": None, "key": None, "value": value, "won": True, "derived": reason}


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str) if isinstance(value, Mapping | list) or value is None else str(value)
    return text if len(text) <= 200 else text[:199] + "…"
