"""Notes of stage 1: parts of dataset configs that a run does not take, replaced classes, arguments without effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rslp.config.arguments import CLASS_KEYS, TOP
from rslp.config.datasets import DATA_MODULES, DECODERS, MODEL_ARGS, SPLITS, TASK
from rslp.config.merge import (
    ClassReplacement,
    Overlay,
    Pattern,
    known_arguments,
    matching,
    merge,
    nest,
    pick,
    problem_at,
    short,
)
from rslp.config.migrate import RENAMED_CLASSES
from rslp.config.multi_dataset import MultiDatasetConfig
from rslp.errors import KeyPath, Problem, dotted
from rslp.suggest import did_you_mean, nearest

# Keys of a dataset config that a run takes, with all that stands below them (True), and their parents.
_MODEL_PARTS = {"decoders": True, "loss_weights": True}
_TAKEN: Mapping[str, Any] = {"data": True, "model": {"init_args": {"model": {"init_args": _MODEL_PARTS}}}}
# The same for a single-task dataset.
_TAKEN_SINGLE = merge(_TAKEN, nest({"decoder": True}, MODEL_ARGS))
# Each key of these must have a mapping as its value: stage 1 merges those of several files.
_MAPPINGS: Mapping[str, Any] = {
    **nest({"tasks": {}, "input_mapping": {}}, ("data", "init_args", "task", "init_args")),
    **nest({"decoders": {}, "loss_weights": {}}, MODEL_ARGS),
}
# Classes that may stand at a key path.
_OWNERS: Mapping[KeyPath, tuple[str, ...]] = {
    ("model",): ("rslp.train.JointModule", "rslearn.train.lightning_module.RslearnLightningModule"),
    ("model", "init_args", "model"): ("rslp.train.JointModel", "rslearn.models.multitask.MultiTaskModel"),
}
# Top-level keys of rslearn's own program.
_RSLEARN_KEYS = (
    "load_checkpoint_mode",
    "load_checkpoint_required",
    "log_mode",
    "management_dir",
    "project_name",
    "run_description",
    "run_name",
)
_FREEZES = ("freez", "finetuning")


def unused_keys(tree: Any, *, single_task: bool) -> list[KeyPath]:
    """List the keys of a dataset config that a run does not take, the highest of each branch.

    Args:
        tree: the config.
        single_task: whether the dataset has one task without a name, so that its ``decoder`` is taken.
    """
    return list(_unused(tree, _TAKEN_SINGLE if single_task else _TAKEN, ()))


def misspelt_keys(overlay: Overlay, *, single_task: bool) -> list[Problem]:
    """Find keys that are almost those that a run takes; ``single_task`` as in ``unused_keys``."""
    misspelt = _misspelt(overlay.tree, _TAKEN_SINGLE if single_task else _TAKEN, ())
    return [overlay.problem(f"unknown key{hint}", key_path) for key_path, hint in misspelt]


def emptied(overlay: Overlay) -> list[Problem]:
    """Find where an override has null, or a single value, in place of a mapping."""
    message = "must be a mapping to lay over the one below; got "
    return [
        overlay.problem(message + ("null" if value is None else short(value)), key_path)
        for key_path, value in _not_mappings(overlay.tree, _MAPPINGS, ())
    ]


def notes_on_overrides(overlay: Overlay, *, single_task: bool) -> list[str]:
    """Note the keys of an override for datasets that have no effect, since a run does not take them."""
    message = "has no effect, since it is not taken from a dataset config; global_overrides would reach it"
    return [str(overlay.problem(message, key)) for key in unused_keys(overlay.tree, single_task=single_task)]


def notes_on_file(overlay: Overlay, base: Mapping[str, Any], *, single_task: bool) -> list[str]:
    """Note the keys of a dataset config that a run does not take: one line for known keys, one for each unknown one.

    Args:
        overlay: the dataset config, its placeholders filled.
        base: the base config; a key that has the same value there needs no note.
        single_task: as in ``unused_keys``.
    """
    keys = [
        key_path
        for key_path in unused_keys(overlay.tree, single_task=single_task)
        if not _is_same(pick(overlay.tree, key_path), pick(base, key_path))
    ]
    unknown = [key_path for key_path in keys if len(key_path) == 1 and key_path[0] not in (*TOP, *_RSLEARN_KEYS)]
    of_multi_dataset = "has no effect: this is a key of the multi-dataset config, not of a dataset config"
    notes = [
        str(
            overlay.problem(
                of_multi_dataset if key_path[0] in MultiDatasetConfig.model_fields else "unknown key, has no effect",
                key_path,
            )
        )
        for key_path in unknown
    ]
    if set_by_base := [key_path for key_path in keys if key_path not in unknown]:
        first, *others = set_by_base
        names = ", ".join([dotted(first), *(f"{dotted(key)} (line {overlay.line(key)})" for key in others)])
        verb = "stay behind: the base config sets them" if others else "stays behind: the base config sets it"
        notes.append(f"{overlay.document.name}:{overlay.line(first)}: {names} {verb} for all datasets")
    if ("trainer",) in keys:
        notes += _notes_on_callbacks(overlay, pick(base, ("trainer", "callbacks")))
    return notes


def _notes_on_callbacks(overlay: Overlay, base_callbacks: Any) -> Iterator[str]:
    callbacks = pick(overlay.tree, ("trainer", "callbacks"))
    for position, callback in enumerate(callbacks if isinstance(callbacks, list) else []):
        if callback in (base_callbacks or []):
            continue
        key_path: KeyPath = ("trainer", "callbacks", position)
        class_path = str(pick(callback, ("class_path",)))
        monitor = pick(callback, ("init_args", "monitor"))
        if monitor is not None:
            message = f"{monitor!r} is not watched: the callbacks of the base config act for all datasets"
            if "Checkpoint" in class_path:
                message = (
                    f"{monitor!r} chooses no checkpoint: best-<dataset>.ckpt goes by the primary metric of its tasks"
                )
            yield str(overlay.problem(message, (*key_path, "init_args", "monitor")))
        elif any(word in class_path.rsplit(".", 1)[-1].lower() for word in _FREEZES):
            message = "freezes nothing: the callbacks of the base config say what is frozen, for all datasets"
            yield str(overlay.problem(message, key_path))


def _unused(tree: Any, taken: Mapping[str, Any], parent: KeyPath) -> Iterator[KeyPath]:
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        below = taken.get(key)
        if below is None or (below is not True and value is not None and not isinstance(value, Mapping)):
            yield (*parent, key)
        elif below is not True:
            yield from _unused(value, below, (*parent, key))


def _misspelt(
    tree: Any, taken: Mapping[str, Any], parent: KeyPath, *, guess: bool = True
) -> Iterator[tuple[KeyPath, str]]:
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        if isinstance(taken.get(key), Mapping):
            # The arguments of a class of another project are not known here.
            foreign = "class_path" in tree and known_arguments(str(tree["class_path"])) is None
            yield from _misspelt(value, taken[key], (*parent, key), guess=not (foreign and key == "init_args"))
            continue
        if guess and key not in (known := [*taken, *_other_keys(parent)]) and nearest(key, known, 0.75):
            yield (*parent, key), did_you_mean(key, known)


def _other_keys(parent: KeyPath) -> Sequence[str]:
    """Keys below a parent that have a meaning, beside those that a run takes."""
    if not parent:
        return (*TOP, *_RSLEARN_KEYS)
    if parent[-1] != "init_args":
        return CLASS_KEYS
    return sorted({name for path in _OWNERS[parent[:-1]] for name in known_arguments(path) or ()})


def _not_mappings(tree: Any, wanted: Mapping[str, Any], parent: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    for key, below in wanted.items():
        if isinstance(tree, Mapping) and key in tree:
            if isinstance(tree[key], Mapping):
                yield from _not_mappings(tree[key], below, (*parent, key))
            elif (*parent[:1], key) != ("data", "init_args"):  # merging refuses that
                yield (*parent, key), tree[key]


def _is_same(value: Any, base_value: Any) -> bool:
    return value == base_value or (isinstance(value, str) and RENAMED_CLASSES.get(value) == base_value)


def class_replacement_problems(replaced: Sequence[ClassReplacement]) -> tuple[list[str], list[Problem]]:
    """Note dropped arguments, and refuse another class where stage 1 puts a dataset's data and tasks.

    Args:
        replaced: the overrides that name another class.

    Returns:
        Notes, and problems.
    """
    notes, problems = [], []
    for change in replaced:
        parent, last = change.key_path[:-1], change.key_path[-2:]
        if parent == DATA_MODULES or (parent[:-2] == DATA_MODULES and last == ("init_args", "task")):
            message = f"an override can't make {change.new} of a dataset's {change.old.rsplit('.', 1)[-1]}"
            problems.append(change.problem(message))
        elif change.dropped or not change.known:
            notes.append(str(change.problem(_replacement_text(change))))
    return notes, problems


def _replacement_text(change: ClassReplacement) -> str:
    kept, dropped = ", ".join(change.kept), ", ".join(change.dropped)
    text = f"{change.new} takes the place of {change.old}"
    if not change.known:
        return f"{text}; which arguments it takes is not known here, so all stay: {kept or 'there are none'}"
    return f"{text}; dropped, since it does not take them: {dropped}{kept and f'; these stay: {kept}'}"


# Stage 1 puts the datasets and their tasks here; overrides must leave mappings.
_FILLED: tuple[KeyPath, ...] = (DATA_MODULES, DECODERS, (*TASK, "init_args", "tasks"))
# Classes that the base config names, with an example of each.
_CLASSES: dict[KeyPath, str] = {
    ("data", "class_path"): "rslp.train.MultiDatasetDataModule",
    ("model", "class_path"): "rslp.train.JointModule",
}


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
    for key_path, example in _CLASSES.items():
        part = pick(tree, key_path[:-1])
        if isinstance(part, Mapping) and part.get(key_path[-1]) is None:
            message = f"is missing; the base config names the class, such as {example}"
            problems.append(overlays[0].problem(message, key_path))
    if "trainer" not in tree:
        problems.append(overlays[0].problem("is missing; the base config holds it", ("trainer",)))
    return problems


def _dropped(key_path: KeyPath, replaced: Sequence[ClassReplacement]) -> Problem | None:
    """The problem with an override that names a class without this argument, if there is one."""
    for change in reversed(replaced):
        parent = (*change.key_path, "init_args")
        lost = [name for name in change.dropped if key_path == parent or (*parent, name) == key_path[: len(parent) + 1]]
        if lost:
            return change.problem(f"{change.new} does not take {', '.join(lost)}, which stage 1 needs here")
    return None


def _emptied(tree: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    for key_path in _FILLED:
        parts = [key_path[:length] for length in range(1, len(key_path) + 1)]
        if (part := next((part for part in parts if not isinstance(pick(tree, part), Mapping)), None)) is not None:
            got = "null" if pick(tree, part) is None else short(pick(tree, part))
            yield part, f"must be a mapping, since stage 1 puts the datasets into it; got {got}"
    decoders = pick(tree, DECODERS)
    for name, decoder in decoders.items() if isinstance(decoders, Mapping) else ():
        if not isinstance(decoder, list) or not decoder:
            yield (*DECODERS, name), f"must be a list of modules, the last of which predicts; got {short(decoder)}"
        for position, module in enumerate(decoder if isinstance(decoder, list) else []):
            if not isinstance(module, Mapping) or "class_path" not in module:
                message = f"must be a module with class_path and init_args; got {short(module)}"
                yield (*DECODERS, name, position), message
    if "trainer" in tree and not isinstance(tree["trainer"], Mapping):
        yield ("trainer",), f"must be a mapping; got {short(tree['trainer'])}"


_MODULE: Pattern = (*DATA_MODULES, "*", "init_args")
_TASKS = "rslearn.train.tasks"
_DETECTION = (f"{_TASKS}.detection.DetectionTask", "rslp.helios.tasks.MarineInfraTask")
_PICTURED = (
    *_DETECTION,
    f"{_TASKS}.classification.ClassificationTask",
    f"{_TASKS}.per_pixel_regression.PerPixelRegressionTask",
    f"{_TASKS}.regression.RegressionTask",
    f"{_TASKS}.segmentation.SegmentationTask",
)
_PICTURES = "it is for pictures that rslearn draws, and a run draws none"
_UNREAD = "rslearn 0.1.19 no longer reads it"
_SHOWN = 3


@dataclass(frozen=True)
class Rule:
    """One argument without effect.

    Attributes:
        holder: key path, in a run config, of the mapping that holds it; or the class paths that take it.
        name: the argument.
        instead: why it has no effect, and what has.
        harmless: values that need no note.
    """

    holder: Pattern
    name: str
    instead: str
    harmless: tuple[Any, ...] = (None, False)

    def message(self) -> str:
        """The note on the argument."""
        return f"`{self.name}` has no effect: {self.instead}"


_CACHE = "windows are read from the sample cache; `store` of `data.init_args` says where it lies"
RULES: tuple[Rule, ...] = (
    Rule(_MODULE, "num_workers", "all datasets are read by the workers of `data.init_args.num_workers`", (None, 0)),
    Rule(_MODULE, "init_workers", "windows are listed from the sample cache's own index", (None, 0)),
    Rule(_MODULE, "name", "a dataset is called by its key in `data_modules`"),
    Rule(_MODULE, "use_in_memory_dataset", _CACHE),
    Rule(_MODULE, "use_in_memory_all_crops_dataset", _CACHE),
    Rule(_MODULE, "use_map_all_crops_dataset", _CACHE),
    Rule(_MODULE, "index_mode", "the sample cache has an index of its own, which sees every change", (None, "OFF")),
    Rule(
        (*_MODULE, SPLITS[2:]),
        "sampler",
        "an evaluation and a prediction use each sample once; only training draws by it",
    ),
    Rule(
        (*_MODULE, SPLITS),
        "num_patches",
        "rslearn 0.1.19 keeps it and reads it nowhere; `num_samples` of the split limits its windows, "
        "`per_dataset_patch_limit` of `data.init_args` the samples of an epoch",
    ),
    Rule(
        (*_MODULE, SPLITS[1:4]),
        "output_layer_name_skip_inference_if_exists",
        "only a prediction leaves out windows that have their output: set it in `predict_config`",
    ),
    Rule(
        (*_MODULE, "inputs", "*"),
        "resampling",
        "rslearn 0.1.19 reads every raster with nearest neighbour; resample when the layer is materialised",
        (None, "nearest"),
    ),
    Rule(
        _DETECTION,
        "skip_empty_examples",
        "windows without objects are trained on as background (metrics alone leave them out); give them a tag of their "
        "own to leave them out",
    ),
    Rule((*_DETECTION, f"{_TASKS}.segmentation.SegmentationTask"), "colors", _PICTURES, (None,)),
    Rule(_PICTURED, "image_bands", _PICTURES, (None,)),
    Rule(_PICTURED, "remap_values", _PICTURES, (None,)),
    Rule(
        (f"{_TASKS}.classification.ClassificationTask", f"{_TASKS}.segmentation.SegmentationTask"),
        "enable_confusion_matrix",
        "a run's metrics are numbers; a confusion matrix is none",
    ),
    Rule(("rslearn.train.transforms.normalize.Normalize",), "num_bands", _UNREAD, (None,)),
    Rule(("rslearn.train.transforms.select_bands.SelectBands",), "num_bands_per_timestep", _UNREAD, (None,)),
    Rule(MODEL_ARGS, "lazy_decode", "only the tasks of a batch's dataset are decoded in any case", (None, True)),
    Rule(("trainer",), "default_root_dir", "everything of a run lies in its run directory"),
    Rule(
        ("trainer",), "enable_autolog_hparams", "hyperparameters are in the run directory's config.yaml", (None, True)
    ),
    Rule(("trainer",), "model_registry", "checkpoints are written to the run directory"),
    Rule(("trainer",), "use_distributed_sampler", "the mixture gives each process its share"),
    Rule(("trainer", "strategy"), "init_args", "the strategy of a run adds the gradients of its processes by itself"),
)


def without_effect(tree: Any) -> list[tuple[Rule, list[KeyPath]]]:
    """The arguments in a run config that have no effect: each rule once, with the key paths where it applies."""
    result = []
    for rule in RULES:
        is_class = "." in str(rule.holder[0])
        holders = list(_of_class(tree, (), rule.holder) if is_class else matching(tree, rule.holder))
        # Any argument may be written as a class with its arguments.
        holders += [] if is_class else [(*key_path, "init_args") for key_path in holders]
        if key_paths := [(*holder, rule.name) for holder in holders if _applies(rule, pick(tree, holder))]:
            result.append((rule, key_paths))
    if isinstance(logger := pick(tree, ("trainer", "logger")), bool):
        instead = "metrics.csv is written in any case; name a logger's class_path to have one beside it"
        result.append((Rule(("trainer",), "logger", f"{str(logger).lower()}: {instead}"), [("trainer", "logger")]))
    return result


def effect_notes(tree: Any, overlays: Sequence[Overlay]) -> list[str]:
    """Notes on the arguments without effect, each at the file and line that sets it."""
    notes = []
    for rule, key_paths in without_effect(tree):
        first, *others = [problem_at(overlays, key_path, rule.message()) for key_path in key_paths]
        also = list(dict.fromkeys(f"{o.file}:{o.line}" for o in others if (o.file, o.line) != (first.file, first.line)))
        more = f" and {len(also) - _SHOWN} more" if len(also) > _SHOWN else ""
        notes.append(str(first) + (f" (also {', '.join(also[:_SHOWN])}{more})" if also else ""))
    return notes


def _applies(rule: Rule, holder: Any) -> bool:
    if not isinstance(holder, Mapping) or rule.name not in holder:
        return False
    value = holder[rule.name]
    return not any(type(value) is type(harmless) and value == harmless for harmless in rule.harmless)


def _of_class(node: Any, parent: KeyPath, classes: Pattern) -> Iterator[KeyPath]:
    """The key paths of the ``init_args`` of objects of some classes."""
    if isinstance(node, Mapping) and node.get("class_path") in classes:
        yield (*parent, "init_args")
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from _of_class(value, (*parent, key), classes)
