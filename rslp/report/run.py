"""The report of one run."""

from __future__ import annotations

import time
from typing import Any

from rslp.check.findings import FINDING_IDS
from rslp.errors import RunError
from rslp.report import results, training
from rslp.report.contents import RunContents
from rslp.report.page import Blocks, Code, Facts, Fold, Number, Page, Section, Table, Text
from rslp.report.results import sentences
from rslp.rundir import RunDir

# A heartbeat that is older (s) is one of a process that has ended, or hangs.
_SILENT = 3600


def run_page(run: RunDir) -> Page:
    """The report of a run in its present state.

    Raises:
        RunError: there is no run.
    """
    if not run.config.is_file():
        raise RunError(f"there is no run at {run.location}")
    contents = RunContents.read(run)
    parts = (
        ("overview", "Overview", _overview),
        ("results", "Results", results.metrics),
        ("samples", "Predictions", results.samples),
        ("errors", "Errors", results.errors),
        ("curves", "Learning curves", training.curves),
        ("mixture", "Mixture", training.mixture),
        ("windows", "Windows", training.windows),
        ("usage", "Throughput and memory", training.usage),
        ("data", "Bad samples and findings", _data),
        ("config", "Run config", _config),
        ("software", "Software and data", _software),
    )
    sections = [Section.of(id_, title, make(contents)) for id_, title, make in parts]
    commit = str(contents.json(run.code.name).get("commit") or "not known")[:12]
    facts = {"datasets": str(len(contents.datasets())), "commit": commit}
    name = f"{run.project}/{run.experiment}"
    return Page(f"{name}: report", "run", name, _state(contents), sections, contents.notes, facts)


def _state(contents: RunContents) -> str:
    if contents.done is not None:
        return "done"
    state = str(contents.state.get("state") or "not started")
    silent = time.time() - contents.state.get("heartbeat", time.time())
    return f"{state}, silent for {silent / 3600:.0f} h" if state == "running" and silent > _SILENT else state


def _overview(contents: RunContents) -> Blocks | str:
    state, done, shown = contents.state, contents.done or {}, contents.shown
    cost = done.get("cost") or {}
    items: list[tuple[str, Any]] = [
        ("epochs", Number(state.get("epoch"), "d")),
        ("optimiser steps", Number(state.get("step"), ",d")),
        ("samples drawn", Number(cost.get("samples"), ",d")),
        ("training time", _duration(cost.get("seconds") or state.get("seconds"))),
        ("parameters", Number(cost.get("parameters"), ",d")),
    ]
    if shown is not None:
        items.insert(0, (f"score, {shown.evaluation.split} split", Number(shown.evaluation.score)))
    names = contents.datasets()
    lines = [f"Trained on {len(names)} datasets: {', '.join(names)}." if len(names) != 1 else f"Trained on {names[0]}."]
    if early := done.get("ended_early"):
        lines.append(f"The training ended early, by {early['by']}, of {early['of']}.")
    if contents.done is None:
        lines.append("The training is not finished: this is the state when the report was made.")
    if unmoved := state.get("unmoved"):
        lines.append(f"Never better than the baseline on validation: {', '.join(unmoved)}.")
    blocks: list[Any] = [Facts([item for item in items if str(item[1]) not in ("", "none")]), Text(lines)]
    if shown is not None:
        blocks.append(Text(sentences(shown)))
    return blocks


def _duration(seconds: float | None) -> str:
    if not seconds:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _data(contents: RunContents) -> Blocks | str:
    """Bad samples, and the findings of the check that the config allows."""
    counts = {split: count for split, count in (contents.state.get("faults") or {}).items() if count}
    messages = [[split, message] for split, one in contents.splits.items() for message in one.evaluation.bad_samples]
    allowed: dict[str, list[str]] = {}
    for dataset, ids in sorted((contents.json(contents.run.check.name).get("allowed") or {}).items()):
        for id_ in ids:
            allowed.setdefault(id_, []).append(dataset)
    findings = [[id_, FINDING_IDS.get(id_, ""), ", ".join(names)] for id_, names in allowed.items()]
    lines = [f"Skipped in the training: {', '.join(f'{n} {split}' for split, n in counts.items())} samples."] * bool(
        counts
    )
    lines += [] if counts or messages else ["No bad sample is recorded."]
    lines += [] if findings else ["The config allows no finding of the check."]
    head = ("finding", "what it means", "datasets")
    tables = [
        Table("Samples that an evaluation has left out", ("split", "what is wrong"), messages),
        Table("Findings of the check that the config allows", head, findings),
    ]
    return [*([Text(lines)] if lines else ()), *(table for table in tables if table.rows)]


def _config(contents: RunContents) -> Blocks | str:
    """The run config, and which files its values come from."""
    text = contents.text(contents.run.config.name)
    if not text:
        return "The run directory has no config.yaml."
    folded = Fold("config.yaml", [Code("config.yaml", text)])
    rows = [
        [key, _short(origin.get("value")), _place(origin)]
        for key, origins in contents.json(contents.run.provenance.name).items()
        for origin in (origins if isinstance(origins, list) else ())
        if isinstance(origin, dict) and origin.get("won")
    ]
    if rows:
        table = Table("The file and line that set each value", ("key", "value", "from"), rows)
        return [folded, Fold(f"Where its {len(rows)} values come from", [table])]
    return [folded, Text(["Which files its values come from is not recorded: stage 1 has not made this config."])]


def _place(origin: dict[str, Any]) -> str:
    return f"{origin['file']}:{origin['line']}" if origin.get("file") else "computed by stage 1"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _software(contents: RunContents) -> Blocks | str:
    """Commit, packages, fingerprints of the data and of the checkpoint."""
    code, environment = contents.json(contents.run.code.name), contents.text(contents.run.environment.name)
    items: list[tuple[str, Any]] = []
    if code:
        changed = " with changes that are not committed" if code.get("dirty") else ""
        items += [("commit", f"{code.get('commit') or 'not a checkout'}{changed}"), ("rslp", str(code.get("version")))]
    blocks: list[Any] = [Facts(items)] if items else []
    rows = [
        [dataset, split, digest[:16]]
        for split, one in contents.splits.items()
        for dataset, digest in sorted(one.evaluation.data_fingerprints.items())
    ]
    if rows:
        head = ("dataset", "split", "fingerprint")
        blocks.append(Table("Fingerprints of the evaluated samples: equal ones are of the same samples", head, rows))
        checkpoints = {one.evaluation.checkpoint_sha256: one.evaluation.checkpoint for one in contents.splits.values()}
        blocks.append(Text([f"Evaluated: {name}, SHA-256 {digest}." for digest, name in checkpoints.items()]))
    if environment:
        blocks.append(Fold("Python and packages", [Code("environment.txt", environment)]))
    if not blocks:
        return "The run directory has no record of the software yet."
    return blocks
