"""Tell where the values of a run config come from: as a file beside it, as its header, or for one key."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rslp.config.compose import RunConfig
from rslp.config.merge import pick
from rslp.config.overlays import ValueOrigin, trace_origins
from rslp.config.placeholders import names_in
from rslp.errors import KeyPath, UsageError, dotted
from rslp.io import Document
from rslp.suggest import did_you_mean

# Gives the name that a file has in what is written: relative, so that bytes do not depend on the checkout.
Name = Callable[[Document], str]


def header(documents: Sequence[Document], name: Name, *, command: str) -> str:
    """Write the comment that a run config begins with: how it was made, and from what.

    Args:
        documents: the files, the multi-dataset config first.
        name: gives a file's name.
        command: what to run to make it anew.
    """
    lines = [
        "Made by stage 1; edit the files below and make it anew instead of editing this one:",
        f"  {command}",
        "From:",
    ]
    width = max(len(name(document)) for document in documents)
    seen = dict.fromkeys((name(document), document.sha256[:16]) for document in documents)
    lines += [f"  {shown:<{width}}  sha256 {digest}" for shown, digest in seen]
    return "".join(f"# {line}\n" for line in lines)


def provenance_text(run: RunConfig, name: Name) -> str:
    """Write the provenance of all values as JSON, one line for each: dotted key -> [{file, line, key, value, won}].

    ``key`` is the list of keys that lead to the value in the file; all three are null where stage 1 made the value.

    Args:
        run: the composed config.
        name: gives a file's name.
    """
    lines = []
    for at, found in trace_origins(run.layers, run.tree, accepts=run.accepts):
        entries = [_entry(setting, name) for setting in found] or [_derived(run, at)]
        lines.append(f"{json.dumps(dotted(at))}: {json.dumps(entries, default=str)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def explain(run: RunConfig, key: str, name: Name) -> str:
    """Tell where one value comes from, and what it beat.

    Args:
        run: the composed config.
        key: dotted key; list positions are numbers.
        name: gives a file's name.

    Raises:
        UsageError: the run config has no such key.
    """
    traced = dict(trace_origins(run.layers, run.tree, accepts=run.accepts))
    if (
        fallen := next((leaf for leaf in traced if dotted(leaf) == key and _has_fallen(traced[leaf])), None)
    ) is not None:
        reason = (
            "fell away: another class, which does not take it, took the place of the one that it was an argument of"
        )
        return "\n".join([f"{key} {reason}", *_explained(run, fallen, traced[fallen], (), name)])
    at = _find(run.tree, key)
    for leaf, found in traced.items():
        if leaf == at or (leaf == at[: len(leaf)] and leaf):
            return "\n".join(
                [f"{key} = {_shown(pick(run.tree, at))}", *_explained(run, leaf, found, at[len(leaf) :], name)]
            )
    parts = [dotted(leaf) for leaf in traced if leaf[: len(at)] == at and not _has_fallen(traced[leaf])]
    return "\n".join([f"{key} is a mapping with {len(parts)} values:", *(f"  {part}" for part in parts)])


def _explained(run: RunConfig, leaf: KeyPath, found: list[ValueOrigin], within: KeyPath, name: Name) -> list[str]:
    if not found:
        return [f"  derived: {_derived(run, leaf)['derived']}"]
    lines = []
    for setting in reversed(found):
        verb = "set by" if setting.won else "beat  "
        value = pick(setting.value, within) if within else setting.value
        lines.append(f"  {verb} {name(setting.document)}:{setting.line(within)}  {_shown(value)}")
        written = setting.layer.written((*setting.within, *within))
        for placeholder in names_in(written):
            document, line = run.constants[placeholder]
            lines.append(f"         where {{{placeholder}}} is set by {name(document)}:{line}")
    return lines


def _has_fallen(found: Sequence[ValueOrigin]) -> bool:
    return bool(found) and not any(setting.won for setting in found)


def _find(tree: Mapping[str, Any], key: str) -> KeyPath:
    """Turn a dotted key into a key path; keys may be numbers, or hold dots themselves."""
    at: list[str | int] = []
    node: Any = tree
    words = key.split(".")
    while words:
        options = list(node) if isinstance(node, Mapping) else list(range(len(node))) if isinstance(node, list) else []
        taken = next(((o, n) for n in range(len(words), 0, -1) for o in options if str(o) == ".".join(words[:n])), None)
        if taken is None:
            hint = did_you_mean(words[0], map(str, options))
            there = dotted(tuple(at)) or "the run config"
            raise UsageError(f"--explain {key}: {there} has no {words[0]!r}{hint}")
        at.append(taken[0])
        node = node[taken[0]]
        words = words[taken[1] :]
    return tuple(at)


def _entry(setting: ValueOrigin, name: Name) -> dict[str, Any]:
    where = {"file": name(setting.document), "line": setting.line(), "key": setting.key}
    return {**where, "value": setting.value, "won": setting.won}


def _derived(run: RunConfig, at: KeyPath) -> dict[str, Any]:
    reason = next(
        (run.derived[at[:length]] for length in range(len(at), 0, -1) if at[:length] in run.derived), "stage 1"
    )
    return {"file": None, "line": None, "key": None, "value": pick(run.tree, at), "won": True, "derived": reason}


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str) if isinstance(value, Mapping | list) or value is None else str(value)
    return text if len(text) <= 200 else text[:199] + "…"
