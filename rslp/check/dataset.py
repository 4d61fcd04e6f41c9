"""Everything that is asked of one dataset, and the report of the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rslearn.dataset import Window
from rslearn.train.tasks import Task
from rslearn.train.tasks.multi_task import MultiTask
from rslearn.train.transforms.adaptive_pooling import AdaptivePooling
from rslearn.train.transforms.crop import Crop
from rslearn.train.transforms.flip import Flip
from rslearn.train.transforms.pad import Pad
from rslearn.train.transforms.resize import Resize

from rslp import upstream
from rslp.check.findings import Finding, listed, warning
from rslp.check.images import InputSummary, Patch, check_images, check_layers, check_sizes, image_sizes, remark_constant
from rslp.check.labels import LabelSummary, TaskLabels, check_labels, compare_splits
from rslp.check.reading import Reading
from rslp.check.view import DatasetView, list_splits
from rslp.upstream.task_kinds import kind_of

# What changes where on the ground a pixel lies, and what only changes the number of pixels over the same ground.
MOVING, SCALING = (Flip, Crop, Pad), (Resize, AdaptivePooling)


def check_alignment(view: DatasetView, split: str) -> list[Finding]:
    """Transforms of a split that leave labels, or a modality, where they were."""
    findings = []
    modalities = {name for normaliser, _ in view.normalisers(split) for name in normaliser.band_names}
    for transform, place in view.transforms(split):
        if not isinstance(transform, MOVING + SCALING):
            continue
        moved = _selected(transform)
        images = sorted(name.removeprefix("input/") for name in moved if not name.startswith("target/"))
        left = [item for name, (task, _, _) in view.tasks.items() for item in _left(transform, task, name, view)]
        still = sorted(modalities - set(images)) if isinstance(transform, MOVING) and modalities & set(images) else []
        who = f"dataset {view.name!r}: {type(transform).__name__}"
        if images and left:
            what = f"{who} changes {listed(images)} and not the labels {listed(left)}: they no longer fit together"
            findings.append(warning(f"{what}; add them to its {_argument(transform, left)}", place, id="alignment"))
        elif images and still:
            what = f"{who} changes {listed(images)} and not {listed(still)}: they no longer fit together"
            findings.append(warning(what, place, id="alignment"))
        elif not images and moved and isinstance(transform, MOVING):
            findings.append(
                warning(f"{who} changes labels ({listed(sorted(moved))}) and no image", place, id="alignment")
            )
    return findings


def _selected(transform: torch.nn.Module) -> set[str]:
    names: set[str] = set()
    for attribute in ("image_selectors", "box_selectors", "selectors"):
        names.update(getattr(transform, attribute, None) or ())
    return {name if name.startswith(("input/", "target/")) else f"input/{name}" for name in names}


def _left(transform: torch.nn.Module, task: Task, name: str, view: DatasetView) -> Iterator[str]:
    """The labels of a task that a transform of images should change, and does not."""
    target = f"target/{name}" if isinstance(view.module.task, MultiTask) else "target"
    kind, needed = kind_of(task), list[str]()
    if kind.unit == "object":
        # Pixels that are added to the right and below leave boxes where they are.
        needed = [] if isinstance(transform, Pad) and transform.mode == "topleft" else [target]
    elif kind.dense and isinstance(transform, MOVING):
        needed = [f"{target}/{kind.target_key}", f"{target}/valid"]
    moved = _selected(transform)
    return (item for item in needed if item not in moved)


def _argument(transform: torch.nn.Module, left: list[str]) -> str:
    if isinstance(transform, SCALING):
        return "selectors, or leave the size as it is: it has none for boxes"
    return "image_selectors" if all(item.count("/") > 1 for item in left) else "box_selectors"


@dataclass(frozen=True)
class ListedDataset:
    """A dataset before anything of its windows was read.

    Attributes:
        view: the dataset.
        windows: the windows by split.
        findings: what is wrong so far.
        readable: whether it makes sense to read windows.
    """

    view: DatasetView
    windows: Mapping[str, Sequence[Window]]
    findings: tuple[Finding, ...]
    readable: bool

    def sample(self, *, images: int, labels: int) -> Iterator[tuple[str, Window, bool]]:
        """Split, window, and whether its images are to be read; a split's order is by hash, so the first are random."""
        if self.readable:
            for split, windows in self.windows.items():
                for index, window in enumerate(windows[: max(images, labels)]):
                    yield split, window, index < images


@dataclass(frozen=True)
class DatasetReport:
    """What a person wants to see of a dataset before a long run.

    Attributes:
        name: its key.
        windows: number of windows by split.
        sizes: the image sizes (width, height) in pixels, by split.
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
    """Check what can be told without reading an image: layers, bands, windows, sizes."""
    findings = check_layers(view)
    windows, lost = list_splits(view)
    # That windows lack a layer which the dataset does not have would be said twice.
    named = {finding.at for finding in findings}
    findings += [finding for finding in lost if finding.at not in named]
    for split in windows:
        findings += check_alignment(view, split)
    if patch is not None:
        findings += check_sizes(view, windows, patch)
    # A layer or band that is not there would fail again in each window.
    missing = any(finding.at[len(view.at) :][:1] == ("inputs",) and finding.error for finding in findings)
    return ListedDataset(view, windows, tuple(findings), not missing)


def report(listing: ListedDataset, read: Sequence[tuple[str, Reading]]) -> DatasetReport:
    """Check what was read.

    Args:
        listing: the dataset.
        read: split and reading of each window that was read.
    """
    view = listing.view
    findings = [*listing.findings, *_unreadable(view, read)]
    inputs = []
    for name, spec in view.module.inputs.items():
        stats = {reading.window: reading.images[name] for _, reading in read if name in reading.images}
        if spec.data_type == "raster" and not spec.is_target and stats:
            summary, found = check_images(view, name, stats)
            inputs.append(summary)
            findings += [*found, *remark_constant(view, name, stats)]
    labels, found = _labels(view, read)
    sizes = {split: sorted(image_sizes(view.split(split), windows)) for split, windows in listing.windows.items()}
    counts = {split: len(windows) for split, windows in listing.windows.items()}
    return DatasetReport(view.name, counts, sizes, view.module.batch_size, inputs, labels, [*findings, *found])


def _unreadable(view: DatasetView, read: Sequence[tuple[str, Reading]]) -> list[Finding]:
    who, at, found = f"dataset {view.name!r}:", (*view.at, "path"), []
    for of_nodata in (False, True):
        faults = [one for _, one in read if one.fault and one.of_nodata == of_nodata]
        if faults:
            what = f"{who} {len(faults)} of {len(read)} windows can't be read, e.g. "
            what += f"{faults[0].window}: {faults[0].fault}"
            found.append(Finding(what, at, id="label-declared") if of_nodata else Finding(what, at, id="unreadable"))
    return found


def _labels(
    view: DatasetView, read: Sequence[tuple[str, Reading]]
) -> tuple[dict[str, dict[str, LabelSummary]], list[Finding]]:
    summaries: dict[str, dict[str, LabelSummary]] = {}
    findings = []
    for name, (task, mapping, at) in view.tasks.items():
        source = next((key for key, role in mapping.items() if role == "targets"), None)
        if source is None or source not in view.module.inputs:
            findings.append(_no_targets(view, name))
            continue
        for split in dict.fromkeys(split for split, _ in read):
            own = [r for where, r in read if where == split and source in r.labels]
            found = [(r.window, upstream.filtered(task, r.labels[source])) for r in own]
            if not found:
                continue
            declared = {str(r.declared[source]): r.declared[source] for r in own if source in r.declared}
            outside = {r.window: r.outside[source] for r in own if r.outside.get(source)}
            labels = TaskLabels(view.name, name, task, at, split, found, tuple(declared.values()), outside)
            summary, wrong = check_labels(labels)
            findings += wrong
            seen = summaries.setdefault(name, {})
            if "train" in seen:
                findings += compare_splits(labels, seen["train"], summary)
            seen[split] = summary
    return summaries, findings


def _no_targets(view: DatasetView, task: str) -> Finding:
    what = f"dataset {view.name!r}: task {task!r} gets no targets: input_mapping.{task} must map one of the inputs "
    names = ", ".join(name for name, spec in view.module.inputs.items() if spec.is_target) or "none is a target"
    return Finding(
        f"{what}to `targets`; target inputs: {names}",
        (*view.at, "task", "init_args", "input_mapping", task),
        id="no-targets",
    )
