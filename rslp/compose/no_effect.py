"""Arguments that a run config may hold and no joint run acts on: what has no effect, and what to use instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rslp.compose.datasets import DATA_MODULES, MODEL_ARGS
from rslp.compose.layers import Layer, problem_at
from rslp.compose.merge import KeyPath, pick

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


def effect_notes(tree: Any, layers: Sequence[Layer]) -> list[str]:
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
