"""What a person writes to have a dataset made: the YAML file of ``make_dataset``, checked key by key."""

from __future__ import annotations

import datetime as dt
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from rslp.config.multi_dataset import problem_of
from rslp.errors import ConfigError, Problem
from rslp.io import Document

TaskName = Literal["classification", "regression", "segmentation", "per_pixel_regression", "detection"]
Units = Literal["digital_numbers", "reflectance", "reflectance_8bit", "db", "linear"]
Encoder = Literal["helios", "galileo", "presto", "none"]
SPLITS = ("train", "val", "test")
Span = tuple[dt.datetime, dt.datetime]


def _day(value: Any) -> dt.datetime:
    if isinstance(value, str):
        value = dt.datetime.fromisoformat(value.strip())
    if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
        value = dt.datetime(value.year, value.month, value.day)
    if not isinstance(value, dt.datetime):
        raise ValueError("must be a date such as 2022-05-31")
    return value if value.tzinfo else value.replace(tzinfo=dt.UTC)


def span_of(value: Any) -> Span:
    """The time range of a date, of two dates, or of two with a slash between them; the last day is included.

    Raises:
        ValueError: it is none of these, or ends before it starts.
    """
    parts = value.split("/") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    if len(parts) not in (1, 2):
        raise ValueError("must be one date, or the first and the last day: [2022-01-01, 2022-05-31]")
    first, last = _day(parts[0]), _day(parts[-1])
    end = last + dt.timedelta(days=1) if last.time() == dt.time() else last
    if end <= first:
        raise ValueError(f"ends ({last:%Y-%m-%d}) before it starts ({first:%Y-%m-%d})")
    return first, end


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Images(_Model):
    """The images of one sensor: one input of the model."""

    files: str | None = None
    """Pattern of the files' paths, with keys in braces: ``chips/{chip}_{date:%Y%m%d}.tif``."""
    layer: str | None = None
    """With ``dataset``: the layer that holds them; by default that of the input's name."""
    date: Annotated[Span | None, BeforeValidator(lambda value: None if value is None else span_of(value))] = None
    """When they were taken: one date, or the first and last day of a composite; or a key of the pattern."""
    bands: list[str] | None = None
    """The bands to take, in this order; by default all, as the files describe them."""
    units: Units | None = None
    """The unit of the values; by default guessed from them, and stated."""
    nodata: float | None = None
    """The value of pixels without a measurement, where the files declare none."""


class Labels(_Model):
    """The labels: rasters (``files``), or a table (``table``)."""

    files: str | None = None
    """Pattern of label rasters, one value for each pixel."""
    objects: str | None = None
    """Pattern of rasters with a number for each object (a field), 0 for none: a label for each object, not pixel."""
    table: str | None = None
    """A table: CSV, GeoJSON, GeoPackage, shapefile, GeoParquet."""
    layer: str | None = None
    """With ``dataset``: the layer that holds the labels. Of a GeoPackage: the layer to read."""
    column: str | None = None
    """The column (property) that holds the label."""
    date: str | None = None
    """Pixel series: the column of dates of a table with a row for each pixel (``id``) and date, and a column a band."""
    id: str | None = None
    """The column that names an object; all windows of one object are in one split."""
    lon: str = "lon"
    """The column of longitudes of a CSV, in degrees; or x, with ``crs``."""
    lat: str = "lat"
    """The column of latitudes of a CSV, in degrees; or y, with ``crs``."""
    crs: str | None = None
    """The CRS of the coordinates, where the table does not say; WGS84 for a CSV."""
    classes: dict[int, str] | list[str] | None = None
    """The classes in order: a list of names, or value -> name of rasters; by default all that occur."""
    ignore: list[int | str] = []
    """Values that mean: no label."""
    nodata: float | None = None
    """The value of pixels without a label, where label rasters declare none."""
    background: str | None = None
    """Segmentation from polygons: the class outside of all polygons; by default pixels there have no label."""
    box_size: int | None = None
    """Detection: half of the side, in px, of the box that a point becomes."""
    resample: bool = False
    """Whether label rasters on another grid than the images are resampled to it (nearest)."""


class WindowSize(_Model):
    """The size of windows."""

    size: int | None = None
    """Side in px: larger inputs are cut; around a point or an object, the window's side. Default: a file, a window."""


class Split(_Model):
    """How windows are given to splits."""

    by: Literal["blocks", "column", "group"] = "blocks"
    """``blocks``: by place; ``column``: a column or key names the split; ``group``: equal values stay together."""
    column: str | None = None
    """The column of the table, or key of the patterns, for ``column`` and ``group``."""
    table: str | None = None
    """Another table (CSV) to look the column up in, by the keys that it shares with the patterns."""
    size_m: float | None = None
    """Side of a block in metres; by default the largest that gives at least 20 blocks."""
    like: str | None = None
    """Another dataset: windows on its windows get the same split, which joint training of both needs."""
    buffer_m: float = 0
    """Windows nearer than this, in metres, to one of another split are left out (of the larger split)."""
    shares: dict[str, float] = {"train": 0.7, "val": 0.15, "test": 0.15}
    """The share of each split."""

    @model_validator(mode="after")
    def _check(self) -> Split:
        if self.by != "blocks" and self.column is None:
            raise ValueError(f"by: {self.by} needs a column")
        if any(share <= 0 for share in self.shares.values()) or abs(sum(self.shares.values()) - 1) > 1e-6:
            raise ValueError("shares must be positive numbers whose sum is 1; leave out a split that you don't want")
        if not {"train", "val"} <= self.shares.keys() <= set(SPLITS):
            raise ValueError("shares must name train and val, and may name test")
        return self


class DatasetSpec(_Model):
    """A whole file."""

    path: str
    """The rslearn dataset to write (or with ``dataset``: that exists already), relative to this file."""
    config: str | None = None
    """The dataset config to write; by default the path with ``.yaml`` behind it."""
    name: str | None = None
    """Name of the task; by default the name of the path."""
    task: TaskName
    """The kind of task."""
    images: dict[str, Images]
    """For each input, by the name that the encoder has for it (such as ``sentinel2_l2a``), its images."""
    labels: Labels
    """The labels."""
    dataset: bool = False
    """Whether ``path`` is an rslearn dataset already, for which only the dataset config is written."""
    window: WindowSize = WindowSize()
    """The size of windows."""
    split: Split = Split()
    """How windows are given to splits."""
    encoder: Encoder = "helios"
    """The encoder for which the dataset config normalises: `helios`, `galileo`, `presto`, or `none`."""

    @property
    def task_name(self) -> str:
        """The name of the task: letters, digits and ``_``, since torch's modules are named by it."""
        return re.sub(r"\W+", "_", self.name or Path(self.path).name)

    @property
    def series(self) -> bool:
        """Whether the table holds series of pixels, with the values of images."""
        return self.labels.date is not None or str(self.labels.table).endswith(".npz")

    @model_validator(mode="after")
    def _check(self) -> DatasetSpec:
        if not Path(self.path).name.strip("."):
            raise ValueError(f"path {self.path!r} has no name; write the folder's own, such as datasets/fields")
        if not self.images:
            raise ValueError("images names no input")
        if self.dataset:
            return self
        labels = self.labels
        if self.series:
            if lacking := [name for name, images in self.images.items() if images.files or not images.bands]:
                raise ValueError(f"images.{lacking[0]}: of a table of pixel series, say the bands and no files")
        elif lacking := [name for name, images in self.images.items() if images.files is None]:
            raise ValueError(f"images.{lacking[0]} has no files")
        if (labels.files is None) == (labels.table is None):
            raise ValueError("labels must have either files (rasters) or a table")
        if labels.table is not None and labels.column is None:
            raise ValueError("labels.column is missing: which column of the table holds the label?")
        if labels.objects is not None and labels.files is None:
            raise ValueError("labels.objects needs labels.files: the rasters with the label of each pixel")
        return self._check_task()

    def _check_task(self) -> DatasetSpec:
        labels, dense = self.labels, self.task in ("segmentation", "per_pixel_regression")
        if labels.table is not None and self.task == "per_pixel_regression":
            raise ValueError("per_pixel_regression needs label rasters (labels.files)")
        if labels.files is not None and not dense and (self.task == "detection" or labels.objects is None):
            hint = "labels.table" if self.task == "detection" else "labels.objects, or labels.table"
            raise ValueError(f"label rasters make a segmentation or a per_pixel_regression; {self.task} needs {hint}")
        if labels.background is not None and (self.task != "segmentation" or labels.table is None):
            raise ValueError("labels.background is for the segmentation of polygons")
        if self.window.size is not None and self.window.size < 1:
            raise ValueError(f"window.size must be 1 or more, got {self.window.size}")
        return self


_MODELS: dict[str, type[BaseModel]] = {
    "": DatasetSpec,
    "images": Images,
    "labels": Labels,
    "window": WindowSize,
    "split": Split,
}


def parse_spec(document: Document) -> DatasetSpec:
    """Check a file.

    Raises:
        ConfigError: all problems, each with line and key.
    """
    if not isinstance(document.data, Mapping):
        raise ConfigError(Problem("must be a mapping with path, task, images and labels", document.name))
    try:
        return DatasetSpec.model_validate(document.data)
    except ValidationError as error:
        problems = [problem_of(each, document, _MODELS) for each in error.errors()]
        # Where a key takes several types, pydantic has an error for each.
        firsts: dict[str, Problem] = {}
        for problem in problems:
            firsts.setdefault(problem.key, problem)
        raise ConfigError(firsts.values()) from None


def folder_of(document: Document) -> Path:
    """The folder that relative paths of a file start from; below the current directory, it is relative to that."""
    folder = Path(document.folder)
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def key_table(model: type[BaseModel] = DatasetSpec) -> str:
    """All keys of a config file, with defaults and meaning, as a table of Markdown: for the docs."""
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *_key_rows(model, "")])


def _key_rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, entry in model.model_fields.items():
        inner = [t for t in (entry.annotation, *typing.get_args(entry.annotation)) if isinstance(t, type)]
        models = [t for t in inner if issubclass(t, BaseModel)]
        default = "required" if entry.is_required() else "" if entry.default is None else entry.default
        default = str(default).lower() if isinstance(default, bool) else default
        shown = (
            "" if models and not entry.is_required() else f"`{default}`" if default not in ("", "required") else default
        )
        meaning = " ".join(str(entry.description).replace("``", "`").split())
        yield f"| `{prefix}{name}` | {shown} | {meaning} |"
        for part in models:
            yield from _key_rows(part, f"{prefix}{name}.{'<input>.' if part is Images else ''}")
