"""What no run config can do without: found missing here, and not by a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rslp.compose.datasets import DATA_MODULES, DECODERS, TASK
from rslp.compose.layers import Layer, Replaced, problem_at
from rslp.compose.merge import KeyPath, pick, short
from rslp.errors import Problem

# Where stage 1 puts the datasets and their tasks; whatever is laid over them must leave a mapping.
_FILLED: tuple[KeyPath, ...] = (DATA_MODULES, DECODERS, (*TASK, "init_args", "tasks"))
# What comes from the base config.
_CLASSES: dict[KeyPath, str] = {
    ("data", "class_path"): "rslp.train.MultiDatasetDataModule",
    ("model", "class_path"): "rslp.train.JointModule",
}

Finding = tuple[KeyPath, str]


def missing_parts(tree: Mapping[str, Any], layers: Sequence[Layer], replaced: Sequence[Replaced]) -> list[Problem]:
    """Find what an override took away, or a base config never had.

    Args:
        tree: a run config.
        layers: what it was folded from, bottom first, to tell file and line.
        replaced: where another class was named, which may not take what is missing.
    """
    found = dict.fromkeys(_emptied(tree))
    problems = [_dropped(at, replaced) or problem_at(layers, at, what) for at, what in found]
    # What nothing holds is missing in the base config.
    return [*problems, *(layers[0].problem(what, at) for at, what in _absent(tree))]


def _dropped(at: KeyPath, replaced: Sequence[Replaced]) -> Problem | None:
    """Blame the override that names a class without this argument, if there is one."""
    for one in reversed(replaced):
        start, change = (*one.change.at, "init_args"), one.change
        lost = [name for name in change.dropped if (*start, name) == at[: len(start) + 1] or at == start]
        if lost:
            return one.problem(f"{change.new} does not take {', '.join(lost)}, which stage 1 needs here")
    return None


def _emptied(tree: Mapping[str, Any]) -> Iterator[Finding]:
    for place in _FILLED:
        for length in range(1, len(place) + 1):
            part = pick(tree, place[:length])
            if not isinstance(part, Mapping):
                got = "null" if part is None else short(part)
                yield place[:length], f"must be a mapping, since stage 1 puts the datasets into it; got {got}"
                break
    decoders = pick(tree, DECODERS)
    for name, decoder in decoders.items() if isinstance(decoders, Mapping) else ():
        yield from _modules(decoder, (*DECODERS, name))
    if "trainer" in tree and not isinstance(tree["trainer"], Mapping):
        yield ("trainer",), f"must be a mapping; got {short(tree['trainer'])}"


def _modules(decoder: Any, at: KeyPath) -> Iterator[Finding]:
    if not isinstance(decoder, list) or not decoder:
        yield at, f"must be a list of modules, the last of which predicts; got {short(decoder)}"
        return
    for position, module in enumerate(decoder):
        if not isinstance(module, Mapping) or "class_path" not in module:
            yield (*at, position), f"must be a module with class_path and init_args; got {short(module)}"


def _absent(tree: Mapping[str, Any]) -> Iterator[Finding]:
    for at, example in _CLASSES.items():
        part = pick(tree, at[:-1])
        if isinstance(part, Mapping) and part.get(at[-1]) is None:
            yield at, f"is missing; the base config names the class, such as {example}"
    if "trainer" not in tree:
        yield ("trainer",), "is missing; the base config holds it"
