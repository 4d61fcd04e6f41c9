"""Everything that is known before a dataset is written: images, labels, classes and units; all problems at once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.features import rasterize

from rslp.datasets.chips import Chip, find_chips
from rslp.datasets.config import DatasetSpec
from rslp.datasets.dataset_config import ENCODER_BANDS
from rslp.datasets.grids import Array, UnreadableFile
from rslp.datasets.labels import Labelled, LabelReader
from rslp.datasets.sources import Problems, Source, read_source
from rslp.datasets.write import LABEL, raster_layer
from rslp.helios.images.statistics import shipped_statistics
from rslp.helios.images.units import DECIBEL, DIGITAL, EIGHT_BIT, LINEAR, REFLECTANCE, likely_units
from rslp.suggest import did_you_mean

# The value of pixels without a class; classes are numbered from 0 on.
UNLABELLED = 255
# Images that are read to guess units.
_SAMPLE = 8
_UNITS = {
    DIGITAL: "digital_numbers",
    REFLECTANCE: "reflectance",
    EIGHT_BIT: "reflectance_8bit",
    LINEAR: "linear",
    DECIBEL: "db",
}


@dataclass
class Plan:
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

    def counts(self, window: Labelled) -> dict[str, float]:
        """How much of each class a window holds: pixels, or objects; of numbers, that it is one window."""
        if self.spec.task == "segmentation" and window.raster is not None:
            values, numbers = np.unique(window.raster, return_counts=True)
            pairs = zip(values.tolist(), numbers.tolist(), strict=True)
            return {self.classes[value]: number for value, number in pairs if value != UNLABELLED}
        if self.classes:
            return dict(Counter(mark.value for mark in window.marks)) or {"no object": 1}
        return {"windows": 1}


def make_plan(spec: DatasetSpec, folder: Path) -> Plan:
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
    return Plan(spec, sources, units, windows, classes, nodata, spread, notes=notes)


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
    large = next((chip for chip in chips if max(chip.grid.width, chip.grid.height) > 4096), None)
    if spec.window.size is None and spec.labels.objects is not None:
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
    step = max(1, len(source.files) // _SAMPLE)
    samples = []
    for file in source.files[::step]:
        grid = file.raster.grid
        width, height = min(grid.width, 256), min(grid.height, 256)
        corner = (grid.width - width) // 2, (grid.height - height) // 2
        try:
            values = file.raster.read(*corner, width, height, indexes=list(file.indexes)).astype(np.float64)
        except UnreadableFile:
            continue
        samples.append(values[values != (source.nodata or 0)])
    return guessed_units(source.name, samples)


def guessed_units(name: str, samples: Sequence[Array]) -> str | None:
    """The units that some values of an input look like; None for inputs without known units."""
    values = np.concatenate([np.ravel(sample) for sample in samples]).astype(np.float64) if samples else np.empty(0)
    values = values[np.isfinite(values) & (values != 0) & (values > -9999)]
    if not values.size:
        return None
    whole = bool((values % 1 == 0).all())
    return _UNITS.get(str(likely_units(name, float(values.min()), float(values.max()), whole=whole)))


def number_classes(
    windows: Sequence[Labelled], spec: DatasetSpec, problems: Problems
) -> tuple[list[Labelled], list[str]]:
    """Replace the values of classes: in rasters by the number of the class, in vector labels by its name.

    Returns:
        The windows, and the classes in order.
    """
    dense = spec.task == "segmentation" and spec.labels.files is not None
    values: dict[Any, Labelled] = {}
    for window in windows:
        if dense and window.raster is not None:
            of_window: Sequence[Any] = np.unique(window.raster[~np.isnan(window.raster)]).tolist()
        else:
            of_window = [mark.value for mark in window.marks]
        for value in of_window:
            values.setdefault(_key(value), window)
    names = _class_names(values, spec)
    for value, window in values.items():
        if value not in names:
            listed = ", ".join(map(str, list(names)[:20]))
            message = f"has the class {value}, which labels.classes lacks ({listed}); add it there or to labels.ignore"
            problems.add(window.where, message)
    classes = list(dict.fromkeys(names.values()))
    if spec.labels.background is not None:
        classes = list(dict.fromkeys([spec.labels.background, *classes]))
    if len(classes) > UNLABELLED:
        problems.add("labels", f"{len(classes)} classes; at most {UNLABELLED} are possible. Is the label a number?")
        return list(windows), []
    if len(classes) < 2 and spec.task != "detection" and windows:
        problems.add("labels.classes", f"a {spec.task} needs two classes; there is {', '.join(classes) or 'none'}")
    if problems.lines:
        return list(windows), classes
    return [_with_classes(window, names, classes, spec) for window in windows], classes


def _key(value: Any) -> str:
    """A value as it is written: 1 for 1.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _class_names(values: Mapping[str, Any], spec: DatasetSpec) -> dict[str, str]:
    """The name of the class of each value."""
    classes = spec.labels.classes
    if isinstance(classes, dict):
        return {str(value): name for value, name in classes.items()}
    if classes is not None:
        in_files = spec.labels.files is not None
        return {str(number) if in_files else name: name for number, name in enumerate(classes)}

    def order(value: str) -> tuple[float, str]:
        try:
            return float(value), ""
        except ValueError:
            return math.inf, value

    return {value: value for value in sorted(values, key=order)}


def _with_classes(window: Labelled, names: Mapping[str, str], classes: Sequence[str], spec: DatasetSpec) -> Labelled:
    numbers = {name: number for number, name in enumerate(classes)}
    if spec.task != "segmentation":
        marks = tuple(replace(mark, value=names[_key(mark.value)]) for mark in window.marks)
        return replace(window, marks=marks)
    if window.raster is not None:
        raster = np.full(window.raster.shape, UNLABELLED, dtype=np.uint8)
        for value in np.unique(window.raster[~np.isnan(window.raster)]).tolist():
            raster[window.raster == value] = numbers[names[_key(value)]]
        return replace(window, raster=raster)
    grid = window.chip.grid.part(*window.part)
    fill = UNLABELLED if spec.labels.background is None else numbers[spec.labels.background]
    shapes = [(mark.shape, numbers[names[_key(mark.value)]]) for mark in window.marks]
    shape = (grid.height, grid.width)
    raster = np.full(shape, fill, dtype=np.uint8)
    if shapes:
        raster = rasterize(shapes, out_shape=shape, fill=fill, transform=grid.transform, dtype="uint8")
    return replace(window, raster=raster, marks=())


def number_values(windows: Sequence[Labelled], problems: Problems) -> list[Labelled]:
    """The windows of a regression, with vector labels as numbers."""
    result = []
    for window in windows:
        marks = tuple(replace(mark, value=finite(mark.value, window.where, problems)) for mark in window.marks)
        result.append(replace(window, marks=marks))
    return result


def finite(value: Any, where: str, problems: Problems) -> float:
    """A label as a number; NaN, and a problem, for one that is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        problems.add(where, f"its label {value!r} is no number")
    return number
