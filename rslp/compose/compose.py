"""Stage 1: several configs become one run config. Pure: documents in, a run config with its provenance out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rslp.compose.datasets import (
    DATA_MODULES,
    DECODERS,
    TASK,
    TASK_CLASS,
    Dataset,
    ignored_keys,
    kept_parts,
    make_dataset,
    override_problems,
)
from rslp.compose.heads import derived_heads, head_problems
from rslp.compose.layers import Layer, fold
from rslp.compose.merge import KeyPath, merge, nest, pick
from rslp.compose.modern import Change, finish, modernise, told
from rslp.compose.placeholders import Filler, placeholder_names, unused
from rslp.compose.recipe import Recipe
from rslp.compose.vocabulary import unknown_names
from rslp.errors import ConfigError, Problem
from rslp.files import Document

# Gives the tree with its relative paths made absolute: (tree, the file it is from, its place in that file).
Anchor = Callable[[Any, Document, KeyPath], Any]

_BATCH_SIZES: KeyPath = ("data", "init_args", "batch_sizes")
# What stage 1 fills in; whatever a base config holds there belongs to no dataset of this run.
_FILLED_IN: tuple[KeyPath, ...] = (DECODERS, DATA_MODULES, TASK, _BATCH_SIZES)
_KNOB_PLACES: dict[str, KeyPath] = {
    "batch_size": ("init_args", "batch_size"),
    "max_train_patches": ("init_args", "train_config", "num_patches"),
    "max_val_patches": ("init_args", "val_config", "num_patches"),
}


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
        notes: what a user should know, one line each.
    """

    tree: dict[str, Any]
    layers: tuple[Layer, ...]
    datasets: Mapping[str, tuple[str, ...]]
    derived: Mapping[KeyPath, str]
    notes: tuple[str, ...]


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
    kitchen = _Kitchen(recipe, anchor, modern=not keep_class_paths)
    # Placeholders are filled, and old names brought up to date, in each file by itself.
    base = kitchen.prepare(sources.base)
    files = [[kitchen.prepare(document, part=True) for document in documents] for documents in sources.datasets]
    local = kitchen.prepare_overrides(recipe.local_overrides, ("local_overrides",))
    own = [kitchen.prepare_overrides(entry.overrides, (*entry.at, "overrides")) for entry in recipe.entries]
    over = kitchen.prepare_overrides(recipe.global_overrides, ("global_overrides",))
    kitchen.check_constants()
    kitchen.tell_ignored([local, *own])
    # Each dataset: its files, later ones win; then the overrides for all datasets, then its own.
    datasets = kitchen.make_datasets(files, local, own)
    # The base config, the datasets put in their places, the flat keys, the global overrides.
    layers = [kitchen.emptied(base), *(part for dataset in datasets for part in dataset.placed())]
    layers += [*kitchen.knobs(datasets), over]
    tree = fold(layers)
    derived = {(*TASK, "class_path"): "the class that unites the datasets' tasks"}
    tree = merge(tree, nest({"class_path": TASK_CLASS}, TASK))
    if recipe.later_dialect:
        tree = _with_batch_sizes(tree, derived)
    tree.pop("all_dataset_info_path", None)
    if not keep_class_paths:
        tree = finish(tree, derived)
    kitchen.problems += unknown_names(tree, layers, lenient=keep_class_paths)
    kitchen.problems += [p for layer in (local, *own) for p in unknown_names(layer.tree, [layer], lenient=True)]
    kitchen.problems += head_problems(tree, layers, kitchen.notes)
    kitchen.stop_on_problems()
    # Merged heads come last: they are derived from the decoders as the overrides left them.
    if recipe.merge_heads:
        tree = derived_heads(tree, recipe, sources.info, layers=layers, derived=derived)
    named = {dataset.key: tuple(dataset.tasks.values()) for dataset in datasets}
    return RunConfig(tree, tuple(layers), named, derived, (*told(kitchen.changes), *kitchen.notes))


@dataclass
class _Kitchen:
    """What the steps of one composition share: the constants, the problems and the notes."""

    recipe: Recipe
    anchor: Anchor
    modern: bool
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)

    def __post_init__(self) -> None:
        constants = {}
        for name, value in self.recipe.constants.items():
            at = self.recipe.constant_place(name)
            constants[name] = self._anchored({at[-1]: value}, self.recipe.document, at[:-1])[at[-1]]
        self.filler = Filler(placeholder_names(constants))

    def prepare(self, document: Document, *, part: bool = False) -> Layer:
        """Turn a file into a layer: placeholders filled, paths anchored, names up to date.

        Args:
            document: the file.
            part: whether it is a dataset config, of which only parts are taken.
        """
        return self._layer(kept_parts(document.data) if part else document.data, document, ())

    def prepare_overrides(self, overrides: Mapping[str, Any], source: KeyPath) -> Layer:
        """Turn overrides of the multi-dataset config into a layer."""
        return self._layer(overrides, self.recipe.document, source)

    def tell_ignored(self, overrides: list[Layer]) -> None:
        """Tell of overrides for datasets that no run config takes over."""
        for layer in overrides:
            for at in ignored_keys(layer.tree):
                what = "has no effect, since it is not taken from a dataset config; global_overrides would reach it"
                self.notes.append(str(layer.problem(what, at)))

    def check_constants(self) -> None:
        """Tell of constants that nothing asks for; a misspelt one is an error, since its placeholder got none."""
        for name in unused(self.recipe.constants, self.filler.used):
            if name not in ("patch_size", "encoder_embedding_size", "helios_checkpoint_path"):
                at = self.recipe.constant_place(name)
                what = f"no file has the placeholder {{{name.upper()}}}, so this has no effect"
                layer = Layer({}, (), self.recipe.document, ())
                self.notes.append(str(layer.problem(what, at)))

    def make_datasets(self, files: list[list[Layer]], local: Layer, own: list[Layer]) -> list[Dataset]:
        """Join each entry's files and overrides; find names that clash."""
        datasets: list[Dataset] = []
        for entry, layers, overrides in zip(self.recipe.entries, files, own, strict=True):
            made, problems = make_dataset(entry, layers, [local, overrides])
            self.problems += problems
            if made is not None:
                self.problems += override_problems(overrides, list(made.tasks))
                datasets.append(made)
        self.stop_on_problems()
        self._check_clashes(datasets)
        every = list(dict.fromkeys(task for dataset in datasets for task in dataset.tasks))
        self.problems += override_problems(local, every)
        return datasets

    def emptied(self, base: Layer) -> Layer:
        """Take out of the base config what stage 1 fills in, and tell of what is lost."""
        tree = base.tree
        for place in _FILLED_IN:
            held = pick(tree, place)
            if held:
                what = "is filled in by stage 1; what the base config holds here is left out"
                self.notes.append(str(base.problem(what, place)))
            if held is not None:
                tree = merge(tree, nest(None, place))
        return Layer(tree, base.at, base.document, base.source, base.moved)

    def knobs(self, datasets: list[Dataset]) -> list[Layer]:
        """Turn the flat keys into layers."""
        layers = []
        for knob, value in self.recipe.knobs.items():
            if knob == "num_workers":
                places: list[KeyPath] = [("data", "init_args", "num_workers")]
            else:
                places = [(*DATA_MODULES, dataset.key, *_KNOB_PLACES[knob]) for dataset in datasets]
            layers += [Layer(value, place, self.recipe.document, (knob,)) for place in places]
        return layers

    def stop_on_problems(self) -> None:
        """Raise what was found so far."""
        if self.problems:
            raise ConfigError(dict.fromkeys(self.problems))

    def _layer(self, tree: Any, document: Document, source: KeyPath) -> Layer:
        def report(what: str, at: KeyPath) -> None:
            self.problems.append(Layer({}, (), document, ()).problem(what, at))

        filled = self.filler.fill(tree, report, source)
        layer = Layer(self._anchored(filled, document, source), (), document, source)
        return modernise(layer, self.changes) if self.modern else layer

    def _anchored(self, tree: Any, document: Document, source: KeyPath) -> Any:
        try:
            return self.anchor(tree, document, source)
        except ConfigError as error:
            self.problems += error.problems
            return tree

    def _check_clashes(self, datasets: list[Dataset]) -> None:
        seen: dict[str, Dataset] = {}
        for dataset in datasets:
            for name in dict.fromkeys((dataset.key, *dataset.tasks.values())):
                other = seen.setdefault(name, dataset)
                if other is not dataset:
                    what = f"{name!r} is a task or name of an entry before it too; give one of them a name of its own"
                    layer = Layer({}, (), self.recipe.document, ())
                    self.problems.append(layer.problem(what, dataset.entry.at))
        self.stop_on_problems()


def _with_batch_sizes(tree: dict[str, Any], derived: dict[KeyPath, str]) -> dict[str, Any]:
    """Repeat the datasets' batch sizes in the outer data module, as configs of the later dialect have them."""
    arguments = pick(tree, ("data", "init_args"))
    modules = pick(tree, DATA_MODULES)
    given = pick(arguments, ("batch_sizes",))
    if not isinstance(arguments, Mapping) or "round_robin" in arguments or not isinstance(given, Mapping | None):
        return tree
    sizes = {name: pick(module, ("init_args", "batch_size")) for name, module in modules.items()}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    derived[_BATCH_SIZES] = "the batch sizes of the datasets"
    merged: dict[str, Any] = merge(tree, nest(merge(sizes, given or {}), _BATCH_SIZES))
    return merged
