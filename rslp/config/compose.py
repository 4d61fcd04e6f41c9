"""Stage 1: several configs become one run config. Pure: documents in, a run config with its provenance out.

A document is a config file that was read, see ``rslp.io.yaml``. An overlay is a part of one with its place in the run
config, see ``rslp.config.merge``. An entry is one dataset of the multi-dataset config.
"""

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
    is_single_task,
    make_dataset,
    override_problems,
    short_form,
    single_task_name,
    used_parts,
    with_multi_task,
)
from rslp.config.merge import (
    Accepts,
    ClassReplacement,
    Origins,
    Overlay,
    any_arguments,
    known_arguments,
    merge,
    merge_overlays,
    pick,
    problem_at,
    put,
)
from rslp.config.migrate import Migration, finish_migration, migrate, migration_notes
from rslp.config.multi_dataset import DatasetEntry, MultiDatasetConfig
from rslp.config.notes import (
    class_replacement_problems,
    effect_notes,
    emptied,
    missing_keys,
    misspelt_keys,
    notes_on_file,
    notes_on_overrides,
)
from rslp.config.placeholders import CHECKPOINT_NAMES, CHECKPOINT_PLACEHOLDER, Filler, placeholder_names, unused
from rslp.config.shared_heads import class_faults, derived_heads, head_faults, head_problems
from rslp.errors import ConfigError, KeyPath, Problem
from rslp.io import Document

# Makes the relative paths in a part of a file absolute: (the part, the file, the part's key path in it) -> the part.
Anchor = Callable[[Any, Document, KeyPath], Any]

BATCH_SIZES: KeyPath = ("data", "init_args", "batch_sizes")
CHECK_ALLOW: KeyPath = ("data", "init_args", "check_allow")
# Stage 1 fills these in; a value that a base config has there belongs to no dataset of this run.
_FILLED_IN: tuple[KeyPath, ...] = (DECODERS, DATA_MODULES, TASK, BATCH_SIZES)
# A flat key of a multi-dataset config -> key path of the value that it sets; ``*`` is the key of every dataset.
_FLAT_KEY_PATHS: dict[str, KeyPath] = {
    "num_workers": ("data", "init_args", "num_workers"),
    "batch_size": (*DATA_MODULES, "*", "init_args", "batch_size"),
    "max_train_patches": (*DATA_MODULES, "*", "init_args", "train_config", "num_patches"),
    "max_val_patches": (*DATA_MODULES, "*", "init_args", "val_config", "num_patches"),
}


@dataclass(frozen=True)
class Sources:
    """The files that a multi-dataset config names.

    Attributes:
        base: the base config.
        datasets: for each entry its files, later ones win.
        info: the file that the base config names as ``all_dataset_info_path``, with the number of outputs of each task
            and their key (``outputs_key``), for shared heads.
    """

    base: Document
    datasets: tuple[tuple[Document, ...], ...]
    info: Document | None = None


@dataclass(frozen=True)
class RunConfig:
    """A composed run config.

    Attributes:
        tree: the config itself.
        origins: the files that set its values.
        datasets: the dataset's key in ``data_modules`` -> names of its tasks.
        derived: for values that no file holds, since stage 1 computes them: key path -> how.
        constants: placeholder -> the file and line that set it.
        notes: messages to the user, one line each.
    """

    tree: dict[str, Any]
    origins: Origins
    datasets: Mapping[str, tuple[str, ...]]
    derived: Mapping[KeyPath, str]
    constants: Mapping[str, tuple[Document, int | None]]
    notes: tuple[str, ...]


def compose(
    multi_config: MultiDatasetConfig, sources: Sources, *, anchor: Anchor, keep_class_paths: bool = False
) -> RunConfig:
    """Compose a run config. This is the whole algorithm.

    Args:
        multi_config: the multi-dataset config.
        sources: the files it names.
        anchor: makes the relative paths in a part of a file absolute.
        keep_class_paths: leave class paths and arguments as the files have them, instead of migrating them.

    Raises:
        ConfigError: all problems that were found.
    """
    composer = Composer(multi_config, anchor, migrates=not keep_class_paths)
    # Placeholders are filled, and old names migrated, in each file by itself.
    base = composer.overlay(sources.base.data, sources.base, ())
    entries = [*zip(multi_config.dataset_cfgs, sources.datasets, strict=True)]
    file_overlays = [composer.prepare_dataset(entry, documents) for entry, documents in entries]
    # A single-task dataset has a task without a name, as for rslearn's SingleTaskModel. It gets a name, and becomes a
    # MultiTask of that one task; so do the overrides of the dataset.
    task_names = [single_task_name(entry.name, documents) for entry, documents in entries]
    document = multi_config.document
    # `local_overrides` are laid over every dataset, `global_overrides` over the joined config. The key None is for
    # datasets whose tasks have names already.
    local_by_task = {
        name: composer.overlay(multi_config.local_overrides, document, ("local_overrides",), single_task=name)
        for name in dict.fromkeys(task_names)
    }
    own_overrides = [
        composer.overlay(entry.overrides, document, (*multi_config.entry_path(entry), "overrides"), single_task=name)
        for entry, name in zip(multi_config.dataset_cfgs, task_names, strict=True)
    ]
    global_overrides = composer.overlay(multi_config.global_overrides, document, ("global_overrides",))
    composer.note_unused_constants()
    composer.check_keys(sources.datasets)
    # Each dataset: its files, later ones win; then the local overrides, then those of its entry.
    datasets = composer.make_datasets(file_overlays, [local_by_task[name] for name in task_names], own_overrides)
    # The base config, the datasets put in their places, the flat keys, the global overrides.
    overlays = [composer.without_filled_in(base), *(part for dataset in datasets for part in dataset.parts())]
    overlays += [*composer.flat_keys(datasets), global_overrides]
    tree = composer.merge(overlays)
    tree, derived = composer.with_derived(tree, overlays, datasets)
    composer.problems += unknown_names(tree, overlays, lenient=keep_class_paths)
    # The tree lacks the parts of overrides that a run does not take; of them only clear misspellings are reported.
    for overlay in (*local_by_task.values(), *own_overrides):
        composer.problems += unknown_names(overlay.tree, [overlay], lenient=True)
    if not composer.has_name_clashes(datasets):
        composer.problems += head_problems([*head_faults(tree), *class_faults(tree)], overlays, composer.notes)
    composer.stop_on_problems()
    # Shared heads come last: they are derived from the decoders that the overrides have led to.
    if multi_config.merge_options.merge_heads:
        tree = derived_heads(tree, multi_config, sources.info, overlays=overlays, derived=derived, notes=composer.notes)
        composer.problems += head_problems(class_faults(tree), overlays, composer.notes)
        composer.stop_on_problems()
    composer.note_unused_parts(sources.datasets, base)
    composer.notes += effect_notes(tree, overlays)
    names = {dataset.key: tuple(dataset.tasks.values()) for dataset in datasets}
    notes = tuple(dict.fromkeys((*migration_notes([*dict.fromkeys(composer.migrations)]), *composer.notes)))
    return RunConfig(tree, composer.origins, names, derived, composer.constant_lines(), notes)


@dataclass
class Composer:
    """The state that the steps of one composition share.

    Attributes:
        multi_config: the multi-dataset config.
        anchor: makes the relative paths in a part of a file absolute.
        migrates: whether class paths and arguments of earlier versions are replaced.
        problems: mistakes of the user so far; they end the composition together.
        notes: messages to the user so far, one line each.
        migrations: the names that were replaced so far.
        replaced: the overlays that name another class than those below them.
        origins: the files that set the values of the run config.
        filler: fills placeholders with the constants.
    """

    multi_config: MultiDatasetConfig
    anchor: Anchor
    migrates: bool
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    migrations: list[Migration] = field(default_factory=list)
    replaced: list[ClassReplacement] = field(default_factory=list)
    origins: Origins = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make constants that are relative paths absolute, and the filler of the placeholders from all constants."""
        document = self.multi_config.document
        constants = {}
        for name, value in self.multi_config.constants.items():
            *parents, key = self.multi_config.constant_path(name)
            constants[name] = self._anchored({key: value}, document, tuple(parents))[key]
        # A constant that is null fills nothing; a placeholder for it is reported with the constant's line.
        given = {**(document.data.get("substitutions") or {}), **document.data}
        paths = {name: self.multi_config.constant_path(name) for name, value in given.items() if value is None}
        unset = {
            name: f"{document.name}:{document.nearest_line(path)} sets {name} to null" for name, path in paths.items()
        }
        self.filler = Filler(placeholder_names(constants), unset=placeholder_names(unset))

    @property
    def accepts(self) -> Accepts:
        """Gives the arguments that a class takes; without migration none are known, since classes may be older."""
        return known_arguments if self.migrates else any_arguments

    def prepare_dataset(self, entry: DatasetEntry, documents: Sequence[Document]) -> list[Overlay]:
        """Turn a dataset's files, less the parts that a run does not take, into overlays; a single task gets a name."""
        name = single_task_name(entry.name, documents)
        if name is not None:
            message = f"becomes the task {name!r} of a MultiTask, since it is a plain one"
            self.notes.append(str(documents[0].problem(message, ("data", "init_args", "task"))))
        return [self.overlay(used_parts(document.data), document, (), single_task=name) for document in documents]

    def overlay(self, tree: Any, document: Document, source: KeyPath, *, single_task: str | None = None) -> Overlay:
        """Turn a part of a file into an overlay: placeholders filled, paths absolute, names migrated.

        Args:
            tree: the part.
            document: the file.
            source: key path of the part in the file.
            single_task: the name for the task of a single-task dataset; None for other datasets.
        """

        def report(message: str, key_path: KeyPath) -> None:
            self.problems.append(document.problem(message, key_path))

        filled = self.filler.fill(tree, report, source)
        overlay = short_form(Overlay(self._anchored(filled, document, source), (), document, source))
        overlay = overlay if single_task is None else with_multi_task(overlay, single_task)
        return migrate(overlay, self.migrations, self.problems) if self.migrates else overlay

    def _anchored(self, tree: Any, document: Document, source: KeyPath) -> Any:
        """The part of a file with absolute paths; as it was where a path leads nowhere, which becomes a problem."""
        try:
            return self.anchor(tree, document, source)
        except ConfigError as error:
            self.problems += error.problems
            return tree

    def constant_lines(self) -> dict[str, tuple[Document, int | None]]:
        """For each placeholder, the file and line of its constant."""
        document = self.multi_config.document
        lines = {name: document.line(self.multi_config.constant_path(name)) for name in self.multi_config.constants}
        return {name: (document, line) for name, line in placeholder_names(lines).items()}

    def note_unused_constants(self) -> None:
        """Note the constants that no placeholder uses; a misspelt placeholder was reported when it was to be filled."""
        for name in unused(self.multi_config.constants, self.filler.used):
            placeholder = CHECKPOINT_PLACEHOLDER if name in CHECKPOINT_NAMES else name.upper()
            message = f"no file has the placeholder {{{placeholder}}}, so this has no effect"
            problem = self.multi_config.document.problem(message, self.multi_config.constant_path(name))
            self.notes.append(str(problem))

    def check_keys(self, files: Sequence[Sequence[Document]]) -> None:
        """Note overrides that have no effect; find misspelt keys, and overrides that empty a mapping.

        Raises:
            ConfigError: an override replaces a mapping by nothing: further problems would only follow from it.
        """
        single = [is_single_task(documents) for documents in files]
        trees: list[tuple[KeyPath, Any]] = [(("local_overrides",), self.multi_config.local_overrides)]
        entries = self.multi_config.dataset_cfgs
        trees += [((*self.multi_config.entry_path(entry), "overrides"), entry.overrides) for entry in entries]
        overrides = [Overlay(tree, (), self.multi_config.document, key_path) for key_path, tree in trees]
        overlays = [[Overlay(document.data, (), document, ()) for document in documents] for documents in files]
        for override, single_task in zip(overrides, (any(single), *single), strict=True):
            self.notes += notes_on_overrides(override, single_task=single_task)
            self.problems += misspelt_keys(override, single_task=single_task)
        for dataset, single_task in zip(overlays, single, strict=True):
            for overlay in dataset:
                self.problems += misspelt_keys(overlay, single_task=single_task)
        upper = [*overrides, *(overlay for dataset in overlays for overlay in dataset[1:])]
        if problems := [problem for overlay in upper for problem in emptied(overlay)]:
            self.problems += problems
            self.stop_on_problems()

    def note_unused_parts(self, files: Sequence[Sequence[Document]], base: Overlay) -> None:
        """Note the parts of the dataset configs that the run does not take."""
        # A filler of its own: placeholders in unused parts do not make a constant used, and are no problems.
        filler = Filler(self.filler.constants)
        for documents in files:
            single_task = is_single_task(documents)
            for document in documents:
                overlay = Overlay(filler.fill(document.data, lambda *_: None), (), document, ())
                self.notes += notes_on_file(overlay, base.tree, single_task=single_task)

    def make_datasets(
        self, files: list[list[Overlay]], local: list[Overlay], own: list[Overlay]
    ) -> list[ComposedDataset]:
        """Join each entry's files and overrides.

        Args:
            files: for each entry the overlays of its files.
            local: for each entry the local overrides, in the form of its dataset.
            own: for each entry its own overrides.

        Raises:
            ConfigError: a dataset cannot be made.
        """
        datasets: list[ComposedDataset] = []
        for entry, overlays, shared, overrides in zip(self.multi_config.dataset_cfgs, files, local, own, strict=True):
            try:
                dataset, problems = make_dataset(entry, overlays, [shared, overrides], accepts=self.accepts)
            except ConfigError as error:
                dataset, problems = None, list(error.problems)
            self.problems += problems
            if dataset is not None:
                self.problems += override_problems(overrides, list(dataset.tasks))
                datasets.append(dataset)
        if len(datasets) < len(files):
            self.stop_on_problems()
        tasks = list(dict.fromkeys(task for dataset in datasets for task in dataset.tasks))
        self.problems += [problem for overlay in local for problem in override_problems(overlay, tasks)]
        return datasets

    def without_filled_in(self, base: Overlay) -> Overlay:
        """The base config without the parts that stage 1 fills in; a part that was not empty is noted."""
        tree = base.tree
        for key_path in _FILLED_IN:
            part = pick(tree, key_path)
            if part:
                message = "is filled in by stage 1; what the base config holds here is left out"
                self.notes.append(str(base.problem(message, key_path)))
            if part is not None:
                tree = put(tree, key_path, None)
        return Overlay(tree, base.target, base.document, base.source, base.moved)

    def flat_keys(self, datasets: list[ComposedDataset]) -> list[Overlay]:
        """The overlays that the flat keys, such as ``batch_size``, stand for."""
        overlays = []
        for flat_key, value in self.multi_config.flat_keys.items():
            path = _FLAT_KEY_PATHS[flat_key]
            targets = [tuple(dataset.key if key == "*" else key for key in path) for dataset in datasets]
            targets = targets if "*" in path else [path]
            overlays += [Overlay(value, target, self.multi_config.document, (flat_key,)) for target in targets]
        return overlays

    def merge(self, overlays: list[Overlay]) -> dict[str, Any]:
        """Merge the overlays, note the classes that were replaced, and find required keys that are missing.

        Raises:
            ConfigError: overlays that cannot be merged, or a replaced class that leaves a required key out.
        """
        try:
            tree = merge_overlays(overlays, accepts=self.accepts, replaced=self.replaced, origins=self.origins)
        except ConfigError as error:
            self.problems += error.problems
            raise ConfigError(dict.fromkeys(self.problems)) from None
        notes, problems = class_replacement_problems(self.replaced)
        self.notes += notes
        missing = missing_keys(tree, overlays, self.replaced)
        self.problems += [*problems, *missing]
        if missing and self.replaced:  # further problems would only follow from it
            self.stop_on_problems()
        return tree

    def with_derived(
        self, tree: dict[str, Any], overlays: list[Overlay], datasets: list[ComposedDataset]
    ) -> tuple[dict[str, Any], dict[KeyPath, str]]:
        """Add the values that no file holds.

        Returns:
            The config, and for each such value its key path and how it came about.
        """
        derived = {(*TASK, "class_path"): "the class that unites the datasets' tasks"}
        tree = put(tree, (*TASK, "class_path"), TASK_CLASS)
        if self.multi_config.has_substitutions:
            tree = _with_batch_sizes(tree, derived)
        check = self.multi_config.check
        allow = {dataset.key: [*dict.fromkeys([*check.allow, *dataset.entry.check.allow])] for dataset in datasets}
        if allow := {key: ids for key, ids in allow.items() if ids}:
            derived[CHECK_ALLOW] = "check.allow of the multi-dataset config"
            tree = put(tree, CHECK_ALLOW, merge(pick(tree, CHECK_ALLOW), allow))
        if tree.pop("all_dataset_info_path", None) is not None and not self.multi_config.merge_options.merge_heads:
            message = "has no effect without merge_options.merge_heads"
            self.notes.append(str(problem_at(overlays, ("all_dataset_info_path",), message)))
        if self.migrates:
            tree = finish_migration(tree, overlays, derived, self.notes)
        return tree, derived

    def has_name_clashes(self, datasets: list[ComposedDataset]) -> bool:
        """Report names of datasets or tasks that two entries have; returns whether there are any."""
        before = len(self.problems)
        owners: dict[str, ComposedDataset] = {}
        for dataset in datasets:
            for name in dict.fromkeys((dataset.key, *dataset.tasks.values())):
                if owners.setdefault(name, dataset) is not dataset:
                    message = (
                        f"{name!r} is a task or name of an entry before it too; give one of them a name of its own"
                    )
                    entry_path = self.multi_config.entry_path(dataset.entry)
                    self.problems.append(self.multi_config.document.problem(message, entry_path))
        return len(self.problems) > before

    def stop_on_problems(self) -> None:
        """Raise ``ConfigError`` if any problem was found so far."""
        if self.problems:
            raise ConfigError(dict.fromkeys(self.problems))


def _with_batch_sizes(tree: dict[str, Any], derived: dict[KeyPath, str]) -> dict[str, Any]:
    """Repeat the datasets' batch sizes in the data module that holds them, if the config has ``substitutions``.

    Not in a config whose old argument ``round_robin`` was kept, nor where ``batch_sizes`` is no mapping.
    """
    arguments = pick(tree, ("data", "init_args"))
    modules = pick(tree, DATA_MODULES)
    given = pick(arguments, ("batch_sizes",))
    if not isinstance(modules, Mapping) or "round_robin" in arguments or not isinstance(given, Mapping | None):
        return tree
    sizes = {name: pick(module, ("init_args", "batch_size")) for name, module in modules.items()}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    derived[BATCH_SIZES] = "the batch sizes of the datasets"
    result: dict[str, Any] = put(tree, BATCH_SIZES, {**sizes, **(given or {})})
    return result
