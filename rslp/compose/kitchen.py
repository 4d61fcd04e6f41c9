"""The steps of one composition, and what they share: constants, problems, notes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rslp.compose.datasets import (
    DATA_MODULES,
    DECODERS,
    TASK,
    Dataset,
    ignored_keys,
    kept_parts,
    make_dataset,
    override_problems,
)
from rslp.compose.keys import CONSTANTS
from rslp.compose.layers import Layer, fold
from rslp.compose.merge import KeyPath, merge, nest, pick
from rslp.compose.modern import Change, modernise
from rslp.compose.placeholders import Filler, placeholder_names, unused
from rslp.compose.recipe import Recipe
from rslp.errors import ConfigError, Problem
from rslp.files import Document

# Gives the tree with its relative paths made absolute: (tree, the file it is from, its place in that file).
Anchor = Callable[[Any, Document, KeyPath], Any]

BATCH_SIZES: KeyPath = ("data", "init_args", "batch_sizes")
CHECK_ALLOW: KeyPath = ("data", "init_args", "check_allow")
# What stage 1 fills in; whatever a base config holds there belongs to no dataset of this run.
_FILLED_IN: tuple[KeyPath, ...] = (DECODERS, DATA_MODULES, TASK, BATCH_SIZES)
_KNOB_PLACES: dict[str, KeyPath] = {
    "batch_size": ("init_args", "batch_size"),
    "max_train_patches": ("init_args", "train_config", "num_patches"),
    "max_val_patches": ("init_args", "val_config", "num_patches"),
}


@dataclass
class Kitchen:
    """What the steps of one composition share: the constants, the problems and the notes."""

    recipe: Recipe
    anchor: Anchor
    modern: bool
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Resolve the constants, of which some are paths."""
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

    def constant_lines(self) -> dict[str, tuple[Document, int | None]]:
        """Give where each constant stands, by its placeholder."""
        document = self.recipe.document
        lines = {name: document.line(self.recipe.constant_place(name)) for name in self.recipe.constants}
        return {name: (document, line) for name, line in placeholder_names(lines).items()}

    def tell_ignored(self, overrides: list[Layer]) -> None:
        """Tell of overrides for datasets that no run config takes over."""
        for layer in overrides:
            for at in ignored_keys(layer.tree):
                what = "has no effect, since it is not taken from a dataset config; global_overrides would reach it"
                self.notes.append(str(layer.problem(what, at)))

    def check_constants(self) -> None:
        """Tell of constants that nothing asks for; a misspelt one is an error, since its placeholder got none."""
        for name in unused(self.recipe.constants, self.filler.used):
            if name not in CONSTANTS:
                at = self.recipe.constant_place(name)
                what = f"no file has the placeholder {{{name.upper()}}}, so this has no effect"
                layer = Layer({}, (), self.recipe.document, ())
                self.notes.append(str(layer.problem(what, at)))

    def make_datasets(self, files: list[list[Layer]], local: Layer, own: list[Layer]) -> list[Dataset]:
        """Join each entry's files and overrides; a dataset that can't be made ends the composition here."""
        datasets: list[Dataset] = []
        for entry, layers, overrides in zip(self.recipe.entries, files, own, strict=True):
            try:
                made, problems = make_dataset(entry, layers, [local, overrides])
            except ConfigError as error:
                made, problems = None, list(error.problems)
            self.problems += problems
            if made is not None:
                self.problems += override_problems(overrides, list(made.tasks))
                datasets.append(made)
        if len(datasets) < len(files):
            self.stop_on_problems()
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

    def folded(self, layers: list[Layer]) -> dict[str, Any]:
        """Fold the layers; what can't be appended ends the composition here."""
        try:
            return fold(layers)
        except ConfigError as error:
            self.problems += error.problems
            raise ConfigError(dict.fromkeys(self.problems)) from None

    def names_clash(self, datasets: list[Dataset]) -> bool:
        """Find names that two entries have."""
        before = len(self.problems)
        seen: dict[str, Dataset] = {}
        for dataset in datasets:
            for name in dict.fromkeys((dataset.key, *dataset.tasks.values())):
                other = seen.setdefault(name, dataset)
                if other is not dataset:
                    what = f"{name!r} is a task or name of an entry before it too; give one of them a name of its own"
                    layer = Layer({}, (), self.recipe.document, ())
                    self.problems.append(layer.problem(what, dataset.entry.at))
        return len(self.problems) > before
