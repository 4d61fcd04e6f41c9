"""The check of a run: the config first, then each dataset, then overlaps between the datasets."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rslearn.dataset import Window
from rslearn.dataset.storage.file import FileWindowStorage

from rslp.check.config import ParsedConfig, parse
from rslp.check.dataset import DatasetReport, ListedDataset, list_dataset, report
from rslp.check.encoder import configured_encoder, patch_of
from rslp.check.findings import CheckOptions, Finding, downgrade_allowed, unknown_ids, warning
from rslp.check.forward import check_forward
from rslp.check.overlap import Overlap, find_overlaps, is_placeless
from rslp.check.reading import Reading, read_window
from rslp.check.view import open_view
from rslp.config import pick
from rslp.config.datasets import DATA_MODULES
from rslp.data.bad_samples import lacks_background
from rslp.errors import KeyPath
from rslp.upstream.literals import literals_in_turns


@dataclass(frozen=True)
class CheckResult:
    """Result of a check: a report for each dataset, and all findings, those about the config first."""

    reports: tuple[DatasetReport, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class _Examined:
    """Result of reading one dataset; listing and report are None if its folder can't be opened."""

    findings: Sequence[Finding]
    listing: ListedDataset | None = None
    report: DatasetReport | None = None


_ALLOW: KeyPath = ("data", "init_args", "check_allow")


def check(config: Mapping[str, Any], *, effort: CheckOptions, console: Console) -> CheckResult:
    """Check a run config and its data.

    Args:
        config: the run config, its paths resolved.
        effort: how much is checked.
        console: where the progress bar is drawn.

    Returns:
        Reports and findings; a mistake of the user is a finding and raises nothing.
    """
    with _progress(console) as progress, warnings.catch_warnings():
        # The filter that reading sets for each window is not safe among threads; this one outlives them all.
        warnings.filterwarnings("ignore", message="Falling back to item-level time range", category=FutureWarning)
        bar = progress.add_task("parsing the config", total=None)
        parsed = parse(config)
        progress.remove_task(bar)
        allow = {name: (*effort.allow, *(pick(config, (*_ALLOW, name)) or ())) for name in parsed.modules}
        examined = _examine_all(config, parsed, effort=effort, progress=progress) if effort.data else []
        examined = [_with_background(dataset, parsed) for dataset in examined]
        examined = [replace(dataset, findings=_downgraded(dataset.findings, allow)) for dataset in examined]
        forward = _check_forward_all(examined, parsed, progress=progress) if effort.forward else []
    listings = [dataset.listing for dataset in examined if dataset.listing is not None]
    located = {listing.view.name: listing.windows for listing in listings if not is_placeless(listing.windows)}
    overlaps = [_overlap_finding(overlap, listings, effort.max_overlap) for overlap in find_overlaps(located)]
    overlaps += [_no_locations(listing) for listing in listings if listing.view.name not in located]
    findings = [*parsed.findings, *_unknown_ids(config, effort.allow)]
    findings += [finding for dataset in examined for finding in dataset.findings] + forward + overlaps
    reports = tuple(dataset.report for dataset in examined if dataset.report is not None)
    return CheckResult(reports, _without_repeats(_downgraded(findings, allow)))


def _unknown_ids(config: Mapping[str, Any], everywhere: Sequence[str]) -> list[Finding]:
    findings, by_dataset = unknown_ids(everywhere, ()), pick(config, _ALLOW)
    for name, ids in by_dataset.items() if isinstance(by_dataset, Mapping) else ():
        findings += unknown_ids(ids or (), (*_ALLOW, name))
    return findings


def _downgraded(findings: Iterable[Finding], allow: Mapping[str, Sequence[str]]) -> list[Finding]:
    """Turn errors that are allowed for their dataset into warnings."""
    depth, downgraded = len(DATA_MODULES), []
    for finding in findings:
        within = finding.at[:depth] == DATA_MODULES and len(finding.at) > depth
        dataset = str(finding.at[depth]) if within else ""
        downgraded.append(downgrade_allowed(finding, allow.get(dataset, ())))
    return downgraded


def _examine_all(
    config: Mapping[str, Any], parsed: ParsedConfig, *, effort: CheckOptions, progress: Progress
) -> list[_Examined]:
    bar = progress.add_task("reading windows", total=0)
    lock = threading.Lock()
    given = pick(config, ("data", "init_args", "read_timeout"))
    read_timeout = given if isinstance(given, int | float) and given > 0 else None

    def examine(name: str) -> _Examined:
        key_path = (*DATA_MODULES, name, "init_args")
        # A dataset is opened by the thread that lists it: some storages (SQLite) belong to one thread.
        arguments, encoder = pick(config, key_path), configured_encoder(config)
        view = open_view(name, at=key_path, config=arguments, module=parsed.modules[name], encoder=encoder)
        if isinstance(view, Finding):
            return _Examined([view])
        listing = list_dataset(view, patch=patch_of(config))
        jobs = list(listing.sample(images=effort.images, labels=effort.labels))
        with lock:
            progress.update(bar, total=(progress.tasks[-1].total or 0) + len(jobs))

        def read(job: tuple[str, Window, bool]) -> tuple[str, Reading]:
            split, window, images = job
            reading = read_window(view, window, images=images, read_timeout=read_timeout)
            progress.advance(bar)
            return split, reading

        run = readers.map if isinstance(view.dataset.storage, FileWindowStorage) else map
        dataset_report = report(listing, list(run(read, jobs)))
        return _Examined(dataset_report.findings, listing, dataset_report)

    threads = effort.threads
    with literals_in_turns(), ThreadPoolExecutor(threads) as datasets, ThreadPoolExecutor(threads) as readers:
        return list(datasets.map(examine, parsed.modules))


def _with_background(examined: _Examined, parsed: ParsedConfig) -> _Examined:
    """Add an error for each task whose objects have the class that the detector takes for background."""
    if examined.listing is None or examined.report is None or parsed.module is None:
        return examined
    findings = list(examined.findings)
    view, needs_background = examined.listing.view, parsed.module.model.with_background()
    for name, (task, _, key_path) in view.tasks.items():
        classes = getattr(task, "classes", None)
        if name not in needs_background or not classes:
            continue
        if any(summary.classes.get(classes[0]) for summary in examined.report.labels.get(name, {}).values()):
            message = f"dataset {view.name!r}, task {name!r}: {lacks_background(classes)}"
            findings.append(Finding(message, (*key_path, "classes"), id="background"))
    return replace(examined, findings=findings)


def _check_forward_all(examined: Sequence[_Examined], parsed: ParsedConfig, *, progress: Progress) -> list[Finding]:
    """Send a batch of each dataset without an error through the model, if there is one."""
    findings: list[Finding] = []
    if parsed.module is None or any(finding.error for finding in parsed.findings):
        return findings
    bar = progress.add_task("a batch of each dataset", total=len(examined))
    for dataset in examined:
        if dataset.listing is not None and not any(finding.error for finding in dataset.findings):
            listing = dataset.listing
            findings += check_forward(listing.view, listing.windows["train"], parsed.module.model)
        progress.advance(bar)
    return findings


def _overlap_finding(overlap: Overlap, listings: Sequence[ListedDataset], allowed: float) -> Finding:
    view = next(listing.view for listing in listings if listing.view.name == overlap.dataset)
    same = overlap.trained == overlap.dataset
    ground = "its own training windows" if same else f"training windows of {overlap.trained!r}"
    message = f"dataset {overlap.dataset!r}: {overlap.count} of {overlap.total} {overlap.split} windows "
    message += f"({overlap.share:.1%}) lie on {ground}, e.g. {overlap.example[0]} on {overlap.example[1]}"
    key_path = (*view.at, f"{overlap.split}_config")
    if overlap.share > allowed:
        return Finding(f"{message}; {allowed:.1%} are allowed", key_path, id="overlap")
    return warning(message, key_path, id="overlap")


def _no_locations(listing: ListedDataset) -> Finding:
    message = f"dataset {listing.view.name!r}: most windows have the same bounds, so it has no locations; overlaps "
    message += "with it can't be found"
    if listing.view.encoder is not None and listing.view.encoder.reads_location:
        message += ", and the encoder reads a place that says nothing: set its use_location to false"
    return warning(message, (*listing.view.at, "path"), id="no-locations")


def _without_repeats(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Each finding once, as an error if any of its repeats is one."""
    best: dict[tuple[str, object], Finding] = {}
    for finding in findings:
        key = (finding.what, finding.at)
        best[key] = replace(finding, error=finding.error or (key in best and best[key].error))
    return tuple(best.values())


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
