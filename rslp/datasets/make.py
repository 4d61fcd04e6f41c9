"""Make a dataset: read everything, say all problems at once, choose splits, write, and sum up."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress
from rslearn.dataset import Dataset
from upath import UPath

from rslp.datasets import preview
from rslp.datasets.chips import Chip, Places, find_chips
from rslp.datasets.config import SPLITS, DatasetSpec
from rslp.datasets.dataset_config import ENCODER_BANDS, Facts, InputOf, dataset_config
from rslp.datasets.grids import UnreadableFile, grid_of, lon_lat
from rslp.datasets.labels import UNLABELLED, Labelled, LabelReader, number_classes, number_values
from rslp.datasets.sources import Problems, Source, read_source
from rslp.datasets.splits import Member, assign, block_of, choose_side, too_near
from rslp.datasets.tables import read_table
from rslp.datasets.write import (
    GROUP,
    LABEL,
    STAMP,
    beside,
    create,
    existing_options,
    land,
    raster_layer,
    read_content,
    write_window,
)
from rslp.errors import UserError
from rslp.helios.images.statistics import shipped_statistics
from rslp.helios.images.units import DECIBEL, DIGITAL, EIGHT_BIT, LINEAR, REFLECTANCE, likely_units
from rslp.io import write_atomic
from rslp.suggest import did_you_mean

# Images that are read to guess units.
_SAMPLE = 8
_UNITS = {
    DIGITAL: "digital_numbers",
    REFLECTANCE: "reflectance",
    EIGHT_BIT: "reflectance_8bit",
    LINEAR: "linear",
    DECIBEL: "db",
}


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


@dataclass
class _Plan:
    """All that is known before anything is written."""

    spec: DatasetSpec
    sources: list[Source]
    units: dict[str, str | None]
    windows: list[Labelled]
    classes: list[str]
    nodata: float | None
    spread: float
    splits: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def layers(self) -> dict[str, Any]:
        """The layers of the dataset's ``config.json``."""
        layers: dict[str, Any] = {source.name: raster_layer(source.bands, source.dtype) for source in self.sources}
        dense = {"segmentation": "uint8", "per_pixel_regression": "float32"}
        if self.spec.task in dense:
            layers[LABEL] = raster_layer([LABEL], dense[self.spec.task])
        else:
            form = {"class_path": "rslearn.utils.vector_format.GeojsonVectorFormat"}
            layers[LABEL] = {"type": "vector", "vector_format": form}
        return layers

    @property
    def column(self) -> str:
        """The property of vector labels that holds the label."""
        return self.spec.labels.column or LABEL


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
    plan = _plan(spec, folder)
    existing = existing_options(path, plan.layers, overwrite=overwrite)
    _split(plan, folder, existing)
    with beside(path) as half:
        new = _write(plan, half, existing)
        summary = _summary(plan, path, config, new)
        preview.draw(half, plan.windows, plan.splits, plan.sources[0], plan.classes)
        (half / STAMP).write_text(_as_json(summary), encoding="utf-8")
        text = dataset_config(_facts(plan, path, config, command))
        summary = _write_config(config, text, summary, overwrite=overwrite)
        land(half, path, add=bool(existing))
    return summary


def _plan(spec: DatasetSpec, folder: Path) -> _Plan:
    """Read headers, labels and tables; raises all problems at once."""
    problems = Problems()
    sources = [read_source(name, images, folder, problems) for name, images in spec.images.items()]
    _check_bands(spec, sources, problems)
    problems.raise_any()
    chips = find_chips(sources, problems)
    _check_sizes(spec, chips, problems)
    reader = LabelReader(spec, folder, chips, problems)
    windows = reader.windows()
    classes: list[str] = []
    if spec.task in ("segmentation", "classification", "detection"):
        windows, classes = number_classes(windows, spec, problems)
    else:
        windows = number_values(windows, problems)
    if not windows:
        problems.add("labels", "no window has a label")
    _refuse_same_names(windows, problems)
    if spec.task == "detection" and spec.labels.box_size is None:
        point = next((w for w in windows for mark in w.marks if mark.shape.geom_type == "Point"), None)
        if point is not None:
            problems.add(point.where, "is a point; set labels.box_size: half of the side of its box, px")
    problems.raise_any()
    windows, nodata, spread = _numbers(spec, windows)
    units = {source.name: _units(spec, source) for source in sources}
    notes = [note for source in sources for note in source.notes] + reader.notes
    if reader.shift > 0:
        notes.append(f"labels lie up to {reader.shift:.2f} m beside the pixels of images to which they are copied")
    notes += [
        f"{name}: the values look like {unit.replace('_', ' ')} (images.{name}.units states it)"
        for name, unit in units.items()
        if unit and spec.images[name].units is None
    ]
    return _Plan(spec, sources, units, windows, classes, nodata, spread, notes=notes)


def _check_bands(spec: DatasetSpec, sources: Sequence[Source], problems: Problems) -> None:
    """Whether the encoder knows the inputs and their bands."""
    if spec.encoder == "helios":
        known = {name: [band.name for band in bands] for name, bands in shipped_statistics().items()}
    else:
        known = {name: list(bands) for name, bands in ENCODER_BANDS.get(spec.encoder, {}).items()}
    for source in sources:
        if source.name not in known:
            if known:
                hint = did_you_mean(source.name, known, otherwise="its inputs")
                problems.add(f"images.{source.name}", f"the encoder {spec.encoder} has no such input{hint}")
            continue
        if spec.encoder == "helios":
            wrong = [band for band in source.bands if band not in known[source.name]]
        else:
            wrong = [band for band in known[source.name] if band not in source.bands]
        if wrong and source.bands:
            hint = did_you_mean(wrong[0], known[source.name], otherwise="its bands")
            verb = "has no band" if spec.encoder == "helios" else "needs the band"
            message = f"the encoder {spec.encoder} {verb} {', '.join(wrong)}{hint}; name the files' bands with bands"
            problems.add(f"images.{source.name}", message)


def _check_sizes(spec: DatasetSpec, chips: Sequence[Chip], problems: Problems) -> None:
    around = spec.labels.objects is not None or (
        spec.labels.table is not None and spec.task in ("classification", "regression")
    )
    large = next((chip for chip in chips if max(chip.grid.width, chip.grid.height) > 4096), None)
    if spec.window.size is None and around and spec.labels.objects is not None:
        problems.add("window.size", "is missing: the side of the window around each object, px")
    elif spec.window.size is None and large is not None:
        side = max(large.grid.width, large.grid.height)
        problems.add("window.size", f"is missing: {large.name} is {side} px wide; say how large its windows should be")


def _refuse_same_names(windows: Sequence[Labelled], problems: Problems) -> None:
    first: dict[str, Labelled] = {}
    for window in windows:
        if window.name in first:
            problems.add(
                window.where, f"its window has the same name, {window.name}, as that of {first[window.name].where}"
            )
        first.setdefault(window.name, window)


def _numbers(spec: DatasetSpec, windows: list[Labelled]) -> tuple[list[Labelled], float | None, float]:
    """The windows with rasters in the type that is stored, their nodata value, and the spread of numeric labels."""
    if spec.task == "segmentation":
        return windows, float(UNLABELLED), 1.0
    if spec.task == "regression":
        return windows, None, float(np.std([mark.value for window in windows for mark in window.marks]))
    if spec.task != "per_pixel_regression":
        return windows, None, 1.0
    values = np.concatenate(
        [window.raster[~np.isnan(window.raster)] for window in windows if window.raster is not None]
    )
    # A value that no label has: rslearn compares with it.
    nodata = next(value for value in (-9999.0, -99999.0, -1e30) if not (values == value).any())
    stored = [
        replace(window, raster=np.where(np.isnan(window.raster), nodata, window.raster).astype(np.float32))
        for window in windows
        if window.raster is not None
    ]
    return stored, nodata, float(values.std())


def _units(spec: DatasetSpec, source: Source) -> str | None:
    """The units of an input: as stated, else as the values of some images look like."""
    if spec.images[source.name].units is not None:
        return spec.images[source.name].units
    modality = {"s2": "sentinel2_l2a", "s1": "sentinel1"}.get(source.name, source.name)
    step = max(1, len(source.files) // _SAMPLE)
    low, high, whole = math.inf, -math.inf, True
    for file in source.files[::step]:
        grid = file.raster.grid
        width, height = min(grid.width, 256), min(grid.height, 256)
        corner = (grid.width - width) // 2, (grid.height - height) // 2
        try:
            values = file.raster.read(*corner, width, height, indexes=list(file.indexes)).astype(np.float64)
        except UnreadableFile:
            continue
        valid = np.isfinite(values) & (values != 0) & (values != (source.nodata or 0)) & (values > -9999)
        if valid.any():
            low, high = min(low, values[valid].min()), max(high, values[valid].max())
            whole = whole and bool((values[valid] % 1 == 0).all())
    return _UNITS.get(str(likely_units(modality, low, high, whole=whole))) if low <= high else None


def _split(plan: _Plan, folder: Path, existing: Mapping[str, Mapping[str, Any]]) -> None:
    """Choose the split of each window, and leave windows in the buffer out."""
    spec, problems = plan.spec.split, Problems()
    values = _split_values(plan, folder, problems)
    fixed = {name: str(options["split"]) for name, options in existing.items()}
    if spec.like is not None:
        fixed = _splits_of(plan, folder / spec.like, problems) | fixed
    members = [_member(plan, window, values.get(window.name), fixed.get(window.name)) for window in plan.windows]
    if spec.by == "column":
        plan.splits = {name: str(value) for name, value in values.items()}
        of_object: dict[str, set[str]] = {}
        for window in plan.windows:
            for tie in window.ties:
                of_object.setdefault(tie, set()).add(plan.splits[window.name])
        if divided := sum(len(splits) > 1 for splits in of_object.values()):
            plan.notes.append(f"{divided} objects lie in several splits, as the column {spec.column} says")
        for window in plan.windows:
            split = plan.splits.get(window.name)
            if split is not None and split not in SPLITS:
                problems.add(window.where, f"its split {split!r} is none of {', '.join(SPLITS)}")
        problems.raise_any()
    else:
        problems.raise_any()
        if spec.by == "blocks":
            side = spec.size_m or choose_side(members)
            blocks = [block_of(m.lon, m.lat, side) for m in members]
            members = [replace(m, ties=m.ties | {f"block {b}"}) for m, b in zip(members, blocks, strict=True)]
            if spec.size_m is None:
                plan.notes.append(f"splits by blocks of {side / 1000:g} km: {len(set(blocks))} blocks (split.size_m)")
        plan.splits = assign(members, spec.shares)
    left_out = too_near(members, plan.splits, spec.buffer_m)
    left_out -= existing.keys()
    if left_out:
        plan.notes.append(f"{len(left_out)} windows lie within {spec.buffer_m:g} m of another split and are left out")
        plan.windows = [window for window in plan.windows if window.name not in left_out]
    counts = Counter(plan.splits[window.name] for window in plan.windows)
    wanted = list(spec.shares) if spec.by != "column" else ["train", "val"]
    if missing := [split for split in wanted if not counts[split]]:
        units = (
            "the column has none"
            if spec.by == "column"
            else "too few blocks or groups hold windows; lower split.size_m"
        )
        raise UserError(f"split: no window is in {', '.join(missing)}: {units}")


def _split_values(plan: _Plan, folder: Path, problems: Problems) -> dict[str, Any]:
    """The value of the split's column for each window."""
    spec = plan.spec.split
    if spec.column is None:
        return {}
    rows: dict[tuple[str, ...], Mapping[str, Any]] = {}
    keys: list[str] = []
    if spec.table is not None:
        table = read_table(folder / spec.table, plan.spec.labels, problems)
        columns = table.rows[0].values.keys() if table.rows else set()
        keys = sorted({key for window in plan.windows for key in window.chip.keys} & columns)
        if not keys:
            problems.add(folder / spec.table, "has no column that is a key of the images' paths")
            return {}
        rows = {tuple(str(row.values[key]) for key in keys): row.values for row in table.rows}
    values = {}
    for window in plan.windows:
        of_window = {**window.values, **rows.get(tuple(str(window.values.get(key)) for key in keys), {})}
        if of_window.get(spec.column) in (None, ""):
            hint = did_you_mean(spec.column, of_window, otherwise="there are")
            problems.add(window.where, f"has no value of split.column {spec.column!r}{hint}")
        values[window.name] = of_window.get(spec.column)
    return values


def _splits_of(plan: _Plan, path: Path, problems: Problems) -> dict[str, str]:
    """The split of each window that lies on windows of another dataset; one on several splits is left out."""
    if not (path / "config.json").is_file():
        problems.add("split.like", f"{path} is no rslearn dataset")
        return {}
    others = [window for window in Dataset(UPath(path)).load_windows() if "split" in window.options]
    places = Places([grid_of(window) for window in others])
    splits: dict[str, set[str]] = {}
    for window in plan.windows:
        grid = window.chip.grid.part(*window.part)
        # Less than a tenth of a pixel is a common edge.
        inner = grid.box.buffer(-grid.x_size / 10)
        splits[window.name] = {others[index].options["split"] for index in places.touching(inner, grid.crs)}
    divided = {name for name, of_window in splits.items() if len(of_window) > 1}
    if divided:
        plan.notes.append(f"{len(divided)} windows lie on windows of several splits of {path.name} and are left out")
        plan.windows = [window for window in plan.windows if window.name not in divided]
    return {name: next(iter(of_window)) for name, of_window in splits.items() if len(of_window) == 1}


def _member(plan: _Plan, window: Labelled, value: Any, fixed: str | None) -> Member:
    grid = window.chip.grid.part(*window.part)
    lon, lat = lon_lat(grid)
    width, height = grid.metres
    ties = window.ties | ({f"group {value}"} if plan.spec.split.by == "group" else set())
    return Member(
        name=window.name, lon=lon, lat=lat, radius=math.hypot(grid.width * width, grid.height * height) / 2,
        counts=_counts(plan, window), ties=frozenset(ties), fixed=fixed,
    )  # fmt: skip


def _counts(plan: _Plan, window: Labelled) -> dict[str, float]:
    """How much of each class a window holds; of numbers, one of the quarter that its value is in."""
    if plan.spec.task == "segmentation" and window.raster is not None:
        values, numbers = np.unique(window.raster, return_counts=True)
        pairs = zip(values.tolist(), numbers.tolist(), strict=True)
        return {plan.classes[value]: number for value, number in pairs if value != UNLABELLED}
    if plan.classes:
        return dict(Counter(mark.value for mark in window.marks)) or {"no object": 1}
    return {"windows": 1}


def _write(plan: _Plan, half: Path, existing: Mapping[str, Mapping[str, Any]]) -> int:
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


def _summary(plan: _Plan, path: Path, config: Path, new: int) -> Summary:
    counts: dict[str, Counter[str]] = {name: Counter() for name in plan.classes}
    for window in plan.windows:
        for name, count in _counts(plan, window).items():
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


def _facts(plan: _Plan, path: Path, config: Path, command: str) -> Facts:
    spec = plan.spec
    sizes = [max(window.part[2:]) for window in plan.windows]
    inputs = {
        source.name: InputOf(
            layer=source.name,
            bands=ENCODER_BANDS.get(spec.encoder, {}).get(source.name, source.bands),
            units=plan.units[source.name],
            required=all(source.name in window.chip.files_of(window.part) for window in plan.windows),
        )
        for source in plan.sources
    }
    return Facts(
        path=os.path.relpath(path, config.parent), task=spec.task, name=spec.name or path.name, inputs=inputs,
        label_layer=LABEL, column=plan.column, classes=plan.classes, nodata=plan.nodata, spread=plan.spread,
        box_size=spec.labels.box_size, size=max(sizes), splits=sorted(set(plan.splits.values())),
        encoder=spec.encoder, group=GROUP,
        header=(f"Written by: {command}", "A dataset config, see docs/dataset_config.md."),
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


def lines_of(summary: Summary) -> Iterable[str]:
    """The notes of a summary, for a terminal."""
    return [f"note: {note}" for note in summary.notes]
