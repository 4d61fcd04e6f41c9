"""Merge run configs that are given together, and find required keys that are missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rslp.config.datasets import DATA_MODULES, DECODERS, TASK
from rslp.config.merge import pick, short
from rslp.config.notes import class_replacement_problems
from rslp.config.overlays import ClassReplacement, Overlay, merge_overlays, problem_at
from rslp.config.placeholders import Filler, placeholder_names
from rslp.errors import ConfigError, KeyPath, Problem
from rslp.io import Document, anchor_paths, plain_scalar

# Stage 1 puts the datasets and their tasks here; overrides must leave mappings.
_FILLED: tuple[KeyPath, ...] = (DATA_MODULES, DECODERS, (*TASK, "init_args", "tasks"))
# Classes that the base config names, with an example of each.
_CLASSES: dict[KeyPath, str] = {
    ("data", "class_path"): "rslp.train.MultiDatasetDataModule",
    ("model", "class_path"): "rslp.train.JointModule",
}

KeyProblem = tuple[KeyPath, str]


def missing_keys(
    tree: Mapping[str, Any], overlays: Sequence[Overlay], replaced: Sequence[ClassReplacement]
) -> list[Problem]:
    """Find required keys that an override removed, or that the base config lacks.

    Args:
        tree: a run config.
        overlays: the stack it was merged from, bottom first, to locate problems.
        replaced: the overlays that name another class, which may not take a missing key.
    """
    emptied = dict.fromkeys(_emptied(tree))
    problems = [_dropped(key, replaced) or problem_at(overlays, key, message) for key, message in emptied]
    # A key that no file has is missing in the base config.
    return [*problems, *(overlays[0].problem(message, key) for key, message in _absent(tree))]


def _dropped(key_path: KeyPath, replaced: Sequence[ClassReplacement]) -> Problem | None:
    """The problem with an override that names a class without this argument, if there is one."""
    for replacement in reversed(replaced):
        change = replacement.change
        parent = (*change.key_path, "init_args")
        lost = [name for name in change.dropped if key_path == parent or (*parent, name) == key_path[: len(parent) + 1]]
        if lost:
            return replacement.problem(f"{change.new} does not take {', '.join(lost)}, which stage 1 needs here")
    return None


def _emptied(tree: Mapping[str, Any]) -> Iterator[KeyProblem]:
    for key_path in _FILLED:
        for length in range(1, len(key_path) + 1):
            part = pick(tree, key_path[:length])
            if not isinstance(part, Mapping):
                got = "null" if part is None else short(part)
                yield key_path[:length], f"must be a mapping, since stage 1 puts the datasets into it; got {got}"
                break
    decoders = pick(tree, DECODERS)
    for name, decoder in decoders.items() if isinstance(decoders, Mapping) else ():
        yield from _modules(decoder, (*DECODERS, name))
    if "trainer" in tree and not isinstance(tree["trainer"], Mapping):
        yield ("trainer",), f"must be a mapping; got {short(tree['trainer'])}"


def _modules(decoder: Any, key_path: KeyPath) -> Iterator[KeyProblem]:
    if not isinstance(decoder, list) or not decoder:
        yield key_path, f"must be a list of modules, the last of which predicts; got {short(decoder)}"
        return
    for position, module in enumerate(decoder):
        if not isinstance(module, Mapping) or "class_path" not in module:
            yield (*key_path, position), f"must be a module with class_path and init_args; got {short(module)}"


def _absent(tree: Mapping[str, Any]) -> Iterator[KeyProblem]:
    for key_path, example in _CLASSES.items():
        part = pick(tree, key_path[:-1])
        if isinstance(part, Mapping) and part.get(key_path[-1]) is None:
            yield key_path, f"is missing; the base config names the class, such as {example}"
    if "trainer" not in tree:
        yield ("trainer",), "is missing; the base config holds it"


def merge_configs(
    documents: Sequence[Document], constants: Mapping[str, Any], *, notes: list[str] | None = None
) -> dict[str, Any]:
    """Merge configs, later ones over earlier ones, and fill their placeholders.

    Args:
        documents: the configs, each a mapping.
        constants: value by name (``patch_size`` or ``PATCH_SIZE``); a text is read as unquoted YAML, so ``"8"`` is 8.
        notes: notes for the user, on arguments that were dropped with their class, are appended to it.

    Returns:
        The merged config. Relative paths, which refer to the file that names them, have become ``Anchored`` ones: give
        the config to ``rslp.io.relativise_paths`` before writing it.

    Raises:
        ConfigError: all problems: a file that is no mapping, a placeholder without a constant, a relative path that
            does not exist, an override that cannot be merged.
    """
    typed = {key: plain_scalar(value) if isinstance(value, str) else value for key, value in constants.items()}
    filler = Filler(placeholder_names(typed))
    problems: list[Problem] = []
    overlays = [_overlay(document, filler, problems) for document in documents]
    if problems:
        raise ConfigError(problems)
    replaced: list[ClassReplacement] = []
    merged = merge_overlays(overlays, replaced=replaced)
    dropped, problems = class_replacement_problems(replaced)
    if problems:
        raise ConfigError(problems)
    if notes is not None:
        notes += dropped
    return merged


def _overlay(document: Document, filler: Filler, problems: list[Problem]) -> Overlay:
    if not isinstance(document.data, Mapping):
        problems.append(Problem("is no config: a mapping is wanted", document.name))
        return Overlay({}, (), document, ())
    tree = filler.fill(document.data, lambda message, key: problems.append(document.problem(message, key)))
    try:
        tree = anchor_paths(tree, [document.folder], name=document.name, line=document.nearest_line)
    except ConfigError as error:
        problems += error.problems
    return Overlay(tree, (), document, ())
