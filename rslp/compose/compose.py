"""Stage 1: several configs become one run config. Pure: documents in, a run config with its provenance out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rslp.compose.arguments import Accepts, known_arguments
from rslp.compose.datasets import DATA_MODULES, TASK, TASK_CLASS, Dataset
from rslp.compose.head_classes import class_faults
from rslp.compose.heads import derived_heads, head_faults, head_problems
from rslp.compose.kitchen import BATCH_SIZES, CHECK_ALLOW, Anchor, Kitchen
from rslp.compose.layers import Layer, problem_at
from rslp.compose.merge import KeyPath, merge, nest, pick
from rslp.compose.modern import finish, told
from rslp.compose.no_effect import effect_notes
from rslp.compose.recipe import Recipe
from rslp.compose.vocabulary import unknown_names
from rslp.compose.whole import missing_parts
from rslp.files import Document


@dataclass(frozen=True)
class Sources:
    """The files that a multi-dataset config names, read.

    Attributes:
        base: the base config.
        datasets: for each entry its files.
        info: the table of ``all_dataset_info_path``, when the base config names one.
    """

    base: Document
    datasets: tuple[tuple[Document, ...], ...]
    info: Document | None = None


@dataclass(frozen=True)
class RunConfig:
    """A composed run config.

    Attributes:
        tree: the config itself.
        layers: the pieces it was folded from, bottom first.
        datasets: key and tasks of each dataset.
        derived: for values that no file holds: their key path -> how they came about.
        constants: where the constants stand: placeholder -> (file, line).
        notes: what a user should know, one line each.
        accepts: gives the arguments that a class takes, as far as the config goes by them.
    """

    tree: dict[str, Any]
    layers: tuple[Layer, ...]
    datasets: Mapping[str, tuple[str, ...]]
    derived: Mapping[KeyPath, str]
    constants: Mapping[str, tuple[Document, int | None]]
    notes: tuple[str, ...]
    accepts: Accepts = known_arguments


def compose(recipe: Recipe, sources: Sources, *, anchor: Anchor, keep_class_paths: bool = False) -> RunConfig:
    """Compose a run config. This is the whole algorithm.

    Args:
        recipe: the multi-dataset config.
        sources: the files it names.
        anchor: makes the relative paths of a piece absolute.
        keep_class_paths: leave class paths and arguments as the files have them, instead of bringing them up to date.

    Returns:
        The run config.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    kitchen = Kitchen(recipe, anchor, modern=not keep_class_paths)
    # Placeholders are filled, and old names brought up to date, in each file by itself.
    base = kitchen.prepare(sources.base)
    entries = [*zip(recipe.entries, sources.datasets, strict=True)]
    files = [kitchen.prepare_dataset(entry, documents) for entry, documents in entries]
    singles = [kitchen.single(entry, documents) for entry, documents in entries]
    overrides = kitchen.prepare_overrides
    # For a plain task they are wrapped as its files are.
    by_single = {
        one: overrides(recipe.local_overrides, ("local_overrides",), single=one) for one in dict.fromkeys(singles)
    }
    local = [by_single[single] for single in singles]
    own = [
        overrides(entry.overrides, (*entry.at, "overrides"), single=single)
        for entry, single in zip(recipe.entries, singles, strict=True)
    ]
    over = kitchen.prepare_overrides(recipe.global_overrides, ("global_overrides",))
    kitchen.check_constants()
    kitchen.tell_left_out(sources.datasets)
    # Each dataset: its files, later ones win; then the overrides for all datasets, then its own.
    datasets = kitchen.make_datasets(files, local, own)
    # The base config, the datasets put in their places, the flat keys, the global overrides.
    layers = [kitchen.emptied(base), *(part for dataset in datasets for part in dataset.placed())]
    layers += [*kitchen.knobs(datasets), over]
    tree = kitchen.folded(layers)
    kitchen.tell_replaced()
    lost = missing_parts(tree, layers, kitchen.replaced)
    kitchen.problems += lost
    if lost and kitchen.replaced:  # what would be found next only follows from it
        kitchen.stop_on_problems()
    derived = {(*TASK, "class_path"): "the class that unites the datasets' tasks"}
    tree = merge(merge(tree, nest({"class_path": None}, TASK)), nest({"class_path": TASK_CLASS}, TASK))
    if recipe.later_dialect:
        tree = _with_batch_sizes(tree, derived)
    tree = _with_allowed(tree, recipe, datasets, derived)
    if tree.pop("all_dataset_info_path", None) is not None and not recipe.merge_heads:
        what = "has no effect without merge_options.merge_heads"
        kitchen.notes.append(str(problem_at(layers, ("all_dataset_info_path",), what)))
    if not keep_class_paths:
        tree = finish(tree, layers, derived, kitchen.notes)
    kitchen.problems += unknown_names(tree, layers, lenient=keep_class_paths)
    kitchen.problems += [
        p for layer in (*by_single.values(), *own) for p in unknown_names(layer.tree, [layer], lenient=True)
    ]
    if not kitchen.names_clash(datasets):
        kitchen.problems += head_problems([*head_faults(tree), *class_faults(tree)], layers, kitchen.notes)
    kitchen.stop_on_problems()
    # Merged heads come last: they are derived from the decoders as the overrides left them.
    if recipe.merge_heads:
        tree = derived_heads(tree, recipe, sources.info, layers=layers, derived=derived, notes=kitchen.notes)
        kitchen.problems += head_problems(class_faults(tree), layers, kitchen.notes)
        kitchen.stop_on_problems()
    kitchen.tell_of_files(sources.datasets, base)
    kitchen.notes += effect_notes(tree, layers)
    named = {dataset.key: tuple(dataset.tasks.values()) for dataset in datasets}
    notes = tuple(dict.fromkeys((*told([*dict.fromkeys(kitchen.changes)]), *kitchen.notes)))
    return RunConfig(tree, tuple(layers), named, derived, kitchen.constant_lines(), notes, kitchen.accepts)


def _with_allowed(
    tree: dict[str, Any], recipe: Recipe, datasets: Sequence[Dataset], derived: dict[KeyPath, str]
) -> dict[str, Any]:
    """What the check lets pass in each dataset."""
    allow = {dataset.key: (*recipe.allow, *dataset.entry.allow) for dataset in datasets}
    ids = {name: list(dict.fromkeys(own)) for name, own in allow.items() if own}
    if not ids:
        return tree
    derived[CHECK_ALLOW] = "check.allow of the multi-dataset config"
    merged: dict[str, Any] = merge(tree, nest(ids, CHECK_ALLOW))
    return merged


def _with_batch_sizes(tree: dict[str, Any], derived: dict[KeyPath, str]) -> dict[str, Any]:
    """Repeat the datasets' batch sizes in the outer data module, as configs of the later dialect have them."""
    arguments = pick(tree, ("data", "init_args"))
    modules = pick(tree, DATA_MODULES)
    given = pick(arguments, ("batch_sizes",))
    if not isinstance(modules, Mapping) or "round_robin" in arguments or not isinstance(given, Mapping | None):
        return tree
    sizes = {name: pick(module, ("init_args", "batch_size")) for name, module in modules.items()}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    derived[BATCH_SIZES] = "the batch sizes of the datasets"
    merged: dict[str, Any] = merge(tree, nest(merge(sizes, given or {}), BATCH_SIZES))
    return merged
