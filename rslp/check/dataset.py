"""The checks of one dataset: first those that read no image, then those of the windows that were read; its report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rslearn.dataset import Window
from rslearn.train.tasks import Task
from rslearn.train.tasks.multi_task import MultiTask
from rslearn.train.transforms.pad import Pad

from rslp import upstream
from rslp.check.encoder import Patch
from rslp.check.findings import Finding, listed, warning
from rslp.check.images import InputSummary, check_images, check_layers, check_sizes, image_sizes
from rslp.check.labels import LabelSummary, TaskLabels, check_labels, compare_splits
from rslp.check.reading import Reading
from rslp.check.view import GEOMETRIC, MOVING, SCALING, DatasetView, list_splits
from rslp.upstream.task_kinds import kind_of


def check_alignment(view: DatasetView, split: str) -> list[Finding]:
    """Find transforms of a split that change images and not their labels, or not all modalities, or labels alone."""
    findings = []
    modalities = {name for normaliser, _ in view.normalisers(split) for name in normaliser.band_names}
    for transform, key_path in view.transforms(split):
        if not isinstance(transform, GEOMETRIC):
            continue
        moves = isinstance(transform, MOVING)
        changed = _selected(transform)
        images = sorted(name.removeprefix("input/") for name in changed if not name.startswith("target/"))
        tasks = view.tasks.items()
        labels = [label for name, (task, *_) in tasks for label in _unchanged_labels(transform, task, name, view)]
        unchanged = sorted(modalities - set(images)) if moves and modalities & set(images) else []
        who = f"dataset {view.name!r}: {type(transform).__name__}"
        if images and labels:
            message = f"{who} changes {listed(images)} and not the labels {listed(labels)}: they no longer fit together"
            message += f"; add them to its {_selector_argument(transform, labels)}"
        elif images and unchanged:
            message = f"{who} changes {listed(images)} and not {listed(unchanged)}: they no longer fit together"
        elif not images and changed and moves:
            message = f"{who} changes labels ({listed(sorted(changed))}) and no image"
        else:
            continue
        findings.append(warning(message, key_path, id="alignment"))
    return findings


def _selected(transform: torch.nn.Module) -> set[str]:
    """The inputs and targets that a transform changes, as ``input/<name>`` and ``target/<name>``."""
    names: set[str] = set()
    for attribute in ("image_selectors", "box_selectors", "selectors"):
        names.update(getattr(transform, attribute, None) or ())
    return {name if name.startswith(("input/", "target/")) else f"input/{name}" for name in names}


def _unchanged_labels(transform: torch.nn.Module, task: Task, name: str, view: DatasetView) -> Iterator[str]:
    """The labels of a task that a transform of its images should change, and does not."""
    target = f"target/{name}" if isinstance(view.module.task, MultiTask) else "target"
    kind, needed = kind_of(task), list[str]()
    if kind.unit == "object":
        # Pixels that are added to the right and below leave boxes where they are.
        needed = [] if isinstance(transform, Pad) and transform.mode == "topleft" else [target]
    elif kind.dense and isinstance(transform, MOVING):
        needed = [f"{target}/{kind.target_key}", f"{target}/valid"]
    moved = _selected(transform)
    return (item for item in needed if item not in moved)


def _selector_argument(transform: torch.nn.Module, labels: list[str]) -> str:
    if isinstance(transform, SCALING):
        return "selectors, or leave the size as it is: it has no selectors for boxes"
    return "image_selectors" if all(item.count("/") > 1 for item in labels) else "box_selectors"


@dataclass(frozen=True)
class ListedDataset:
    """A dataset whose windows are listed and not read yet.

    Attributes:
        view: the dataset.
        windows: the windows by split.
        findings: what is wrong so far.
        readable: whether windows should be read; not if a layer or band is missing, which would fail in each of them.
    """

    view: DatasetView
    windows: Mapping[str, Sequence[Window]]
    findings: tuple[Finding, ...]
    readable: bool

    def sample(self, *, images: int, labels: int) -> Iterator[tuple[str, Window, bool]]:
        """Choose windows to read: split, window, and whether its images are read.

        The first windows of each split are chosen; splits are ordered by hash, so that these are random ones.
        """
        if self.readable:
            for split, windows in self.windows.items():
                for index, window in enumerate(windows[: max(images, labels)]):
                    yield split, window, index < images


@dataclass(frozen=True)
class DatasetReport:
    """Summary of a dataset, for the tables that a person reads before a long run.

    Attributes:
        name: its key.
        windows: number of windows by split.
        sizes: image sizes (width, height) in pixels, by split.
        batch_size: samples in a batch.
        inputs: its image inputs.
        labels: by task and split.
        findings: what is wrong.
    """

    name: str
    windows: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    batch_size: int = 0
    inputs: Sequence[InputSummary] = ()
    labels: Mapping[str, Mapping[str, LabelSummary]] = field(default_factory=dict)
    findings: Sequence[Finding] = ()


def list_dataset(view: DatasetView, *, patch: Patch | None) -> ListedDataset:
    """Check a dataset without reading an image: layers, bands, windows, transforms, sizes."""
    findings = check_layers(view)
    windows, of_windows = list_splits(view)
    # A layer that the dataset lacks is reported once, not again as missing in windows.
    known = {finding.at for finding in findings}
    findings += [finding for finding in of_windows if finding.at not in known]
    for split in windows:
        findings += check_alignment(view, split)
    if patch is not None:
        findings += check_sizes(view, windows, patch)
    missing = any(finding.at[len(view.at) :][:1] == ("inputs",) and finding.error for finding in findings)
    return ListedDataset(view, windows, tuple(findings), not missing)


def report(listing: ListedDataset, read: Sequence[tuple[str, Reading]]) -> DatasetReport:
    """Check the windows that were read, and summarise the dataset.

    Args:
        listing: the dataset.
        read: split and contents of each window.
    """
    view = listing.view
    findings = [*listing.findings, *_unreadable(view, read)]
    inputs = []
    for name, spec in view.module.inputs.items():
        stats = {reading.window: reading.images[name] for _, reading in read if name in reading.images}
        if spec.data_type == "raster" and not spec.is_target and stats:
            summary, of_images = check_images(view, name, stats)
            inputs.append(summary)
            findings += of_images
    labels, of_labels = _labels(view, read)
    sizes = {split: sorted(image_sizes(view.split(split), windows)) for split, windows in listing.windows.items()}
    counts = {split: len(windows) for split, windows in listing.windows.items()}
    return DatasetReport(view.name, counts, sizes, view.module.batch_size, inputs, labels, [*findings, *of_labels])


def _unreadable(view: DatasetView, read: Sequence[tuple[str, Reading]]) -> list[Finding]:
    key_path, findings = (*view.at, "path"), []
    for of_nodata in (False, True):
        failed = [reading for _, reading in read if reading.fault and reading.of_nodata == of_nodata]
        if failed:
            message = f"dataset {view.name!r}: {len(failed)} of {len(read)} windows can't be read, e.g. "
            message += f"{failed[0].window}: {failed[0].fault}"
            unreadable = Finding(message, key_path, id="unreadable")
            findings.append(Finding(message, key_path, id="label-declared") if of_nodata else unreadable)
    return findings


def _labels(
    view: DatasetView, read: Sequence[tuple[str, Reading]]
) -> tuple[dict[str, dict[str, LabelSummary]], list[Finding]]:
    """Summarise and check the labels of each task and split."""
    summaries: dict[str, dict[str, LabelSummary]] = {}
    findings = []
    for name, (task, mapping, key_path) in view.tasks.items():
        source = next((input_name for input_name, role in mapping.items() if role == "targets"), None)
        if source is None or source not in view.module.inputs:
            findings.append(_no_targets(view, name))
            continue
        for split in dict.fromkeys(split for split, _ in read):
            readings = [reading for of, reading in read if of == split and source in reading.labels]
            if not readings:
                continue
            windows = [(r.window, upstream.filtered(task, r.labels[source])) for r in readings]
            declared = {str(r.declared[source]): r.declared[source] for r in readings if source in r.declared}
            outside = {r.window: r.outside[source] for r in readings if r.outside.get(source)}
            labels = TaskLabels(view.name, name, task, key_path, split, windows, tuple(declared.values()), outside)
            summary, of_labels = check_labels(labels)
            findings += of_labels
            by_split = summaries.setdefault(name, {})
            if "train" in by_split:
                findings += compare_splits(labels, by_split["train"], summary)
            by_split[split] = summary
    return summaries, findings


def _no_targets(view: DatasetView, task: str) -> Finding:
    targets = ", ".join(name for name, spec in view.module.inputs.items() if spec.is_target) or "none is a target"
    message = f"dataset {view.name!r}: task {task!r} gets no targets: input_mapping.{task} must map one of the inputs "
    message += f"to `targets`; target inputs: {targets}"
    return Finding(message, (*view.at, "task", "init_args", "input_mapping", task), id="no-targets")
