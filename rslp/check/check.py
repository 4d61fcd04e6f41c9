"""The whole check: the config, then every dataset, then the datasets against each other."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rslearn.dataset import Window
from rslearn.dataset.storage.file import FileWindowStorage

from rslp.check.config import DATA_MODULES, ParsedConfig, parse
from rslp.check.dataset import DatasetReport, ListedDataset, list_dataset, report
from rslp.check.findings import Finding, downgrade_allowed, unknown_ids, warning
from rslp.check.forward import check_forward
from rslp.check.images import patch_of
from rslp.check.overlap import Overlap, find_overlaps, is_placeless
from rslp.check.reading import Reading, read_window
from rslp.check.view import open_view
from rslp.config import pick
from rslp.data.bad_samples import lacks_background
from rslp.errors import KeyPath


@dataclass(frozen=True)
class CheckOptions:
    """How much is looked at.

    Attributes:
        images: windows of each split whose images are read.
        labels: windows of each split whose labels are read.
        max_overlap: share of the held-out windows that may lie on training windows; more is an error.
        threads: how many windows are read at a time.
        data: whether the datasets are looked at, beside the config.
        forward: whether two samples of each dataset are sent through the model.
        allow: ids of errors that are warnings in all datasets; the config may allow more in some.
    """

    images: int = 16
    labels: int = 500
    max_overlap: float = 0.01
    threads: int = min(16, 4 + (os.cpu_count() or 1))
    data: bool = True
    forward: bool = True
    allow: Sequence[str] = ()


_ALLOW: KeyPath = ("data", "init_args", "check_allow")
# What is known of one dataset in the end: listing and report, None if it can't be opened, and what is wrong.
_Examined = tuple[ListedDataset | None, DatasetReport | None, list[Finding]]


@dataclass(frozen=True)
class CheckResult:
    """The outcome.

    Attributes:
        reports: one per dataset.
        findings: everything that was found, of the config first.
    """

    reports: tuple[DatasetReport, ...]
    findings: tuple[Finding, ...]


def check(config: Mapping[str, Any], *, effort: CheckOptions, console: Console) -> CheckResult:
    """Check a run config and its data.

    Args:
        config: the run config, its paths resolved.
        effort: how much is looked at.
        console: where the progress bar is drawn.

    Returns:
        Reports and findings; nothing is raised for a user's mistake.
    """
    with _progress(console) as progress, warnings.catch_warnings():
        # The filter that reading sets for each window is not safe among threads; this one outlives them all.
        warnings.filterwarnings("ignore", message="Falling back to item-level time range", category=FutureWarning)
        step = progress.add_task("parsing the config", total=None)
        parsed = parse(config)
        progress.remove_task(step)
        examined = _examine_all(config, parsed, effort=effort, progress=progress) if effort.data else []
        allow = _allowed(config, parsed, effort.allow)
        examined = [_with_background(one, parsed) for one in examined]
        examined = [(*one[:2], [_downgrade_allowed(finding, allow) for finding in one[2]]) for one in examined]
        played = _check_forward_all(examined, parsed, progress=progress) if effort.forward else []
    listings = [listing for listing, _, _ in examined if listing is not None]
    placed = {listing.view.name: listing.windows for listing in listings if not is_placeless(listing.windows)}
    found = [finding for _, _, findings in examined for finding in findings]
    leaks = [_leak(overlap, listings, effort.max_overlap) for overlap in find_overlaps(placed)]
    leaks += [_placeless(listing) for listing in listings if listing.view.name not in placed]
    reports = tuple(report for _, report, _ in examined if report is not None)
    findings = [*parsed.findings, *_unknown_ids(config, effort.allow), *found, *played, *leaks]
    return CheckResult(reports, _once([_downgrade_allowed(finding, allow) for finding in findings]))


def _allowed(config: Mapping[str, Any], parsed: ParsedConfig, everywhere: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The ids that are allowed, by dataset."""
    own = pick(config, _ALLOW)
    own = own if isinstance(own, Mapping) else {}
    return {name: (*everywhere, *(own.get(name) or ())) for name in parsed.modules}


def _unknown_ids(config: Mapping[str, Any], everywhere: Sequence[str]) -> list[Finding]:
    own = pick(config, _ALLOW)
    given = own.items() if isinstance(own, Mapping) else ()
    return [
        *unknown_ids(everywhere, ()),
        *(one for name, ids in given for one in unknown_ids(ids or (), (*_ALLOW, name))),
    ]


def _downgrade_allowed(finding: Finding, allow: Mapping[str, Sequence[str]]) -> Finding:
    """A finding as its dataset's config answers it."""
    size = len(DATA_MODULES)
    name = str(finding.at[size]) if finding.at[:size] == DATA_MODULES and len(finding.at) > size else ""
    return downgrade_allowed(finding, allow.get(name, ()))


def _examine_all(
    config: Mapping[str, Any], parsed: ParsedConfig, *, effort: CheckOptions, progress: Progress
) -> list[_Examined]:
    step = progress.add_task("reading windows", total=0)

    def examine(name: str) -> _Examined:
        node: Any = config
        for key in (*DATA_MODULES, name, "init_args"):
            node = node[key]
        # A dataset is opened by the thread that lists it: some storages (SQLite) belong to one thread.
        view = open_view(name, at=(*DATA_MODULES, name, "init_args"), config=node, module=parsed.modules[name])
        if isinstance(view, Finding):
            return None, None, [view]
        listing = list_dataset(view, patch=patch_of(config))
        jobs = list(listing.sample(images=effort.images, labels=effort.labels))
        with lock:
            progress.update(step, total=(progress.tasks[-1].total or 0) + len(jobs))

        def read(job: tuple[str, Window, bool]) -> tuple[str, Reading]:
            result = job[0], read_window(view, job[1], images=job[2], read_timeout=limit)
            progress.advance(step)
            return result

        run = readers.map if isinstance(view.dataset.storage, FileWindowStorage) else map
        made = report(listing, list(run(read, jobs)))
        return listing, made, list(made.findings)

    lock = threading.Lock()
    given = pick(config, ("data", "init_args", "read_timeout"))
    limit = given if isinstance(given, int | float) and given > 0 else None
    with ThreadPoolExecutor(effort.threads) as datasets, ThreadPoolExecutor(effort.threads) as readers:
        return list(datasets.map(examine, parsed.modules))


def _with_background(examined: _Examined, parsed: ParsedConfig) -> _Examined:
    """A dataset, and its tasks in which objects have the class that the detector takes for background."""
    listing, made, findings = examined
    if listing is None or made is None or parsed.module is None:
        return examined
    wrong = []
    for name, (task, _, at) in listing.view.tasks.items():
        classes = getattr(task, "classes", None)
        if name not in parsed.module.model.with_background() or not classes:
            continue
        if any(summary.classes.get(classes[0]) for summary in made.labels.get(name, {}).values()):
            what = f"dataset {listing.view.name!r}, task {name!r}: {lacks_background(classes)}"
            wrong.append(Finding(what, (*at, "classes"), id="background"))
    return listing, made, [*findings, *wrong]


def _check_forward_all(examined: Sequence[_Examined], parsed: ParsedConfig, *, progress: Progress) -> list[Finding]:
    """A batch of each dataset without an error, if there is a model."""
    findings: list[Finding] = []
    if parsed.module is None or any(finding.error for finding in parsed.findings):
        return findings
    step = progress.add_task("a batch of each dataset", total=len(examined))
    for listing, _, found in examined:
        if listing is not None and not any(finding.error for finding in found):
            findings += check_forward(listing.view, listing.windows["train"], parsed.module.model)
        progress.advance(step)
    return findings


def _leak(overlap: Overlap, listings: Sequence[ListedDataset], allowed: float) -> Finding:
    view = next(listing.view for listing in listings if listing.view.name == overlap.dataset)
    whose = (
        "its own training windows" if overlap.trained == overlap.dataset else f"training windows of {overlap.trained!r}"
    )
    what = f"dataset {overlap.dataset!r}: {overlap.count} of {overlap.of} {overlap.split} windows "
    what += f"({overlap.share:.1%}) lie on {whose}, e.g. {overlap.example[0]} on {overlap.example[1]}"
    at = (*view.at, f"{overlap.split}_config")
    if overlap.share > allowed:
        return Finding(f"{what}; {allowed:.1%} are allowed", at, id="overlap")
    return warning(what, at, id="overlap")


def _placeless(listing: ListedDataset) -> Finding:
    what = f"dataset {listing.view.name!r}: most windows have the same bounds, so it has no locations; "
    return warning(f"{what}overlaps with it can't be told", (*listing.view.at, "path"), id="no-locations")


def _once(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Each finding once, as an error if it is one anywhere."""
    best: dict[tuple[str, object], Finding] = {}
    for finding in findings:
        key = (finding.what, finding.at)
        best[key] = replace(finding, error=finding.error or (key in best and best[key].error))
    return tuple(best.values())


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
