"""Make a dataset: read everything, say all problems at once, choose splits, write, and sum up."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from rslp.datasets import preview
from rslp.datasets.config import SPLITS, DatasetSpec
from rslp.datasets.dataset_config import Facts, InputOf, dataset_config, ordered_bands
from rslp.datasets.existing import existing_facts
from rslp.datasets.grids import UnreadableFile
from rslp.datasets.plan import Plan, finite, guessed_units, make_plan
from rslp.datasets.points import PixelSeries, read_series, write_points_dataset
from rslp.datasets.sources import Problems
from rslp.datasets.splits import choose_splits, split_points
from rslp.datasets.write import (
    GROUP,
    LABEL,
    STAMP,
    beside,
    create,
    existing_options,
    land,
    read_content,
    write_window,
)
from rslp.errors import UserError
from rslp.io import write_atomic

_HEADER = "Written by: "


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was made.

    Attributes:
        path: the dataset.
        config: the dataset config.
        windows: number of windows by split.
        counts: by class its number of windows, objects or pixels by split; empty for numbers.
        new: number of windows that were written now.
        shift: the largest distance, in metres, by which pixels lie beside the place that their file names.
        notes: what was decided or left out, in words.
    """

    path: str
    config: str
    windows: Mapping[str, int]
    counts: Mapping[str, Mapping[str, int]]
    new: int
    shift: float
    notes: tuple[str, ...]


def make(spec: DatasetSpec, folder: Path, *, command: str, overwrite: bool = False) -> Summary:
    """Write a dataset, its dataset config, a picture of each split, and ``summary.json``.

    Args:
        spec: what to make.
        folder: the folder that relative paths start from.
        command: the command that does it, for the head of the dataset config.
        overwrite: whether a dataset that was made before is replaced, with its dataset config.

    Raises:
        UserError: something is wrong with the files (all problems at once); nothing is written.
    """
    path = folder / spec.path
    config = folder / spec.config if spec.config else path.with_name(f"{path.name}.yaml")
    header = (f"{_HEADER}{command}", "A dataset config, see docs/dataset_config.md.")
    if config.exists() and not config.read_text(encoding="utf-8", errors="replace").startswith(f"# {_HEADER}"):
        raise UserError(f"{config}: exists and was not made by make_dataset; name another dataset config with config")
    if spec.dataset:
        facts, counts = existing_facts(spec, folder, config, header)
        notes = [f"{name}: the values look like {entry.units}" for name, entry in facts.inputs.items() if entry.units]
        summary = Summary(
            path=str(path), config=str(config), windows=counts, counts={}, new=0, shift=0, notes=tuple(notes)
        )
        return _write_config(config, dataset_config(facts), summary, overwrite=overwrite)
    if spec.series:
        return _make_series(spec, folder, path, config, header=header, overwrite=overwrite)
    plan = make_plan(spec, folder)
    existing = existing_options(path, plan.layers, overwrite=overwrite)
    choose_splits(plan, folder, existing)
    with beside(path) as half:
        new = _write(plan, half, existing)
        summary = _summary(plan, path, config, new)
        preview.draw(half, plan.windows, plan.splits, plan.sources[0], plan.classes)
        (half / STAMP).write_text(_as_json(summary), encoding="utf-8")
        text = dataset_config(_facts(plan, path, config, header))
        land(half, path, add=bool(existing))
    return _write_config(config, text, summary, overwrite=overwrite)


def _make_series(
    spec: DatasetSpec, folder: Path, path: Path, config: Path, *, header: Sequence[str], overwrite: bool
) -> Summary:
    """Write a dataset of pixel series, always as a whole."""
    problems = Problems()
    points = read_series(spec, folder, problems)
    column = str(spec.labels.column)
    ignored = {str(value) for value in spec.labels.ignore}
    points = [point for point in points if str(point.label[column]) not in ignored]
    if not points and not problems.lines:
        problems.add("labels", "no pixel has a label")
    if spec.task == "regression":
        points = [replace(point, label={column: finite(point.label[column], point.name, problems)}) for point in points]
    problems.raise_any()
    points, note = split_points(spec, points, problems)
    existing_options(path, {}, overwrite=True)
    if (path / STAMP).is_file() and not overwrite:
        raise UserError(f"{path}: exists; pixel series are written as a whole: --overwrite true replaces it")
    with beside(path) as half:
        write_points_dataset(half, points)
        windows = Counter(point.split for point in points)
        counts: dict[str, Counter[str]] = {}
        for point in points if spec.task != "regression" else []:
            counts.setdefault(str(point.label[column]), Counter())[point.split] += 1
        summary = Summary(
            path=str(path), config=str(config), windows={s: windows[s] for s in SPLITS if windows[s]}, counts=counts,
            new=len(points), shift=0, notes=(note,) if note else (),
        )  # fmt: skip
        (half / STAMP).write_text(_as_json(summary), encoding="utf-8")
        text = dataset_config(_facts_of_series(spec, points, path, config, header))
        land(half, path, add=False)
    return _write_config(config, text, summary, overwrite=overwrite)


def _facts_of_series(
    spec: DatasetSpec, points: Sequence[PixelSeries], path: Path, config: Path, header: Sequence[str]
) -> Facts:
    column = str(spec.labels.column)
    inputs = {}
    for name, images in spec.images.items():
        samples = [point.sensors[name].values for point in points[:500]]
        never = any(np.isnan(point.sensors[name].values).any(axis=1).all() for point in points)
        units = images.units or guessed_units(name, samples)
        inputs[name] = InputOf(
            layer=name, bands=ordered_bands(spec.encoder, name, images.bands or ()), units=units, required=not never
        )
    numbers = [point.label[column] for point in points] if spec.task == "regression" else [0.0]
    named = list(spec.labels.classes.values()) if isinstance(spec.labels.classes, dict) else spec.labels.classes
    classes = named or sorted({str(point.label[column]) for point in points})
    return Facts(
        path=os.path.relpath(path, config.parent), task=spec.task, name=spec.task_name, inputs=inputs,
        label_layer=LABEL, column=column, classes=classes if spec.task == "classification" else (),
        spread=float(np.std(numbers)), splits=sorted({point.split for point in points}), encoder=spec.encoder,
        header=header,
    )  # fmt: skip


def _write(plan: Plan, half: Path, existing: Mapping[str, Mapping[str, Any]]) -> int:
    """Write the windows that are new; raises if one that was written before has other content now."""
    dataset = create(half, plan.layers)
    problems, new = Problems(), 0
    with Progress(transient=True) as progress:
        for window in progress.track(plan.windows, description="Writing windows"):
            try:
                content = read_content(window, plan.sources, plan.column)
            except UnreadableFile as error:
                problems.lines.append(str(error))
                continue
            before = existing.get(window.name)
            if before is not None:
                if before.get("content") != content.fingerprint:
                    message = f"window {window.name} was written before, with other content; --overwrite true replaces "
                    problems.add(window.where, f"{message}the whole dataset")
                continue
            options = {"split": plan.splits[window.name], "content": content.fingerprint}
            write_window(dataset, window.name, content, options, plan.nodata)
            new += 1
    problems.raise_any()
    return new


def _summary(plan: Plan, path: Path, config: Path, new: int) -> Summary:
    counts: dict[str, Counter[str]] = {name: Counter() for name in plan.classes}
    for window in plan.windows:
        for name, count in plan.counts(window).items():
            if name in counts:
                counts[name][plan.splits[window.name]] += int(count)
    windows = Counter(plan.splits[window.name] for window in plan.windows)
    shift = max(window.chip.grid.part(*window.part).shift for window in plan.windows)
    notes = list(plan.notes)
    if shift > 0.005:
        notes.insert(0, f"rslearn's grid: pixels lie up to {shift:.2f} m beside the place that their files name")
    missing = {
        source.name: sum(source.name not in window.chip.files_of(window.part) for window in plan.windows)
        for source in plan.sources
    }
    notes += [f"{count} windows have no image of {name}" for name, count in missing.items() if count]
    return Summary(
        path=str(path), config=str(config), windows={s: windows[s] for s in SPLITS if windows[s]},
        counts={name: dict(of_class) for name, of_class in counts.items()}, new=new, shift=shift, notes=tuple(notes),
    )  # fmt: skip


def _as_json(summary: Summary) -> str:
    return json.dumps(summary.__dict__, indent=2, ensure_ascii=False) + "\n"


def _facts(plan: Plan, path: Path, config: Path, header: Sequence[str]) -> Facts:
    spec = plan.spec
    sizes = [max(window.part[2:]) for window in plan.windows]
    inputs = {
        source.name: InputOf(
            layer=source.name,
            bands=ordered_bands(spec.encoder, source.name, source.bands),
            units=plan.units[source.name],
            required=all(source.name in window.chip.files_of(window.part) for window in plan.windows),
        )
        for source in plan.sources
    }
    return Facts(
        path=os.path.relpath(path, config.parent), task=spec.task, name=spec.task_name, inputs=inputs,
        label_layer=LABEL, column=plan.column, classes=plan.classes, nodata=plan.nodata, spread=plan.spread,
        box_size=spec.labels.box_size, size=max(sizes), splits=sorted(set(plan.splits.values())),
        encoder=spec.encoder, group=GROUP,
        header=header,
    )  # fmt: skip


def _write_config(config: Path, text: str, summary: Summary, *, overwrite: bool) -> Summary:
    """Write the dataset config; one that a person has changed stays, unless ``overwrite``."""
    if config.exists() and not overwrite:
        if config.read_text(encoding="utf-8") == text:
            return summary
        note = f"{config.name} exists and is left as it is (--overwrite true writes dataset and config anew)"
        return replace(summary, notes=(*summary.notes, note))
    write_atomic(config, text)
    return summary
