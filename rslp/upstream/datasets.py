"""rslearn's datasets: list windows, read samples, write files atomically.

Most functions here use private parts of rslearn, or replace parts of it that are wrong or slow for us.
"""

from __future__ import annotations

import hashlib
import io
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import yaml
from rasterio.io import DatasetReader, DatasetWriter, MemoryFile
from rslearn.config import LayerType
from rslearn.dataset import Dataset, Window
from rslearn.dataset.storage.file import FileWindowStorage, load_window
from rslearn.dataset.storage.sqlite import SQLiteWindowStorage
from rslearn.dataset.window import get_layer_and_group_from_dir_name
from rslearn.train.all_crops_dataset import get_window_crop_options
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.dataset import DataInput, SplitConfig, check_window, is_data_input_available, read_data_input
from rslearn.train.model_context import RasterImage, SampleMetadata
from rslearn.train.prediction_writer import RslearnWriter
from rslearn.train.tasks.multi_task import MultiTask
from rslearn.train.tasks.task import Task
from rslearn.utils import raster_format, vector_format
from rslearn.utils.feature import Feature
from rslearn.utils.fsspec import iter_nonhidden, iter_nonhidden_subdirs
from rslearn.utils.geometry import PixelBounds
from rslearn.utils.raster_format import RasterFormat
from rslearn.utils.vector_format import VectorFormat
from upath import UPath

from rslp.errors import DataError
from rslp.io import write_atomic
from rslp.runtime.slow_reads import refuse_pipes
from rslp.upstream.nodata import NodataFormat
from rslp.upstream.parser import prepare_parser
from rslp.upstream.vectors import plain_geojson

# An input as rslearn reads it, before a task and transforms.
RawInput = RasterImage | list[Feature]
RawInputs = dict[str, RawInput]


def open_dataset(path: UPath) -> Dataset:
    """Open a dataset, whose config may name only the classes that a run config may name; its formats are made once."""
    prepare_parser()
    return keep_formats(Dataset(path))


def write_unsynced(dataset: Dataset) -> None:
    """Do not wait for the disk at each write of a dataset that keeps its windows in SQLite; a crash may damage it."""
    if isinstance(dataset.storage, SQLiteWindowStorage):
        dataset.storage._get_connection().execute("PRAGMA synchronous=OFF")


def keep_formats(dataset: Dataset) -> Dataset:
    """Instantiate a dataset's vector formats once and keep them; rslearn parses their config at each read (4 ms)."""
    for layer in dataset.layers.values():
        if layer.type == LayerType.VECTOR:
            # A pydantic model refuses new attributes; a partial, unlike a lambda, can be pickled for a worker process.
            instantiate = partial(_identity, plain_geojson(layer.instantiate_vector_format()))
            object.__setattr__(layer, "instantiate_vector_format", instantiate)
    return dataset


def _identity(value: VectorFormat) -> VectorFormat:
    return value


def wrap_raster_formats(dataset: Dataset, wrap: Callable[[RasterFormat], RasterFormat]) -> Dataset:
    """Replace each raster format of a dataset, in place, by ``wrap`` of it; it is a private field of rslearn's."""
    for layer in dataset.layers.values():
        for band_set in layer.band_sets:
            band_set._raster_format = wrap(band_set.instantiate_raster_format())
    return dataset


def write_whole_files() -> None:
    """Make rslearn write rasters and vectors by ``write_atomic``, in the whole process, by replacing its functions.

    Otherwise a full disk leaves incomplete files: GDAL raises nothing when it closes one, and rslearn does not check.
    """
    raster_format.open_rasterio_upath_writer = _atomic_raster  # type: ignore[attr-defined]
    vector_format.open_atomic = _atomic_text  # type: ignore[attr-defined]


@contextmanager
def _atomic_raster(path: UPath, **profile: Any) -> Iterator[DatasetWriter]:
    with MemoryFile() as memory:
        with memory.open(**profile) as raster:
            yield raster
        write_atomic(str(path).removeprefix("file://"), memory.read())


@contextmanager
def _atomic_text(path: UPath, mode: str) -> Iterator[io.StringIO]:
    del mode
    yield (text := io.StringIO())
    write_atomic(str(path).removeprefix("file://"), text.getvalue())


def with_nodata_marked(dataset: Dataset, data_input: DataInput) -> Dataset:
    """A dataset from which a raster input is read with its nodata pixels marked, see ``rslp.upstream.nodata``.

    It has ``layers`` and nothing else, which is all that rslearn's reading functions use of a dataset.
    """
    if data_input.data_type != "raster":
        return dataset
    layers = dict(dataset.layers)
    names = dict.fromkeys(get_layer_and_group_from_dir_name(option)[0] for option in data_input.layers)
    for name in (name for name in names if name in layers):
        band_sets = []
        for band_set in layers[name].band_sets:
            band_sets.append(band_set.model_copy())
            band_sets[-1]._raster_format = NodataFormat(band_set.instantiate_raster_format(), data_input)
        layers[name] = layers[name].model_copy(update={"band_sets": band_sets})
    return cast(Dataset, SimpleNamespace(layers=layers))


@contextmanager
def observe_rasters(observe: Callable[[DatasetReader], None]) -> Iterator[None]:
    """Call ``observe`` with every raster that rslearn's GeoTIFF format opens in this block, while it is open.

    So its grid is known without opening it a second time, which would make reading a third slower.
    """
    module: Any = raster_format
    original = module.open_rasterio_upath_reader

    @contextmanager
    def observed(path: UPath, **options: Any) -> Iterator[DatasetReader]:
        with original(path, **options) as source:
            observe(source)
            yield source

    module.open_rasterio_upath_reader = observed
    try:
        yield
    finally:
        module.open_rasterio_upath_reader = original


def split_config(data_module: RslearnDataModule, split: str) -> SplitConfig:
    """The merged settings of one split ("train", "val", "test", "predict")."""
    config: SplitConfig = data_module.split_configs[split]
    return config


# Errors of rslearn on an invalid metadata.json of a window; an invalid projection is a ValueError, too.
_BROKEN_METADATA = (ValueError, LookupError, TypeError, AttributeError, PermissionError, IsADirectoryError)
# How many invalid files a message names.
_SHOWN = 5


def load_windows(
    dataset: Dataset, *, groups: Sequence[str] | None = None, names: Sequence[str] | None = None
) -> tuple[list[Window], list[str]]:
    """The windows of a dataset; stray files and folders are skipped, where rslearn would fail.

    Args:
        dataset: the dataset on disk.
        groups: names of groups; None for all.
        names: names of windows; None for all.

    Returns:
        The windows, and the paths of strays: files, and folders without a ``metadata.json``.

    Raises:
        DataError: a ``metadata.json`` is invalid (the first five are named), or the windows can't be listed.
    """
    if not isinstance(dataset, Dataset) or type(dataset.storage) is not FileWindowStorage:
        selection = {"groups": groups, "names": names}
        return dataset.load_windows(**{key: list(value) for key, value in selection.items() if value}), []
    windows: list[Window] = []
    strays: list[str] = []
    broken: list[str] = []
    for folder in _window_folders(dataset.path / "windows", groups, names):
        try:
            refuse_pipes(folder / "metadata.json")
            window = load_window(dataset.storage, folder)
        except (FileNotFoundError, NotADirectoryError, FileExistsError):
            # fsspec's memory file system raises the last one for a file in place of a folder.
            strays += [] if names else [str(folder)]
        except _BROKEN_METADATA as error:
            broken.append(f"{folder}/metadata.json: {type(error).__name__}: {' '.join(str(error).split())}")
        else:
            window.options = cast(Any, window.options) or {}
            window._data = dataset.window_data_storage_factory.create(window)
            windows.append(window)
            if type(window.options) is not dict:
                broken.append(f"{folder}/metadata.json: its options are no mapping")
    if broken:
        more = f"; and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        raise DataError(f"{len(broken)} windows have no usable metadata: {'; '.join(broken[:_SHOWN])}{more}")
    return windows, strays


def _window_folders(root: UPath, groups: Sequence[str] | None, names: Sequence[str] | None) -> Iterator[UPath]:
    """What lies in the folders of groups, or the given names in each of them; raises a DataError if not readable."""
    try:
        if not root.is_dir():
            return
        for group in [root / name for name in groups] if groups else list(iter_nonhidden_subdirs(root)):
            if group.is_dir():
                yield from [group / name for name in names] if names else list(iter_nonhidden(group))
    except PermissionError as error:
        raise DataError(f"windows can't be listed: {error.strerror or error}: {error.filename or root}") from error


def list_windows(dataset: Dataset, inputs: dict[str, DataInput], config: SplitConfig) -> list[Window]:
    """The windows of a split in rslearn's order (by hash of the name), selected by group, name, tag and present layers.

    Args:
        dataset: the dataset on disk.
        inputs: inputs of a sample by name; a window without data of a required one is left out.
        config: the split's settings.
    """
    selection: dict[str, Any] = {}
    if config.names:
        selection["names"] = config.names
    if config.groups:
        selection["groups"] = config.groups
    windows = [
        window for window in load_windows(dataset, **selection)[0] if has_tags(window.options, config.tags or {})
    ]
    complete = [window for window in windows if check_window(inputs, window)[0] is not None]
    complete.sort(key=lambda window: (hashlib.sha256(window.name.encode()).hexdigest(), window.group))
    return complete[: config.num_samples] if config.num_samples else complete


def has_tags(options: dict[str, Any], tags: dict[str, Any]) -> bool:
    """Whether a window is selected by a split's ``tags``: its options have each key, with the tag's value.

    For a tag whose value is null or an empty text, the key alone is enough. rslearn treats 0 and false in the same way,
    and so selects windows with any value.
    """
    return all(key in options and (value in (None, "") or _equal(options[key], value)) for key, value in tags.items())


def _equal(option: Any, value: Any) -> bool:
    """Whether an option has a tag's value; the text "1" equals 1, since parsing a run config drops quotes of values."""
    if option == value or not isinstance(option, str) or isinstance(value, str):
        return bool(option == value)
    try:
        parsed = yaml.safe_load(option)
    except yaml.YAMLError:
        return False
    return type(parsed) is type(value) and bool(parsed == value)


def all_crops(bounds: PixelBounds, config: SplitConfig) -> list[PixelBounds]:
    """The crops that tile a window in a split with ``load_all_crops`` (px, x0 y0 x1 y1)."""
    size, overlap = config.get_crop_size(), config.get_overlap_pixels()
    if size is None:
        return [bounds]
    crops: list[PixelBounds] = get_window_crop_options(size, (overlap, overlap), bounds)
    return crops


def draw_crop(bounds: PixelBounds, size: tuple[int, int] | None, rng: random.Random) -> PixelBounds:
    """Draw a random crop of a window; where the crop is larger, the window lies at a random place in it.

    Args:
        bounds: x0, y0, x1, y1 of the window, px.
        size: width and height, px; None means the whole window.
        rng: source of randomness.
    """
    if size is None:
        return bounds
    starts = []
    for axis in (0, 1):
        room = bounds[axis + 2] - bounds[axis] - size[axis]
        starts.append(bounds[axis] + rng.randint(min(room, 0), max(room, 0)))
    return (starts[0], starts[1], starts[0] + size[0], starts[1] + size[1])


def read_inputs(
    dataset: Dataset, window: Window, *, bounds: PixelBounds, inputs: dict[str, DataInput], rng: random.Random
) -> RawInputs:
    """Read the inputs of one crop by rslearn, with nodata pixels marked (see ``rslp.upstream.nodata``).

    Args:
        dataset: the dataset on disk.
        window: the window.
        bounds: x0, y0, x1, y1 of the crop, px.
        inputs: the inputs to read, by name; optional ones that the window does not have are left out.
        rng: draws the item group, where an input reads one of several.
    """
    raw: RawInputs = {}
    with warnings.catch_warnings():
        # rslearn warns of each raster without stored timestamps that it uses the item's time range.
        warnings.filterwarnings("ignore", message="Falling back to item-level time range", category=FutureWarning)
        for name, data_input in inputs.items():
            if not data_input.required and not is_data_input_available(data_input, window):
                continue
            raw[name] = read_data_input(with_nodata_marked(dataset, data_input), window, bounds, data_input, rng)
    return raw


def filtered(task: Task, label: RawInput) -> RawInput:
    """The features of a label that pass a task's ``filters``: those with the given value of each named property.

    rslearn's own filters have no effect: its loop continues with the next filter, not with the next feature.
    """
    filters = getattr(task, "filters", None)
    if not filters or not isinstance(label, list):
        return label
    return [f for f in label if all((f.properties or {}).get(name) == value for name, value in filters)]


def process_inputs(
    task: Task, raw: RawInputs, *, metadata: SampleMetadata, load_targets: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Call ``task.process_inputs`` on filtered labels (see ``filtered``), for each task of a ``MultiTask``.

    Args:
        task: the task.
        raw: the sample's inputs, as they were read.
        metadata: metadata of the sample: window, crop, projection, time range.
        load_targets: whether to make targets from the labels.

    Returns:
        (inputs, targets) of rslearn's task; by task for a ``MultiTask``.
    """
    if not isinstance(task, MultiTask) or type(task).process_inputs is not MultiTask.process_inputs:
        passed = {name: filtered(task, value) if name == "targets" else value for name, value in raw.items()}
        processed: tuple[dict[str, Any], dict[str, Any]] = task.process_inputs(
            passed, metadata=metadata, load_targets=load_targets
        )
        return processed
    parts = {}
    for name, part in task.tasks.items():
        mapped = {new: raw[old] for old, new in task.input_mapping[name].items() if old in raw}
        parts[name] = process_inputs(part, mapped, metadata=metadata, load_targets=load_targets)
    return {name: inputs for name, (inputs, _) in parts.items()}, {
        name: targets for name, (_, targets) in parts.items()
    }


def with_dataset(metadata: SampleMetadata, dataset: str) -> SampleMetadata:
    """A copy of the metadata with the dataset's key, by which ``JointModel`` chooses the decoders."""
    return replace(metadata, dataset_source=dataset)


def dataset_of(writer: RslearnWriter) -> str | None:
    """The path of the dataset that the config of a prediction writer names; None if it names none."""
    path: str | None = writer._path
    return path


def open_writer(writer: RslearnWriter, path: UPath) -> None:
    """Prepare a prediction writer for the dataset at ``path``, which it would otherwise ask a trainer for."""
    writer._initialize(path)
