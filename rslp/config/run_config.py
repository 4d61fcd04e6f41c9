"""Run configs: given together they are merged; what none can do without is found missing."""

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

# Where stage 1 puts the datasets and their tasks; whatever is laid over them must leave a mapping.
_FILLED: tuple[KeyPath, ...] = (DATA_MODULES, DECODERS, (*TASK, "init_args", "tasks"))
# What comes from the base config.
_CLASSES: dict[KeyPath, str] = {
    ("data", "class_path"): "rslp.train.MultiDatasetDataModule",
    ("model", "class_path"): "rslp.train.JointModule",
}

KeyProblem = tuple[KeyPath, str]


def missing_keys(
    tree: Mapping[str, Any], layers: Sequence[Overlay], replaced: Sequence[ClassReplacement]
) -> list[Problem]:
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


def _dropped(at: KeyPath, replaced: Sequence[ClassReplacement]) -> Problem | None:
    """Blame the override that names a class without this argument, if there is one."""
    for one in reversed(replaced):
        start, change = (*one.change.at, "init_args"), one.change
        lost = [name for name in change.dropped if (*start, name) == at[: len(start) + 1] or at == start]
        if lost:
            return one.problem(f"{change.new} does not take {', '.join(lost)}, which stage 1 needs here")
    return None


def _emptied(tree: Mapping[str, Any]) -> Iterator[KeyProblem]:
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


def _modules(decoder: Any, at: KeyPath) -> Iterator[KeyProblem]:
    if not isinstance(decoder, list) or not decoder:
        yield at, f"must be a list of modules, the last of which predicts; got {short(decoder)}"
        return
    for position, module in enumerate(decoder):
        if not isinstance(module, Mapping) or "class_path" not in module:
            yield (*at, position), f"must be a module with class_path and init_args; got {short(module)}"


def _absent(tree: Mapping[str, Any]) -> Iterator[KeyProblem]:
    for at, example in _CLASSES.items():
        part = pick(tree, at[:-1])
        if isinstance(part, Mapping) and part.get(at[-1]) is None:
            yield at, f"is missing; the base config names the class, such as {example}"
    if "trainer" not in tree:
        yield ("trainer",), "is missing; the base config holds it"


def merge_configs(
    documents: Sequence[Document], constants: Mapping[str, Any], *, notes: list[str] | None = None
) -> dict[str, Any]:
    """Merge configs, later ones over earlier ones, and fill their placeholders.

    Args:
        documents: the configs, each a mapping.
        constants: value by name (``patch_size`` or ``PATCH_SIZE``); a text is read as unquoted YAML, so ``"8"`` is 8.
        notes: gets what a user should know: arguments that fell away with their class.

    Returns:
        The merged config. Relative paths, which refer to the file that names them, have become ``Anchored`` ones: give
        the config to ``files.relativise_paths`` before writing it.

    Raises:
        ConfigError: all that is wrong: a file that is no mapping, a placeholder without a constant, a relative path
            that does not exist, an override that can't be laid over what is below.
    """
    typed = {key: plain_scalar(value) if isinstance(value, str) else value for key, value in constants.items()}
    filler = Filler(placeholder_names(typed))
    problems: list[Problem] = []
    layers = [_overlay(document, filler, problems) for document in documents]
    if problems:
        raise ConfigError(problems)
    replaced: list[ClassReplacement] = []
    merged = merge_overlays(layers, replaced=replaced)
    told, problems = class_replacement_problems(replaced)
    if problems:
        raise ConfigError(problems)
    if notes is not None:
        notes += told
    return merged


def _overlay(document: Document, filler: Filler, problems: list[Problem]) -> Overlay:
    bare = Overlay({}, (), document, ())
    if not isinstance(document.data, Mapping):
        problems.append(Problem("is no config: a mapping is wanted", document.name))
        return bare
    tree = filler.fill(document.data, lambda what, at: problems.append(bare.problem(what, at)))
    try:
        tree = anchor_paths(tree, [document.folder], name=document.name, line=document.nearest_line)
    except ConfigError as error:
        problems += error.problems
    return Overlay(tree, (), document, ())
