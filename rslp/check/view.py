"""One dataset as the checks see it: its folder, what the config asks of it, and its windows by split."""

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

from rslp import upstream
from rslp.check.findings import Finding, listed, warning
from rslp.data.samples import open_dataset
from rslp.errors import DataError, KeyPath

SPLITS = ("train", "val", "test")
_BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError)


@runtime_checkable
class Normaliser(Protocol):
    """What a normalisation tells of the values that it takes: per modality the bands, in order."""

    band_names: dict[str, list[str]]


@dataclass(frozen=True)
class DatasetView:
    """One dataset.

    Attributes:
        name: its key in the run config.
        at: key path of its data module's arguments.
        config: these arguments as the run config holds them.
        module: rslearn's data module made of them.
        dataset: the dataset on disk.
    """

    name: str
    at: KeyPath
    config: Mapping[str, Any]
    module: RslearnDataModule
    dataset: Dataset

    def split(self, name: str) -> SplitConfig:
        """The merged settings of a split."""
        return upstream.split_config(self.module, name)

    @property
    def tasks(self) -> dict[str, tuple[Task, dict[str, str], KeyPath]]:
        """Per task: the task, its mapping of inputs, and where its arguments stand."""
        at = (*self.at, "task", "init_args")
        task = self.module.task
        if not isinstance(task, MultiTask):
            return {self.name: (task, {name: name for name in self.module.inputs}, at)}
        return {
            name: (one, dict(task.input_mapping.get(name, {})), (*at, "tasks", name, "init_args"))
            for name, one in task.tasks.items()
        }

    def transforms(self, split: str) -> list[tuple[torch.nn.Module, KeyPath]]:
        """The transforms of a split, each with the place of its arguments."""
        own = self.config.get(f"{split}_config")
        where = f"{split}_config" if isinstance(own, Mapping) and own.get("transforms") else "default_config"
        found = enumerate(self.split(split).transforms or [])
        return [(one, (*self.at, where, "transforms", position, "init_args")) for position, one in found]

    def normalisers(self, split: str) -> list[tuple[Normaliser, KeyPath]]:
        """The normalisations of a split, each with the place of its arguments."""
        return [(one, place) for one, place in self.transforms(split) if isinstance(one, Normaliser)]


def open_view(name: str, *, at: KeyPath, config: Mapping[str, Any], module: RslearnDataModule) -> DatasetView | Finding:
    """Open a dataset's folder, or tell why it can't be."""
    try:
        return DatasetView(name, at, config, module, open_dataset(name, module))
    except DataError as error:
        return Finding(" ".join(str(error).split()), (*at, "path"), id="folder")


class _ListedOnce:
    """A dataset that reads its windows' metadata once for all splits."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._known: dict[tuple[tuple[str, tuple[str, ...]], ...], list[Window]] = {}
        self.strays: dict[str, None] = {}

    def load_windows(self, **selection: Sequence[str]) -> list[Window]:
        key = tuple((name, tuple(values)) for name, values in sorted(selection.items()))
        if key not in self._known:
            self._known[key], strays = upstream.load_windows(self._dataset, **selection)
            self.strays |= dict.fromkeys(strays)
        return self._known[key]


def list_splits(view: DatasetView) -> tuple[dict[str, list[Window]], list[Finding]]:
    """The windows of each split as the run will see them; an empty one is an error.

    A test split that selects what another split selects was not configured, and is left out.
    """
    listed_once = _ListedOnce(view.dataset)
    dataset = cast(Dataset, listed_once)
    windows: dict[str, list[Window]] = {}
    findings: list[Finding] = []
    for split in _configured(view):
        config = view.split(split)
        labels = not config.get_skip_targets()
        inputs = {name: spec for name, spec in view.module.inputs.items() if labels or not spec.is_target}
        try:
            windows[split] = upstream.list_windows(dataset, inputs, config)
            findings += _lost(view, dataset, split, inputs=inputs, kept=len(windows[split]))
        except _BROKEN as error:
            what = f"dataset {view.name!r}: its windows can't be listed: {type(error).__name__}: {error}"
            return windows, [*findings, Finding(what, (*view.at, "path"), id="folder")]
        except DataError as error:
            what = f"dataset {view.name!r}: {error}"
            return windows, [*findings, Finding(what, (*view.at, "path"), id="folder")]
    if listed_once.strays:
        what = f"left out, being no windows (they have no metadata.json): {listed(listed_once.strays)}"
        findings.append(warning(f"dataset {view.name!r}: {what}", (*view.at, "path"), id="stray"))
    return windows, findings


def _configured(view: DatasetView) -> list[str]:
    own = view.config.get("test_config")
    return list(SPLITS) if isinstance(own, Mapping) and own else list(SPLITS[:2])


def _lost(view: DatasetView, dataset: Dataset, split: str, *, inputs: dict[str, DataInput], kept: int) -> list[Finding]:
    """Why a split has no window, or fewer than its tags select."""
    config = view.split(split)
    bare = SplitConfig.merge_and_validate([config])
    bare.num_samples = None
    tagged = upstream.list_windows(dataset, {}, bare)
    wanted = min(len(tagged), config.num_samples or len(tagged))
    place = (*view.at, _place_of(view, split))
    unlike = _unlike(view, dataset, split)
    if kept == wanted and kept:
        return unlike
    lacking = {
        name: len(tagged) - len(upstream.list_windows(dataset, {name: spec}, bare)) for name, spec in inputs.items()
    }
    worst = max(lacking, key=lambda name: lacking[name], default=None)
    reason = f"dataset {view.name!r}, split {split!r}: "
    if worst and lacking[worst]:
        layers = listed(view.module.inputs[worst].layers)
        what = f"{lacking[worst]} of {len(tagged)} windows lack a layer of input {worst!r} ({layers})"
        what += _unmarked(tagged, view.module.inputs[worst])
        at = (*view.at, "inputs", worst, "layers")
        if kept:
            return [*unlike, warning(reason + what, at, id="layer-lacking")]
        return [Finding(f"{reason}no windows are left: {what}", at, id="split-empty")]
    if kept:
        return unlike
    every = dataset.load_windows()
    what = f"no windows: groups {config.groups}, names {config.names}, tags {config.tags} select 0 of {len(every)}"
    return [Finding(f"{reason}{what}{_seen(every, config)}", place, id="split-empty")]


def _unmarked(windows: Sequence[Window], spec: DataInput) -> str:
    """Whether layers are there that rslearn takes for unfinished."""
    names = [get_layer_and_group_from_dir_name(option)[0] for option in spec.layers]
    there = [(w.window_root / "layers" / name, w.is_layer_completed(name)) for w in windows for name in names]
    unmarked = [folder for folder, completed in there if not completed and folder.exists()]
    return f"; {len(unmarked)} are there without the file `completed`, e.g. {unmarked[0]}" if unmarked else ""


def _unlike(view: DatasetView, dataset: Dataset, split: str) -> list[Finding]:
    """Windows that a tag does not choose since their option is spelt another way."""
    found = []
    for tag, value in (view.split(split).tags or {}).items():
        have = [window.options for window in dataset.load_windows() if tag in window.options]
        lost = [options[tag] for options in have if not upstream.has_tags(options, {tag: value})]
        if near := [one for one in lost if _spelt(one) == _spelt(value)]:
            what = f"dataset {view.name!r}, split {split!r}: tag {tag}: {value!r} does not choose {len(near)} windows "
            at = (*view.at, _place_of(view, split), "tags", tag)
            found.append(warning(f"{what}with {tag}: {near[0]!r}", at, id="tag-spelling"))
    return found


def _spelt(value: Any) -> str:
    return str(value).strip().lower()


def _place_of(view: DatasetView, split: str) -> str:
    own = view.config.get(f"{split}_config")
    return f"{split}_config" if isinstance(own, Mapping) and own else "default_config"


def _seen(windows: Sequence[Window], config: SplitConfig) -> str:
    """What the windows do have of what was asked for."""
    groups = sorted({window.group for window in windows})
    if config.groups and not set(config.groups) & set(groups):
        return f"; its groups: {listed(groups)}"
    for tag, value in (config.tags or {}).items():
        if any(upstream.has_tags(window.options, {tag: value}) for window in windows):
            continue
        values = sorted({repr(window.options[tag]) for window in windows if tag in window.options})
        return f"; windows have {tag}: {listed(values) or 'nothing'}"
    return ""
