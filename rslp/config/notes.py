"""What stage 1 does not carry over, what an override replaced, and arguments that no joint run acts on: a note each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rslp.config.arguments import CLASS_KEYS, TOP
from rslp.config.datasets import DATA_MODULES, MODEL_ARGS
from rslp.config.merge import ClassChange, known_arguments, pick, short
from rslp.config.migrate import RENAMED_CLASSES
from rslp.config.overlays import ClassReplacement, Overlay, problem_at
from rslp.config.schema import KEYS
from rslp.errors import KeyPath, Problem, dotted
from rslp.suggest import did_you_mean, nearest

# The keys that are taken, with all that stands below them (True), and the way there.
_TAKEN: Mapping[str, Any] = {
    "data": True,
    "model": {"init_args": {"model": {"init_args": {"decoders": True, "loss_weights": True}}}},
}
_SINGLE: Mapping[str, Any] = {
    "data": True,
    "model": {"init_args": {"model": {"init_args": {"decoder": True, "decoders": True, "loss_weights": True}}}},
}
# Below these, only mappings make sense: stage 1 lays those of several files over each other.
_MAPPINGS: Mapping[str, Any] = {
    "data": {"init_args": {"task": {"init_args": {"tasks": {}, "input_mapping": {}}}}},
    "model": {"init_args": {"model": {"init_args": {"decoders": {}, "loss_weights": {}}}}},
}
_OWNERS: Mapping[KeyPath, tuple[str, ...]] = {
    ("model",): ("rslp.train.JointModule", "rslearn.train.lightning_module.RslearnLightningModule"),
    ("model", "init_args", "model"): ("rslp.train.JointModel", "rslearn.models.multitask.MultiTaskModel"),
}
# What rslearn's own program reads at the top level.
_OF_RSLEARN = (
    "load_checkpoint_mode",
    "load_checkpoint_required",
    "log_mode",
    "management_dir",
    "project_name",
    "run_description",
    "run_name",
)
_FREEZES = ("freez", "finetuning")


def keys_left_out(tree: Any, *, single: bool) -> list[KeyPath]:
    """List the keys of a dataset config that stage 1 does not take, the highest of each.

    Args:
        tree: the config.
        single: whether the dataset has one plain task, so that its ``decoder`` is taken.
    """
    return list(_left_out(tree, _SINGLE if single else _TAKEN, ()))


def misspelt_keys(layer: Overlay, *, single: bool) -> list[Problem]:
    """Find keys that are almost those that stage 1 takes; arguments as in ``keys_left_out``."""
    found = _misspelt(layer.tree, _SINGLE if single else _TAKEN, ())
    return [layer.problem(f"unknown key{hint}", at) for at, hint in found]


def emptied(layer: Overlay) -> list[Problem]:
    """Find where an override puts nothing, or a single value, in place of a mapping."""
    return [
        layer.problem(
            f"must be a mapping to lay over the one below; got {'null' if value is None else short(value)}", at
        )
        for at, value in _not_mappings(layer.tree, _MAPPINGS, ())
    ]


def notes_on_overrides(layer: Overlay, *, single: bool) -> list[str]:
    """Tell of overrides for datasets that are not taken from a dataset config."""
    what = "has no effect, since it is not taken from a dataset config; global_overrides would reach it"
    return [str(layer.problem(what, at)) for at in keys_left_out(layer.tree, single=single)]


def notes_on_file(layer: Overlay, base: Mapping[str, Any], *, single: bool) -> list[str]:
    """Tell what of a dataset config is not taken: a line for all that the base config sets, one for each surprise.

    Args:
        layer: the dataset config, its placeholders filled.
        base: the base config; a key that has the same value there needs no note.
        single: as in ``keys_left_out``.
    """
    keys = [
        at for at in keys_left_out(layer.tree, single=single) if not _is_alike(pick(layer.tree, at), pick(base, at))
    ]
    strange = [at for at in keys if len(at) == 1 and at[0] not in (*TOP, *_OF_RSLEARN)]
    notes = [str(layer.problem(_unknown(at[0]), at)) for at in strange]
    if set_by_base := [at for at in keys if at not in strange]:
        first, *others = set_by_base
        names = ", ".join([dotted(first), *(f"{dotted(at)} (line {layer.line(at)})" for at in others)])
        verb = "stay behind: the base config sets them" if others else "stays behind: the base config sets it"
        notes.append(f"{layer.document.name}:{layer.line(first)}: {names} {verb} for all datasets")
    if ("trainer",) in keys:
        notes += _on_callbacks(layer, pick(base, ("trainer", "callbacks")))
    return notes


def _unknown(key: Any) -> str:
    if key in KEYS:
        return "has no effect: this is a key of the multi-dataset config, not of a dataset config"
    return "unknown key, has no effect"


def _on_callbacks(layer: Overlay, of_base: Any) -> Iterator[str]:
    callbacks = pick(layer.tree, ("trainer", "callbacks"))
    for position, callback in enumerate(callbacks if isinstance(callbacks, list) else []):
        at: KeyPath = ("trainer", "callbacks", position)
        path = str(pick(callback, ("class_path",)))
        monitor = pick(callback, ("init_args", "monitor"))
        if callback in (of_base or []):
            continue
        if monitor is not None and "Checkpoint" in path:
            what = f"{monitor!r} chooses no checkpoint: best-<dataset>.ckpt goes by the primary metric of its tasks"
            yield str(layer.problem(what, (*at, "init_args", "monitor")))
        elif monitor is not None:
            what = f"{monitor!r} is not watched: the callbacks of the base config act for all datasets"
            yield str(layer.problem(what, (*at, "init_args", "monitor")))
        elif any(word in path.rsplit(".", 1)[-1].lower() for word in _FREEZES):
            what = "freezes nothing: the callbacks of the base config say what is frozen, for all datasets"
            yield str(layer.problem(what, at))


def _left_out(tree: Any, taken: Mapping[str, Any], at: KeyPath) -> Iterator[KeyPath]:
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        below = taken.get(key)
        if below is None or (below is not True and value is not None and not isinstance(value, Mapping)):
            yield (*at, key)
        elif below is not True:
            yield from _left_out(value, below, (*at, key))


def _misspelt(tree: Any, taken: Mapping[str, Any], at: KeyPath, *, guess: bool = True) -> Iterator[tuple[KeyPath, str]]:
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        if isinstance(taken.get(key), Mapping):
            # The arguments of a class of another project are not ours to guess.
            foreign = "class_path" in tree and known_arguments(str(tree["class_path"])) is None
            yield from _misspelt(value, taken[key], (*at, key), guess=not (foreign and key == "init_args"))
        elif guess and key not in taken and key not in (known := _known(at)) and nearest(key, [*taken, *known], 0.75):
            yield (*at, key), did_you_mean(key, [*taken, *known])


def _known(at: KeyPath) -> Sequence[str]:
    """Keys that mean something beside those that are taken."""
    if not at:
        return (*TOP, *_OF_RSLEARN)
    if at[-1] != "init_args":
        return CLASS_KEYS
    return sorted({name for path in _OWNERS[at[:-1]] for name in known_arguments(path) or ()})


def _not_mappings(tree: Any, wanted: Mapping[str, Any], at: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    for key, below in wanted.items():
        if isinstance(tree, Mapping) and key in tree:
            if isinstance(tree[key], Mapping):
                yield from _not_mappings(tree[key], below, (*at, key))
            elif (*at[:1], key) != ("data", "init_args"):  # merging refuses that already
                yield (*at, key), tree[key]


def _is_alike(value: Any, of_base: Any) -> bool:
    return value == of_base or (isinstance(value, str) and RENAMED_CLASSES.get(value) == of_base)


def class_replacement_problems(replaced: Sequence[ClassReplacement]) -> tuple[list[str], list[Problem]]:
    """Tell which arguments went, and refuse another class where stage 1 puts a dataset's data and tasks.

    Args:
        replaced: the overrides that name another class.

    Returns:
        Notes, and what is wrong.
    """
    notes, problems = [], []
    for one in replaced:
        change = one.change
        of_dataset = change.at[:-1] == DATA_MODULES
        of_task = change.at[:-3] == DATA_MODULES and change.at[-2:] == ("init_args", "task")
        if of_dataset or of_task:
            what = f"an override can't make {change.new} of a dataset's {change.old.rsplit('.', 1)[-1]}"
            problems.append(one.problem(what))
        elif change.dropped or not change.known:
            notes.append(str(one.problem(_replacement_text(change))))
    return notes, problems


def _replacement_text(change: ClassChange) -> str:
    kept, dropped = ", ".join(change.kept), ", ".join(change.dropped)
    what = f"{change.new} takes the place of {change.old}"
    if not change.known:
        return f"{what}; which arguments it takes is not known here, so all stay: {kept or 'there are none'}"
    return f"{what}; dropped, since it does not take them: {dropped}{kept and f'; these stay: {kept}'}"


# Keys from the root; ``*`` is any key, a tuple any of its keys.
Pattern = tuple[str | int | tuple[str, ...], ...]
_MODULE: Pattern = (*DATA_MODULES, "*", "init_args")
_SPLITS = ("default_config", "train_config", "val_config", "test_config", "predict_config")
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
        at: where what holds it stands in a run config; or the class paths that take it.
        name: the argument.
        instead: why it has no effect, and what has.
        harmless: values that ask for nothing.
    """

    at: Pattern
    name: str
    instead: str
    harmless: tuple[Any, ...] = (None, False)

    def says(self) -> str:
        """The note on it."""
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
        (*_MODULE, _SPLITS),
        "sampler",
        "the mixture draws the samples: set `sample_mode`, `per_dataset_patch_limit` or `steps_per_epoch` of "
        "`data.init_args`",
    ),
    Rule(
        (*_MODULE, _SPLITS),
        "num_patches",
        "rslearn 0.1.19 keeps it and reads it nowhere; `num_samples` of the split limits its windows, "
        "`per_dataset_patch_limit` of `data.init_args` the samples of an epoch",
    ),
    Rule(
        (*_MODULE, _SPLITS[1:4]),
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
    """The arguments in a run config that have no effect, each kind once, with all its places."""
    found = []
    for rule in RULES:
        holders = _of_class(tree, (), rule.at) if "." in str(rule.at[0]) else _matching(tree, (), rule.at)
        places = [(*at, rule.name) for at, held in holders if rule.name in held and not _asks_nothing(rule, held)]
        if places:
            found.append((rule, places))
    if isinstance(logger := pick(tree, ("trainer", "logger")), bool):
        instead = "metrics.csv is written in any case; name a logger's class_path to have one beside it"
        found.append((Rule(("trainer",), "logger", f"{str(logger).lower()}: {instead}"), [("trainer", "logger")]))
    return found


def effect_notes(tree: Any, layers: Sequence[Overlay]) -> list[str]:
    """The same as notes of stage 1, each at the file and line that says it."""
    notes = []
    for rule, places in without_effect(tree):
        first, *others = [problem_at(layers, at, rule.says()) for at in places]
        also = list(dict.fromkeys(f"{o.file}:{o.line}" for o in others if (o.file, o.line) != (first.file, first.line)))
        more = f" and {len(also) - _SHOWN} more" if len(also) > _SHOWN else ""
        notes.append(str(first) + (f" (also {', '.join(also[:_SHOWN])}{more})" if also else ""))
    return notes


def _asks_nothing(rule: Rule, held: Mapping[Any, Any]) -> bool:
    value = held[rule.name]
    return any(type(value) is type(one) and value == one for one in rule.harmless)


def _matching(node: Any, at: KeyPath, pattern: Pattern) -> Iterator[tuple[KeyPath, Mapping[Any, Any]]]:
    if not isinstance(node, Mapping):
        return
    if not pattern:
        yield at, node
        # Any argument may be written as a class with its arguments.
        if isinstance(arguments := node.get("init_args"), Mapping):
            yield (*at, "init_args"), arguments
        return
    wanted = pattern[0]
    for key in [key for key in node if wanted == "*" or key == wanted or (isinstance(wanted, tuple) and key in wanted)]:
        yield from _matching(node[key], (*at, key), pattern[1:])


def _of_class(node: Any, at: KeyPath, classes: Pattern) -> Iterator[tuple[KeyPath, Mapping[Any, Any]]]:
    if isinstance(node, Mapping) and node.get("class_path") in classes and isinstance(node.get("init_args"), Mapping):
        yield (*at, "init_args"), node["init_args"]
    parts = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, part in parts:
        yield from _of_class(part, (*at, key), classes)
