"""Everything that is asked of one dataset, and the report of the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rslearn.dataset import Window

from rslp.check.alignment import check_alignment
from rslp.check.findings import Finding
from rslp.check.images import InputSummary, check_images, remark_constant
from rslp.check.labels import LabelSummary, TaskLabels, check_labels, compare_splits
from rslp.check.layers import check_layers
from rslp.check.reading import Reading
from rslp.check.sizes import Patch, check_sizes, image_sizes
from rslp.check.view import View, list_splits
from rslp.train import adapters


@dataclass(frozen=True)
class Listing:
    """A dataset before anything of its windows was read.

    Attributes:
        view: the dataset.
        windows: the windows by split.
        findings: what is wrong so far.
        readable: whether it makes sense to read windows.
    """

    view: View
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
class Report:
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


def list_dataset(view: View, *, patch: Patch | None) -> Listing:
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
    return Listing(view, windows, tuple(findings), not missing)


def report(listing: Listing, read: Sequence[tuple[str, Reading]]) -> Report:
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
    return Report(view.name, counts, sizes, view.module.batch_size, inputs, labels, [*findings, *found])


def _unreadable(view: View, read: Sequence[tuple[str, Reading]]) -> list[Finding]:
    who, at, found = f"dataset {view.name!r}:", (*view.at, "path"), []
    for of_nodata in (False, True):
        faults = [one for _, one in read if one.fault and one.of_nodata == of_nodata]
        if faults:
            what = f"{who} {len(faults)} of {len(read)} windows can't be read, e.g. "
            what += f"{faults[0].window}: {faults[0].fault}"
            found.append(Finding(what, at, id="label-declared") if of_nodata else Finding(what, at, id="unreadable"))
    return found


def _labels(
    view: View, read: Sequence[tuple[str, Reading]]
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
            found = [(r.window, adapters.filtered(task, r.labels[source])) for r in own]
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


def _no_targets(view: View, task: str) -> Finding:
    what = f"dataset {view.name!r}: task {task!r} gets no targets: input_mapping.{task} must map one of the inputs "
    names = ", ".join(name for name, spec in view.module.inputs.items() if spec.is_target) or "none is a target"
    return Finding(
        f"{what}to `targets`; target inputs: {names}",
        (*view.at, "task", "init_args", "input_mapping", task),
        id="no-targets",
    )
