"""The steps of one composition, and what they share: constants, problems, notes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rslp.compose.arguments import Accepts, any_arguments, known_arguments
from rslp.compose.datasets import (
    DATA_MODULES,
    DECODERS,
    TASK,
    Dataset,
    kept_parts,
    make_dataset,
    override_problems,
)
from rslp.compose.forms import is_single, name_of_single, spelt_short, with_multi_task
from rslp.compose.layers import Layer, Replaced, fold
from rslp.compose.left_out import emptied, misspelt, notes_on_file, notes_on_overrides
from rslp.compose.merge import KeyPath, merge, nest, pick
from rslp.compose.modern import Change, modernise
from rslp.compose.placeholders import Filler, placeholder_names, unused
from rslp.compose.recipe import Entry, Recipe
from rslp.compose.replaced import on_replaced
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
    replaced: list[Replaced] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Resolve the constants, of which some are paths."""
        constants = {}
        for name, value in self.recipe.constants.items():
            at = self.recipe.constant_place(name)
            constants[name] = self._anchored({at[-1]: value}, self.recipe.document, at[:-1])[at[-1]]
        given = {**(self.recipe.document.data.get("substitutions") or {}), **self.recipe.document.data}
        unset = {name: self._null(name) for name, value in given.items() if value is None}
        self.filler = Filler(placeholder_names(constants), unset=placeholder_names(unset))

    def _null(self, name: str) -> str:
        document = self.recipe.document
        return f"{document.name}:{document.nearest_line(self.recipe.constant_place(name))} sets {name} to null"

    @property
    def accepts(self) -> Accepts:
        """Tells which arguments a class takes; of classes of another version, that is not known."""
        return known_arguments if self.modern else any_arguments

    def prepare(self, document: Document) -> Layer:
        """Turn a file into a layer: placeholders filled, paths anchored, names up to date."""
        return self._layer(document.data, document, ())

    def prepare_dataset(self, entry: Entry, documents: Sequence[Document]) -> list[Layer]:
        """Turn the files of a dataset into layers with what is taken of them; a plain task becomes one by name."""
        single = self.single(entry, documents)
        if single is not None:
            task = Layer({}, (), documents[0], ())
            what = f"becomes the task {single!r} of a MultiTask, since it is a plain one"
            self.notes.append(str(task.problem(what, ("data", "init_args", "task"))))
        return [self._layer(kept_parts(document.data), document, (), single=single) for document in documents]

    def prepare_overrides(self, overrides: Mapping[str, Any], source: KeyPath, *, single: str | None = None) -> Layer:
        """Turn overrides of the multi-dataset config into a layer."""
        return self._layer(overrides, self.recipe.document, source, single=single)

    @staticmethod
    def single(entry: Entry, documents: Sequence[Document]) -> str | None:
        """Give the name of a dataset's plain task; None where its tasks have names of their own."""
        if not is_single([document.data for document in documents]):
            return None
        return name_of_single(entry.name, documents[0].name)

    def constant_lines(self) -> dict[str, tuple[Document, int | None]]:
        """Give where each constant stands, by its placeholder."""
        document = self.recipe.document
        lines = {name: document.line(self.recipe.constant_place(name)) for name in self.recipe.constants}
        return {name: (document, line) for name, line in placeholder_names(lines).items()}

    def tell_left_out(self, files: Sequence[Sequence[Document]]) -> None:
        """Find what overrides, and files that are laid over others, say in vain."""
        singles = [is_single([document.data for document in documents]) for documents in files]
        own = [((*entry.at, "overrides"), entry.overrides) for entry in self.recipe.entries]
        given = [(("local_overrides",), self.recipe.local_overrides), *own]
        overrides = [Layer(tree, (), self.recipe.document, at) for at, tree in given]
        whole = [[Layer(document.data, (), document, ()) for document in documents] for documents in files]
        for layer, single in zip(overrides, (any(singles), *singles), strict=True):
            self.notes += notes_on_overrides(layer, single=single)
            self.problems += misspelt(layer, single=single)
        self.problems += [
            problem
            for layers, single in zip(whole, singles, strict=True)
            for layer in layers
            for problem in misspelt(layer, single=single)
        ]
        lost = [
            p for layers in [overrides, *(above for _, *above in whole)] for layer in layers for p in emptied(layer)
        ]
        self.problems += lost
        if lost:  # what would be found next only follows from it
            self.stop_on_problems()

    def tell_of_files(self, files: Sequence[Sequence[Document]], base: Layer) -> None:
        """Tell what of the dataset configs is not taken."""
        filler = Filler(self.filler.constants)
        for documents in files:
            single = is_single([document.data for document in documents])
            for document in documents:
                data = filler.fill(document.data, lambda *_: None)
                self.notes += notes_on_file(Layer(data, (), document, ()), base.tree, single=single)

    def tell_replaced(self) -> None:
        """Tell what became of the arguments where an override names another class."""
        notes, problems = on_replaced(self.replaced)
        self.notes += notes
        self.problems += problems

    def check_constants(self) -> None:
        """Tell of constants that nothing asks for; a misspelt one is an error, since its placeholder got none."""
        for name in unused(self.recipe.constants, self.filler.used):
            placeholder = "CHECKPOINT_PATH" if name == "helios_checkpoint_path" else name.upper()
            what = f"no file has the placeholder {{{placeholder}}}, so this has no effect"
            layer = Layer({}, (), self.recipe.document, ())
            self.notes.append(str(layer.problem(what, self.recipe.constant_place(name))))

    def make_datasets(self, files: list[list[Layer]], local: list[Layer], own: list[Layer]) -> list[Dataset]:
        """Join each entry's files and overrides; a dataset that can't be made ends the composition here."""
        datasets: list[Dataset] = []
        for entry, layers, above, overrides in zip(self.recipe.entries, files, local, own, strict=True):
            try:
                made, problems = make_dataset(entry, layers, [above, overrides], accepts=self.accepts)
            except ConfigError as error:
                made, problems = None, list(error.problems)
            self.problems += problems
            if made is not None:
                self.problems += override_problems(overrides, list(made.tasks))
                datasets.append(made)
        if len(datasets) < len(files):
            self.stop_on_problems()
        every = list(dict.fromkeys(task for dataset in datasets for task in dataset.tasks))
        self.problems += [problem for layer in local for problem in override_problems(layer, every)]
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

    def _layer(self, tree: Any, document: Document, source: KeyPath, *, single: str | None = None) -> Layer:
        def report(what: str, at: KeyPath) -> None:
            self.problems.append(Layer({}, (), document, ()).problem(what, at))

        filled = self.filler.fill(tree, report, source)
        layer = spelt_short(Layer(self._anchored(filled, document, source), (), document, source))
        layer = layer if single is None else with_multi_task(layer, single)
        return modernise(layer, self.changes, self.problems) if self.modern else layer

    def _anchored(self, tree: Any, document: Document, source: KeyPath) -> Any:
        try:
            return self.anchor(tree, document, source)
        except ConfigError as error:
            self.problems += error.problems
            return tree

    def folded(self, layers: list[Layer]) -> dict[str, Any]:
        """Fold the layers; what can't be appended ends the composition here."""
        try:
            return fold(layers, accepts=self.accepts, replaced=self.replaced)
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
