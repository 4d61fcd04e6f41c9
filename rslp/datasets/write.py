"""Write windows through rslearn's own API: beside the dataset at first, and into it when all is done."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from rslearn.dataset import Dataset, Window
from rslearn.utils.feature import Feature
from rslearn.utils.geometry import PixelBounds, Projection, STGeometry
from rslearn.utils.raster_array import RasterArray, RasterMetadata
from rslearn.utils.vector_format import GeojsonVectorFormat
from upath import UPath

from rslp import upstream
from rslp.datasets.chips import Chip, Part
from rslp.datasets.config import Span
from rslp.datasets.grids import Array, Grid, transformed
from rslp.datasets.labels import Labelled
from rslp.datasets.sources import ImageFile, Source
from rslp.errors import UserError
from rslp.io import full_disk, new_folder, replace_folder

GROUP = "default"
LABEL = "label"
# Written last into a dataset, so that another folder is never replaced.
STAMP = "summary.json"
_TIFF = {
    "class_path": "rslearn.utils.raster_format.GeotiffRasterFormat",
    "init_args": {"geotiff_options": {"compress": "deflate", "zlevel": 1, "interleave": "band"}},
}


def raster_layer(bands: Sequence[str], dtype: str, form: Mapping[str, Any] = _TIFF) -> dict[str, Any]:
    """A raster layer of a dataset's ``config.json``."""
    return {"type": "raster", "band_sets": [{"bands": list(bands), "dtype": dtype, "format": dict(form)}]}


@dataclass(frozen=True)
class Image:
    """The images of one input in one window.

    Attributes:
        projection: where the pixels lie: that of the window, or the sensor's own.
        bounds: in pixels of the projection.
        values: ``C T H W``.
        spans: when each was taken.
    """

    projection: Projection
    bounds: PixelBounds
    values: Array
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Content:
    """All that is written of one window.

    Attributes:
        projection: that of the window.
        bounds: those of the window.
        images: by input.
        raster: label ``H W`` of a dense task.
        features: other labels, in pixels of the projection.
    """

    projection: Projection
    bounds: PixelBounds
    images: Mapping[str, Image]
    raster: Array | None
    features: tuple[tuple[shapely.Geometry, Mapping[str, Any]], ...]

    @property
    def fingerprint(self) -> str:
        """A hash of everything, by which a window that was written before is compared."""
        digest = hashlib.sha256(repr((str(self.projection), self.bounds)).encode())
        for name, image in self.images.items():
            digest.update(repr((name, str(image.projection), image.bounds, image.values.shape, image.spans)).encode())
            digest.update(np.ascontiguousarray(image.values).tobytes())
        if self.raster is not None:
            digest.update(np.ascontiguousarray(self.raster).tobytes())
        digest.update(repr([(shape.wkt, sorted(facts.items())) for shape, facts in self.features]).encode())
        return digest.hexdigest()[:32]


def read_content(window: Labelled, sources: Sequence[Source], column: str) -> Content:
    """Read the pixels of a window, and bring its label to the place at which rslearn stores it.

    Args:
        window: the window.
        sources: the images by input.
        column: the property that holds the label.

    Raises:
        UnreadableFile: a file is damaged.
    """
    grid = window.chip.grid.part(*window.part)
    files = window.chip.files_of(window.part)
    images = {
        source.name: _image(window.chip, window.part, files[source.name], source)
        for source in sources
        if source.name in files
    }
    left, top, *_ = grid.bounds

    def to_pixels(xy: Array) -> Array:
        # Beside the origin that rslearn stores, the label is moved with the pixels.
        return np.column_stack([(xy[:, 0] - grid.left) / grid.x_size + left, (grid.top - xy[:, 1]) / grid.y_size + top])

    features = tuple(
        (shapely.transform(mark.shape, to_pixels), {column: mark.value, **({"id": mark.id} if mark.id else {})})
        for mark in window.marks
    )
    return Content(grid.projection, grid.bounds, images, window.raster, features)


def _image(chip: Chip, part: Part, files: Sequence[ImageFile], source: Source) -> Image:
    """Read the series of one input: on the window's pixels where they match, else on the sensor's own grid."""
    window, own = chip.grid.part(*part), files[0].raster.grid
    target, bounds = window, window.bounds
    if own.offset_of(window) is None:
        cover = own.cover(transformed(window.box, window.crs, own.crs))
        # Their images cover at least half of the window.
        assert cover is not None
        target = own.part(*cover)
        bounds = target.bounds
    layers = [_read_padded(file, target, source) for file in files]
    values = np.stack(layers, axis=1).astype(source.dtype, copy=False)
    if source.nodata:
        # A declared nodata value would not do: where only some bands have it, GDAL changes it to a value beside it.
        values[values == np.float32(source.nodata)] = np.nan
    return Image(target.projection, bounds, values, tuple(file.span for file in files if file.span))


def _read_padded(file: ImageFile, target: Grid, source: Source) -> Array:
    """``C H W`` of a file on a grid of matching pixels; nodata (or 0) outside of the file."""
    grid, fill = file.raster.grid, source.nodata or 0
    offset = grid.offset_of(target)
    if offset is None:
        raise UserError(f"{file.path}: has other pixels than the images of other dates; bring them to one grid first")
    column, row, _ = offset
    x0, y0 = max(column, 0), max(row, 0)
    x1, y1 = min(column + target.width, grid.width), min(row + target.height, grid.height)
    values = file.raster.read(x0, y0, x1 - x0, y1 - y0, indexes=list(file.indexes))
    if values.shape[1:] == (target.height, target.width):
        return values
    padded = np.full((len(values), target.height, target.width), fill, dtype=source.dtype)
    padded[:, y0 - row : y1 - row, x0 - column : x1 - column] = values
    return padded


def create(root: Path, layers: Mapping[str, Any]) -> Dataset:
    """Make a dataset's folder with its ``config.json``, and open it."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps({"layers": layers}, indent=2) + "\n", encoding="utf-8")
    upstream.write_whole_files()
    dataset = Dataset(UPath(root))
    # rslearn announces every window that it writes (a logger that exists only once a dataset was opened).
    logging.getLogger("rslearn.dataset.storage.file").setLevel(logging.WARNING)
    return dataset


def write_window(
    dataset: Dataset, name: str, content: Content, options: Mapping[str, Any], nodata: float | None
) -> None:
    """Write one window.

    Args:
        dataset: the dataset.
        name: the window's name.
        content: images and label.
        options: its split and other facts, by which a data module chooses windows.
        nodata: the value of pixels without a label.
    """
    spans = [span for image in content.images.values() for span in image.spans]
    window = Window(
        storage=dataset.storage,
        group=GROUP,
        name=name,
        projection=content.projection,
        bounds=content.bounds,
        time_range=(min(start for start, _ in spans), max(end for _, end in spans)),
        options=dict(options),
        data_factory=dataset.window_data_storage_factory,
    )
    window.save()
    for layer, image in content.images.items():
        raster = RasterArray(array=image.values, timestamps=list(image.spans))
        _write_raster(dataset, window, layer, image.projection, image.bounds, raster)
    if content.raster is not None:
        label = RasterArray(
            chw_array=content.raster[np.newaxis],
            time_range=window.time_range,
            metadata=RasterMetadata(nodata_value=nodata),
        )
        _write_raster(dataset, window, LABEL, window.projection, window.bounds, label)
    else:
        with window.data.open_layer_writer(LABEL) as writer:
            features = [Feature(STGeometry(window.projection, s, None), dict(facts)) for s, facts in content.features]
            writer.write_vector(GeojsonVectorFormat(), features)
        window.mark_layer_completed(LABEL)


def _write_raster(
    dataset: Dataset, window: Window, layer: str, projection: Projection, bounds: PixelBounds, raster: RasterArray
) -> None:
    bands = dataset.layers[layer].band_sets[0]
    with window.data.open_layer_writer(layer) as writer:
        writer.write_raster(bands.bands, bands.instantiate_raster_format(), projection, bounds, raster)
    window.mark_layer_completed(layer)


def existing_options(path: Path, layers: Mapping[str, Any], *, overwrite: bool) -> dict[str, dict[str, Any]]:
    """The options of the windows that a dataset has already, by name; none where it is written anew.

    Raises:
        UserError: the folder is something else, or a dataset with other layers.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return {}
    if not (path / STAMP).is_file():
        raise UserError(f"{path}: exists and was not made by make_dataset; name another folder as path")
    if overwrite:
        return {}
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if config.get("layers") != json.loads(json.dumps(layers)):
        raise UserError(
            f"{path}: is a dataset with other inputs, bands or types of values; --overwrite true replaces it, another "
            "path keeps it"
        )
    return {window.name: dict(window.options) for window in Dataset(UPath(path)).load_windows()}


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A hidden folder beside a path, removed at the end whatever happens.

    Raises:
        UserError: the folder can't be made, or the disk is full.
    """
    try:
        with new_folder(path) as half:
            yield half
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"{path}: can't be written: {error.strerror}") from None
    except OSError as error:
        raise full_disk(error, path) or error from None


def land(half: Path, path: Path, *, add: bool) -> None:
    """Move a finished folder to its place: in place of what is there, or with ``add`` its windows into the dataset."""
    if not add:
        replace_folder(path, half)
        return
    for window in sorted((half / "windows" / GROUP).glob("*")):
        window.rename(path / "windows" / GROUP / window.name)
    for file in sorted(half.iterdir()):
        if file.is_file():
            file.replace(path / file.name)
