"""Stage 1: several configs become one run config. Pure: documents in, a run config with its provenance out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rslp.config.arguments import unknown_names
from rslp.config.datasets import (
    DATA_MODULES,
    DECODERS,
    TASK,
    TASK_CLASS,
    ComposedDataset,
    is_single,
    make_dataset,
    name_of_single,
    override_problems,
    short_form,
    used_parts,
    with_multi_task,
)
from rslp.config.merge import Accepts, any_arguments, known_arguments, merge, nest, pick
from rslp.config.migrate import Migration, finish_migration, migrate, migration_notes
from rslp.config.multi_dataset import DatasetEntry, MultiDatasetConfig
from rslp.config.notes import (
    class_replacement_problems,
    effect_notes,
    emptied,
    misspelt_keys,
    notes_on_file,
    notes_on_overrides,
)
from rslp.config.overlays import ClassReplacement, Overlay, merge_overlays, problem_at
from rslp.config.placeholders import Filler, placeholder_names, unused
from rslp.config.run_config import missing_keys
from rslp.config.shared_heads import class_faults, derived_heads, head_faults, head_problems
from rslp.errors import ConfigError, KeyPath, Problem
from rslp.io import Document

# Gives the tree with its relative paths made absolute: (tree, the file it is from, its place in that file).
Anchor = Callable[[Any, Document, KeyPath], Any]

BATCH_SIZES: KeyPath = ("data", "init_args", "batch_sizes")
CHECK_ALLOW: KeyPath = ("data", "init_args", "check_allow")
# What stage 1 fills in; whatever a base config holds there belongs to no dataset of this run.
_FILLED_IN: tuple[KeyPath, ...] = (DECODERS, DATA_MODULES, TASK, BATCH_SIZES)
_FLAT_KEY_PATHS: dict[str, KeyPath] = {
    "batch_size": ("init_args", "batch_size"),
    "max_train_patches": ("init_args", "train_config", "num_patches"),
    "max_val_patches": ("init_args", "val_config", "num_patches"),
}


@dataclass
class Composer:
    """What the steps of one composition share: the constants, the problems and the notes."""

    multi_config: MultiDatasetConfig
    anchor: Anchor
    migrates: bool
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changes: list[Migration] = field(default_factory=list)
    replaced: list[ClassReplacement] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Resolve the constants, of which some are paths."""
        constants = {}
        for name, value in self.multi_config.constants.items():
            at = self.multi_config.constant_place(name)
            constants[name] = self._anchored({at[-1]: value}, self.multi_config.document, at[:-1])[at[-1]]
        given = {**(self.multi_config.document.data.get("substitutions") or {}), **self.multi_config.document.data}
        unset = {name: self._null(name) for name, value in given.items() if value is None}
        self.filler = Filler(placeholder_names(constants), unset=placeholder_names(unset))

    def _null(self, name: str) -> str:
        document = self.multi_config.document
        return f"{document.name}:{document.nearest_line(self.multi_config.constant_place(name))} sets {name} to null"

    @property
    def accepts(self) -> Accepts:
        """Tells which arguments a class takes; of classes of another version, that is not known."""
        return known_arguments if self.migrates else any_arguments

    def prepare(self, document: Document) -> Overlay:
        """Turn a file into a layer: placeholders filled, paths anchored, names up to date."""
        return self._layer(document.data, document, ())

    def prepare_dataset(self, entry: DatasetEntry, documents: Sequence[Document]) -> list[Overlay]:
        """Turn the files of a dataset into layers with what is taken of them; a plain task becomes one by name."""
        single = self.single(entry, documents)
        if single is not None:
            task = Overlay({}, (), documents[0], ())
            what = f"becomes the task {single!r} of a MultiTask, since it is a plain one"
            self.notes.append(str(task.problem(what, ("data", "init_args", "task"))))
        return [self._layer(used_parts(document.data), document, (), single=single) for document in documents]

    def prepare_overrides(self, overrides: Mapping[str, Any], source: KeyPath, *, single: str | None = None) -> Overlay:
        """Turn overrides of the multi-dataset config into a layer."""
        return self._layer(overrides, self.multi_config.document, source, single=single)

    @staticmethod
    def single(entry: DatasetEntry, documents: Sequence[Document]) -> str | None:
        """Give the name of a dataset's plain task; None where its tasks have names of their own."""
        if not is_single([document.data for document in documents]):
            return None
        return name_of_single(entry.name, documents[0].name)

    def constant_lines(self) -> dict[str, tuple[Document, int | None]]:
        """Give where each constant stands, by its placeholder."""
        document = self.multi_config.document
        lines = {name: document.line(self.multi_config.constant_place(name)) for name in self.multi_config.constants}
        return {name: (document, line) for name, line in placeholder_names(lines).items()}

    def note_left_out(self, files: Sequence[Sequence[Document]]) -> None:
        """Find what overrides, and files that are laid over others, say in vain."""
        singles = [is_single([document.data for document in documents]) for documents in files]
        own = [((*entry.at, "overrides"), entry.overrides) for entry in self.multi_config.entries]
        given = [(("local_overrides",), self.multi_config.local_overrides), *own]
        overrides = [Overlay(tree, (), self.multi_config.document, at) for at, tree in given]
        whole = [[Overlay(document.data, (), document, ()) for document in documents] for documents in files]
        for layer, single in zip(overrides, (any(singles), *singles), strict=True):
            self.notes += notes_on_overrides(layer, single=single)
            self.problems += misspelt_keys(layer, single=single)
        self.problems += [
            problem
            for layers, single in zip(whole, singles, strict=True)
            for layer in layers
            for problem in misspelt_keys(layer, single=single)
        ]
        lost = [
            p for layers in [overrides, *(above for _, *above in whole)] for layer in layers for p in emptied(layer)
        ]
        self.problems += lost
        if lost:  # what would be found next only follows from it
            self.stop_on_problems()

    def note_unused_parts(self, files: Sequence[Sequence[Document]], base: Overlay) -> None:
        """Tell what of the dataset configs is not taken."""
        filler = Filler(self.filler.constants)
        for documents in files:
            single = is_single([document.data for document in documents])
            for document in documents:
                data = filler.fill(document.data, lambda *_: None)
                self.notes += notes_on_file(Overlay(data, (), document, ()), base.tree, single=single)

    def note_replaced_classes(self) -> None:
        """Tell what became of the arguments where an override names another class."""
        notes, problems = class_replacement_problems(self.replaced)
        self.notes += notes
        self.problems += problems

    def check_constants(self) -> None:
        """Tell of constants that nothing asks for; a misspelt one is an error, since its placeholder got none."""
        for name in unused(self.multi_config.constants, self.filler.used):
            placeholder = "CHECKPOINT_PATH" if name == "helios_checkpoint_path" else name.upper()
            what = f"no file has the placeholder {{{placeholder}}}, so this has no effect"
            layer = Overlay({}, (), self.multi_config.document, ())
            self.notes.append(str(layer.problem(what, self.multi_config.constant_place(name))))

    def make_datasets(
        self, files: list[list[Overlay]], local: list[Overlay], own: list[Overlay]
    ) -> list[ComposedDataset]:
        """Join each entry's files and overrides; a dataset that can't be made ends the composition here."""
        datasets: list[ComposedDataset] = []
        for entry, layers, above, overrides in zip(self.multi_config.entries, files, local, own, strict=True):
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

    def emptied(self, base: Overlay) -> Overlay:
        """Take out of the base config what stage 1 fills in, and tell of what is lost."""
        tree = base.tree
        for place in _FILLED_IN:
            held = pick(tree, place)
            if held:
                what = "is filled in by stage 1; what the base config holds here is left out"
                self.notes.append(str(base.problem(what, place)))
            if held is not None:
                tree = merge(tree, nest(None, place))
        return Overlay(tree, base.at, base.document, base.source, base.moved)

    def flat_keys(self, datasets: list[ComposedDataset]) -> list[Overlay]:
        """Turn the flat keys into layers."""
        layers = []
        for flat_key, value in self.multi_config.flat_keys.items():
            if flat_key == "num_workers":
                places: list[KeyPath] = [("data", "init_args", "num_workers")]
            else:
                places = [(*DATA_MODULES, dataset.key, *_FLAT_KEY_PATHS[flat_key]) for dataset in datasets]
            layers += [Overlay(value, place, self.multi_config.document, (flat_key,)) for place in places]
        return layers

    def stop_on_problems(self) -> None:
        """Raise what was found so far."""
        if self.problems:
            raise ConfigError(dict.fromkeys(self.problems))

    def _layer(self, tree: Any, document: Document, source: KeyPath, *, single: str | None = None) -> Overlay:
        def report(what: str, at: KeyPath) -> None:
            self.problems.append(Overlay({}, (), document, ()).problem(what, at))

        filled = self.filler.fill(tree, report, source)
        layer = short_form(Overlay(self._anchored(filled, document, source), (), document, source))
        layer = layer if single is None else with_multi_task(layer, single)
        return migrate(layer, self.changes, self.problems) if self.migrates else layer

    def _anchored(self, tree: Any, document: Document, source: KeyPath) -> Any:
        try:
            return self.anchor(tree, document, source)
        except ConfigError as error:
            self.problems += error.problems
            return tree

    def merged_overlays(self, layers: list[Overlay]) -> dict[str, Any]:
        """Fold the layers; what can't be appended ends the composition here."""
        try:
            return merge_overlays(layers, accepts=self.accepts, replaced=self.replaced)
        except ConfigError as error:
            self.problems += error.problems
            raise ConfigError(dict.fromkeys(self.problems)) from None

    def name_clashes(self, datasets: list[ComposedDataset]) -> bool:
        """Find names that two entries have."""
        before = len(self.problems)
        seen: dict[str, ComposedDataset] = {}
        for dataset in datasets:
            for name in dict.fromkeys((dataset.key, *dataset.tasks.values())):
                other = seen.setdefault(name, dataset)
                if other is not dataset:
                    what = f"{name!r} is a task or name of an entry before it too; give one of them a name of its own"
                    layer = Overlay({}, (), self.multi_config.document, ())
                    self.problems.append(layer.problem(what, dataset.entry.at))
        return len(self.problems) > before


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
    layers: tuple[Overlay, ...]
    datasets: Mapping[str, tuple[str, ...]]
    derived: Mapping[KeyPath, str]
    constants: Mapping[str, tuple[Document, int | None]]
    notes: tuple[str, ...]
    accepts: Accepts = known_arguments


def compose(
    multi_config: MultiDatasetConfig, sources: Sources, *, anchor: Anchor, keep_class_paths: bool = False
) -> RunConfig:
    """Compose a run config. This is the whole algorithm.

    Args:
        multi_config: the multi-dataset config.
        sources: the files it names.
        anchor: makes the relative paths of a piece absolute.
        keep_class_paths: leave class paths and arguments as the files have them, instead of bringing them up to date.

    Returns:
        The run config.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    composer = Composer(multi_config, anchor, migrates=not keep_class_paths)
    # Placeholders are filled, and old names brought up to date, in each file by itself.
    base = composer.prepare(sources.base)
    entries = [*zip(multi_config.entries, sources.datasets, strict=True)]
    files = [composer.prepare_dataset(entry, documents) for entry, documents in entries]
    singles = [composer.single(entry, documents) for entry, documents in entries]
    overrides = composer.prepare_overrides
    # For a plain task they are wrapped as its files are.
    by_single = {
        one: overrides(multi_config.local_overrides, ("local_overrides",), single=one) for one in dict.fromkeys(singles)
    }
    local = [by_single[single] for single in singles]
    own = [
        overrides(entry.overrides, (*entry.at, "overrides"), single=single)
        for entry, single in zip(multi_config.entries, singles, strict=True)
    ]
    over = composer.prepare_overrides(multi_config.global_overrides, ("global_overrides",))
    composer.check_constants()
    composer.note_left_out(sources.datasets)
    # Each dataset: its files, later ones win; then the overrides for all datasets, then its own.
    datasets = composer.make_datasets(files, local, own)
    # The base config, the datasets put in their places, the flat keys, the global overrides.
    layers = [composer.emptied(base), *(part for dataset in datasets for part in dataset.placed())]
    layers += [*composer.flat_keys(datasets), over]
    tree = composer.merged_overlays(layers)
    composer.note_replaced_classes()
    lost = missing_keys(tree, layers, composer.replaced)
    composer.problems += lost
    if lost and composer.replaced:  # what would be found next only follows from it
        composer.stop_on_problems()
    derived = {(*TASK, "class_path"): "the class that unites the datasets' tasks"}
    tree = merge(merge(tree, nest({"class_path": None}, TASK)), nest({"class_path": TASK_CLASS}, TASK))
    if multi_config.is_later_dialect:
        tree = _with_batch_sizes(tree, derived)
    tree = _with_allowed(tree, multi_config, datasets, derived)
    if tree.pop("all_dataset_info_path", None) is not None and not multi_config.merge_heads:
        what = "has no effect without merge_options.merge_heads"
        composer.notes.append(str(problem_at(layers, ("all_dataset_info_path",), what)))
    if not keep_class_paths:
        tree = finish_migration(tree, layers, derived, composer.notes)
    composer.problems += unknown_names(tree, layers, lenient=keep_class_paths)
    composer.problems += [
        p for layer in (*by_single.values(), *own) for p in unknown_names(layer.tree, [layer], lenient=True)
    ]
    if not composer.name_clashes(datasets):
        composer.problems += head_problems([*head_faults(tree), *class_faults(tree)], layers, composer.notes)
    composer.stop_on_problems()
    # Merged heads come last: they are derived from the decoders as the overrides left them.
    if multi_config.merge_heads:
        tree = derived_heads(tree, multi_config, sources.info, layers=layers, derived=derived, notes=composer.notes)
        composer.problems += head_problems(class_faults(tree), layers, composer.notes)
        composer.stop_on_problems()
    composer.note_unused_parts(sources.datasets, base)
    composer.notes += effect_notes(tree, layers)
    named = {dataset.key: tuple(dataset.tasks.values()) for dataset in datasets}
    notes = tuple(dict.fromkeys((*migration_notes([*dict.fromkeys(composer.changes)]), *composer.notes)))
    return RunConfig(tree, tuple(layers), named, derived, composer.constant_lines(), notes, composer.accepts)


def _with_allowed(
    tree: dict[str, Any],
    multi_config: MultiDatasetConfig,
    datasets: Sequence[ComposedDataset],
    derived: dict[KeyPath, str],
) -> dict[str, Any]:
    """What the check lets pass in each dataset."""
    allow = {dataset.key: (*multi_config.allow, *dataset.entry.allow) for dataset in datasets}
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
