"""One dataset for the checks: its folder, its arguments in the run config, its transforms, its windows by split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from rslearn.dataset import Dataset, Window
from rslearn.dataset.window import get_layer_and_group_from_dir_name
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.dataset import DataInput, SplitConfig
from rslearn.train.tasks import Task
from rslearn.train.tasks.multi_task import MultiTask
from rslearn.train.transforms.adaptive_pooling import AdaptivePooling
from rslearn.train.transforms.crop import Crop
from rslearn.train.transforms.flip import Flip
from rslearn.train.transforms.pad import Pad
from rslearn.train.transforms.resize import Resize

from rslp import upstream
from rslp.check.encoder import ConfiguredEncoder
from rslp.check.findings import Finding, listed, warning
from rslp.config import pick
from rslp.data.samples import open_dataset
from rslp.errors import DataError, KeyPath

SPLITS = ("train", "val", "test")
# Transforms that change which ground a pixel covers, and those that cover the same ground with more or fewer pixels.
MOVING, SCALING = (Flip, Crop, Pad), (Resize, AdaptivePooling)
GEOMETRIC = MOVING + SCALING
_LISTING_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError)


@runtime_checkable
class Normaliser(Protocol):
    """A transform that normalises bands; ``band_names`` has for each modality its bands in order."""

    band_names: dict[str, list[str]]


@dataclass(frozen=True)
class DatasetView:
    """One dataset and its part of the run config.

    Attributes:
        name: its key in the run config.
        at: key path of its data module's arguments.
        config: these arguments.
        module: rslearn's data module made from them.
        dataset: the dataset on disk.
        encoder: the run's encoder; None if the table of encoders does not have it.
    """

    name: str
    at: KeyPath
    config: Mapping[str, Any]
    module: RslearnDataModule
    dataset: Dataset
    encoder: ConfiguredEncoder | None = None

    def split(self, name: str) -> SplitConfig:
        """The settings of a split, merged with the default ones."""
        return upstream.split_config(self.module, name)

    @property
    def tasks(self) -> dict[str, tuple[Task, dict[str, str], KeyPath]]:
        """For each task's name the task, its mapping of inputs, and the key path of its arguments."""
        key_path = (*self.at, "task", "init_args")
        task = self.module.task
        if not isinstance(task, MultiTask):
            return {self.name: (task, {name: name for name in self.module.inputs}, key_path)}
        return {
            name: (subtask, dict(task.input_mapping.get(name, {})), (*key_path, "tasks", name, "init_args"))
            for name, subtask in task.tasks.items()
        }

    def transforms(self, split: str) -> list[tuple[torch.nn.Module, KeyPath]]:
        """The transforms of a split, each with the key path of its arguments."""
        key = f"{split}_config" if pick(self.config, (f"{split}_config", "transforms")) else "default_config"
        transforms = enumerate(self.split(split).transforms or [])
        return [(transform, (*self.at, key, "transforms", i, "init_args")) for i, transform in transforms]

    def normalisers(self, split: str) -> list[tuple[Normaliser, KeyPath]]:
        """The normalisations of a split, each with the key path of its arguments."""
        return [(transform, key) for transform, key in self.transforms(split) if isinstance(transform, Normaliser)]

    def changes_values(self, name: str) -> bool:
        """Whether a transform of the training split changes the values or the bands of an input."""
        transforms = [transform for transform, _ in self.transforms("train") if not isinstance(transform, GEOMETRIC)]
        return any(name in _changed_inputs(transform) for transform in transforms)


def _changed_inputs(transform: torch.nn.Module) -> set[str]:
    names = [*(getattr(transform, "selectors", None) or ()), getattr(transform, "output_selector", None)]
    names += getattr(transform, "band_names", None) or ()
    return {str(name).removeprefix("input/") for name in names}


def open_view(
    name: str,
    *,
    at: KeyPath,
    config: Mapping[str, Any],
    module: RslearnDataModule,
    encoder: ConfiguredEncoder | None = None,
) -> DatasetView | Finding:
    """Open a dataset's folder; a finding if it can't be opened."""
    try:
        return DatasetView(name, at, config, module, open_dataset(name, module), encoder)
    except DataError as error:
        return Finding(" ".join(str(error).split()), (*at, "path"), id="folder")


class _ListedOnce:
    """A dataset that reads the metadata of its windows once for all splits.

    Attributes:
        strays: the folders among the windows that are no windows.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._windows: dict[tuple[tuple[str, tuple[str, ...]], ...], list[Window]] = {}
        self.strays: dict[str, None] = {}

    def load_windows(self, **selection: Sequence[str]) -> list[Window]:
        """The windows of some groups and names, or all; listed once for each selection."""
        key = tuple((name, tuple(values)) for name, values in sorted(selection.items()))
        if key not in self._windows:
            self._windows[key], strays = upstream.load_windows(self._dataset, **selection)
            self.strays |= dict.fromkeys(strays)
        return self._windows[key]


def list_splits(view: DatasetView) -> tuple[dict[str, list[Window]], list[Finding]]:
    """List the windows of each split as the run will list them; an empty split is an error.

    The test split is listed only if the config has a ``test_config``.
    """
    listed_once = _ListedOnce(view.dataset)
    dataset = cast(Dataset, listed_once)
    windows: dict[str, list[Window]] = {}
    findings: list[Finding] = []
    for split in SPLITS if pick(view.config, ("test_config",)) else SPLITS[:2]:
        config = view.split(split)
        labels = not config.get_skip_targets()
        inputs = {name: spec for name, spec in view.module.inputs.items() if labels or not spec.is_target}
        try:
            windows[split] = upstream.list_windows(dataset, inputs, config)
            findings += _lacking(view, dataset, split, inputs=inputs, count=len(windows[split]))
        except (*_LISTING_ERRORS, DataError) as error:
            reason = error if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
            message = f"dataset {view.name!r}: its windows can't be listed: {reason}"
            return windows, [*findings, Finding(message, (*view.at, "path"), id="folder")]
    if listed_once.strays:
        message = f"left out, being no windows (they have no metadata.json): {listed(listed_once.strays)}"
        findings.append(warning(f"dataset {view.name!r}: {message}", (*view.at, "path"), id="stray"))
    return windows, findings


def _lacking(
    view: DatasetView, dataset: Dataset, split: str, *, inputs: dict[str, DataInput], count: int
) -> list[Finding]:
    """Find out why a split has no window, or fewer (``count``) than its tags select."""
    config = view.split(split)
    unlimited = SplitConfig.merge_and_validate([config])
    unlimited.num_samples = None
    selected = upstream.list_windows(dataset, {}, unlimited)
    findings = _misspelt_tags(view, dataset, split)
    if count and count == min(len(selected), config.num_samples or len(selected)):
        return findings
    lacking = {
        name: len(selected) - len(upstream.list_windows(dataset, {name: spec}, unlimited))
        for name, spec in inputs.items()
    }
    worst = max(lacking, key=lambda name: lacking[name], default=None)
    who = f"dataset {view.name!r}, split {split!r}: "
    if worst and lacking[worst]:
        spec, key_path = view.module.inputs[worst], (*view.at, "inputs", worst, "layers")
        message = f"{lacking[worst]} of {len(selected)} windows lack a layer of input {worst!r} "
        message += f"({listed(spec.layers)}){_unmarked(selected, spec)}"
        if count:
            return [*findings, warning(who + message, key_path, id="layer-lacking")]
        return [Finding(f"{who}no windows are left: {message}", key_path, id="split-empty")]
    if count:
        return findings
    every = dataset.load_windows()
    message = f"no windows: groups {config.groups}, names {config.names}, tags {config.tags} select 0 of {len(every)}"
    key_path = (*view.at, _split_key(view, split))
    return [Finding(f"{who}{message}{_existing_values(every, config)}", key_path, id="split-empty")]


def _unmarked(windows: Sequence[Window], spec: DataInput) -> str:
    """The end of a message that counts layers which are on disk and which rslearn takes for unfinished."""
    names = [get_layer_and_group_from_dir_name(folder)[0] for folder in spec.layers]
    layers = [(w.window_root / "layers" / name, w.is_layer_completed(name)) for w in windows for name in names]
    unmarked = [folder for folder, completed in layers if not completed and folder.exists()]
    return f"; {len(unmarked)} are there without the file `completed`, e.g. {unmarked[0]}" if unmarked else ""


def _misspelt_tags(view: DatasetView, dataset: Dataset, split: str) -> list[Finding]:
    """Find windows that a tag does not select, though their option differs from it only in case or spaces."""
    findings = []
    for tag, value in (view.split(split).tags or {}).items():
        options = [window.options for window in dataset.load_windows() if tag in window.options]
        not_selected = [option[tag] for option in options if not upstream.has_tags(option, {tag: value})]
        if similar := [other for other in not_selected if _same_word(other, value)]:
            message = f"dataset {view.name!r}, split {split!r}: tag {tag}: {value!r} does not choose {len(similar)} "
            message += f"windows with {tag}: {similar[0]!r}"
            key_path = (*view.at, _split_key(view, split), "tags", tag)
            findings.append(warning(message, key_path, id="tag-spelling"))
    return findings


def _same_word(first: Any, second: Any) -> bool:
    return str(first).strip().lower() == str(second).strip().lower()


def _split_key(view: DatasetView, split: str) -> str:
    """The key of the settings of a split."""
    return f"{split}_config" if pick(view.config, (f"{split}_config",)) else "default_config"


def _existing_values(windows: Sequence[Window], config: SplitConfig) -> str:
    """The end of a message that names the groups or tags of the windows, where those selected do not exist."""
    groups = sorted({window.group for window in windows})
    if config.groups and not set(config.groups) & set(groups):
        return f"; its groups: {listed(groups)}"
    for tag, value in (config.tags or {}).items():
        if any(upstream.has_tags(window.options, {tag: value}) for window in windows):
            continue
        values = sorted({repr(window.options[tag]) for window in windows if tag in window.options})
        return f"; windows have {tag}: {listed(values) or 'nothing'}"
    return ""
