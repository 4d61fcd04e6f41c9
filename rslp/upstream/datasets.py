"""rslearn's datasets as we need them: listed without stray files, read without silent gaps, written whole."""

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

RawInput = RasterImage | list[Feature]
RawInputs = dict[str, RawInput]


def open_dataset(path: UPath) -> Dataset:
    """Open a dataset; what its config names is refused as that of a run config is, and formats are made once."""
    prepare_parser()
    return keep_formats(Dataset(path))


def keep_formats(dataset: Dataset) -> Dataset:
    """Make a dataset's vector formats once: rslearn parses their config anew at each read, 4 ms a sample."""
    for layer in dataset.layers.values():
        if layer.type == LayerType.VECTOR:
            # A pydantic model refuses new attributes; a partial, unlike a lambda, can go to a worker process.
            made = partial(_same, plain_geojson(layer.instantiate_vector_format()))
            object.__setattr__(layer, "instantiate_vector_format", made)
    return dataset


def _same(value: VectorFormat) -> VectorFormat:
    return value


def wrap_raster_formats(dataset: Dataset, wrap: Callable[[RasterFormat], RasterFormat]) -> Dataset:
    """Put a format of ours around each raster format of a dataset; rslearn keeps the one it made in a private field."""
    for layer in dataset.layers.values():
        for band_set in layer.band_sets:
            band_set._raster_format = wrap(band_set.instantiate_raster_format())
    return dataset


def write_whole_files() -> None:
    """Have rslearn write rasters and vectors as ``write_atomic`` does.

    On a full disk, GDAL says nothing when it closes a file, and rslearn leaves what it had begun to write.
    """
    raster_format.open_rasterio_upath_writer = _whole_raster  # type: ignore[attr-defined]
    vector_format.open_atomic = _whole_text  # type: ignore[attr-defined]


@contextmanager
def _whole_raster(path: UPath, **profile: Any) -> Iterator[DatasetWriter]:
    with MemoryFile() as memory:
        with memory.open(**profile) as raster:
            yield raster
        write_atomic(str(path).removeprefix("file://"), memory.read())


@contextmanager
def _whole_text(path: UPath, mode: str) -> Iterator[io.StringIO]:
    del mode
    yield (text := io.StringIO())
    write_atomic(str(path).removeprefix("file://"), text.getvalue())


def with_nodata_marked(dataset: Dataset, data_input: DataInput) -> Dataset:
    """The dataset, as rslearn's reading functions use it, with pixels without a value marked, see ``nodata``."""
    if data_input.data_type != "raster":
        return dataset
    layers = dict(dataset.layers)
    named = (get_layer_and_group_from_dir_name(option)[0] for option in data_input.layers)
    for name in (name for name in dict.fromkeys(named) if name in layers):
        sets = []
        for band_set in layers[name].band_sets:
            sets.append(band_set.model_copy())
            sets[-1]._raster_format = NodataFormat(band_set.instantiate_raster_format(), data_input)
        layers[name] = layers[name].model_copy(update={"band_sets": sets})
    return cast(Dataset, SimpleNamespace(layers=layers))


@contextmanager
def observe_rasters(look: Callable[[DatasetReader], None]) -> Iterator[None]:
    """Show every raster that rslearn's GeoTIFF format opens in this block: opening each a second time costs a third.

    Args:
        look: is given the open raster.
    """
    module: Any = raster_format
    original = module.open_rasterio_upath_reader

    @contextmanager
    def watched(path: UPath, **options: Any) -> Iterator[DatasetReader]:
        with original(path, **options) as source:
            look(source)
            yield source

    module.open_rasterio_upath_reader = watched
    try:
        yield
    finally:
        module.open_rasterio_upath_reader = original


def split_config(data_module: RslearnDataModule, split: str) -> SplitConfig:
    """The merged settings of one split ("train", "val", "test", "predict")."""
    config: SplitConfig = data_module.split_configs[split]
    return config


# What a window's metadata.json that rslearn can't use raises; a projection that is none is a ValueError too.
_BROKEN_METADATA = (ValueError, LookupError, TypeError, AttributeError, PermissionError, IsADirectoryError)
_SHOWN = 5


def load_windows(
    dataset: Dataset, *, groups: Sequence[str] | None = None, names: Sequence[str] | None = None
) -> tuple[list[Window], list[str]]:
    """The windows of a dataset, without what only lies among them: rslearn stops at a file beside the windows' folders.

    Args:
        dataset: the dataset on disk.
        groups: the groups wanted; all of them when None.
        names: the windows wanted; all of them when None.

    Returns:
        The windows, and the paths of what is no window: files, and folders without a ``metadata.json``.

    Raises:
        DataError: naming each ``metadata.json`` that can't be used.
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
            # The last one is what fsspec's memory says of a file in place of a folder.
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
        what = f"{len(broken)} windows have no usable metadata"
        raise DataError(f"{what}: {'; '.join(broken[:_SHOWN])}{more}")
    return windows, strays


def _window_folders(root: UPath, groups: Sequence[str] | None, names: Sequence[str] | None) -> Iterator[UPath]:
    try:
        if not root.is_dir():
            return
        for group in [root / name for name in groups] if groups else list(iter_nonhidden_subdirs(root)):
            if group.is_dir():
                yield from [group / name for name in names] if names else list(iter_nonhidden(group))
    except PermissionError as error:
        raise DataError(f"windows can't be listed: {error.strerror or error}: {error.filename or root}") from error


def list_windows(dataset: Dataset, inputs: dict[str, DataInput], config: SplitConfig) -> list[Window]:
    """The windows of a split, in rslearn's order: filtered by group, name, tag and present layers, by hash of the name.

    Args:
        dataset: the dataset on disk.
        inputs: what a sample reads; a window without a required one is left out.
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
    kept = [window for window in windows if check_window(inputs, window)[0] is not None]
    kept.sort(key=lambda window: (hashlib.sha256(window.name.encode()).hexdigest(), window.group))
    return kept[: config.num_samples] if config.num_samples else kept


def has_tags(options: dict[str, Any], tags: dict[str, Any]) -> bool:
    """Whether a window with these options is chosen by tags; null or an empty text asks for the key alone.

    rslearn takes 0 and false for no value, too, and then chooses all windows that have the key.
    """
    return all(key in options and (value in (None, "") or _equal(options[key], value)) for key, value in tags.items())


def _equal(option: Any, value: Any) -> bool:
    """Whether an option is what a tag asks for; the run's parser reads the text "1" of a config as the number 1."""
    if option == value or not isinstance(option, str) or isinstance(value, str):
        return bool(option == value)
    try:
        read = yaml.safe_load(option)
    except yaml.YAMLError:
        return False
    return type(read) is type(value) and bool(read == value)


def all_crops(bounds: PixelBounds, config: SplitConfig) -> list[PixelBounds]:
    """The crops that tile a window when the split loads all of them (pixels, x0 y0 x1 y1)."""
    size, overlap = config.get_crop_size(), config.get_overlap_pixels()
    if size is None:
        return [bounds]
    crops: list[PixelBounds] = get_window_crop_options(size, (overlap, overlap), bounds)
    return crops


def draw_crop(bounds: PixelBounds, size: tuple[int, int] | None, rng: random.Random) -> PixelBounds:
    """A random crop of a window; one larger than the window lies around it at random.

    Args:
        bounds: those of the window, pixels.
        size: width and height in pixels; None means the whole window.
        rng: where the draw comes from.
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
    """Read a sample's inputs; item groups are drawn from ``rng``, never from the system's entropy.

    Pixels without a value are marked, see ``nodata``.
    """
    raw: RawInputs = {}
    with warnings.catch_warnings():
        # rslearn warns at each read of a raster without stored timestamps that it takes the item's time range.
        warnings.filterwarnings("ignore", message="Falling back to item-level time range", category=FutureWarning)
        for name, data_input in inputs.items():
            if not data_input.required and not is_data_input_available(data_input, window):
                continue
            raw[name] = read_data_input(with_nodata_marked(dataset, data_input), window, bounds, data_input, rng)
    return raw


def filtered(task: Task, label: RawInput) -> RawInput:
    """The features of a label that a task's ``filters`` let through: those with each named property at its value.

    rslearn's own loop over the filters goes on with the next filter, not with the next feature, so it skips nothing.
    """
    filters = getattr(task, "filters", None)
    if not filters or not isinstance(label, list):
        return label
    return [f for f in label if all((f.properties or {}).get(name) == value for name, value in filters)]


def process_inputs(
    task: Task, raw: RawInputs, *, metadata: SampleMetadata, load_targets: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``task.process_inputs`` with the task's ``filters`` honoured, those inside a ``MultiTask`` too.

    Args:
        task: the task.
        raw: what was read, by input.
        metadata: where the sample lies; without ``dataset_source``.
        load_targets: whether there are labels.

    Returns:
        (inputs, targets) as rslearn makes them; of a ``MultiTask`` by task.
    """
    if not isinstance(task, MultiTask) or type(task).process_inputs is not MultiTask.process_inputs:
        read = {name: filtered(task, value) if name == "targets" else value for name, value in raw.items()}
        made: tuple[dict[str, Any], dict[str, Any]] = task.process_inputs(
            read, metadata=metadata, load_targets=load_targets
        )
        return made
    parts = {}
    for name, one in task.tasks.items():
        own = {new: raw[old] for old, new in task.input_mapping[name].items() if old in raw}
        parts[name] = process_inputs(one, own, metadata=metadata, load_targets=load_targets)
    return {name: part[0] for name, part in parts.items()}, {name: part[1] for name, part in parts.items()}


def with_dataset(metadata: SampleMetadata, dataset: str) -> SampleMetadata:
    """The metadata with the dataset's key filled in."""
    return replace(metadata, dataset_source=dataset)


def dataset_of(writer: RslearnWriter) -> str | None:
    """The path of the dataset that a writer of predictions is for; None where its config names none."""
    path: str | None = writer._path
    return path


def open_writer(writer: RslearnWriter, path: UPath) -> None:
    """Let a writer of predictions read its layer's description; it would take the dataset's path from a trainer."""
    writer._initialize(path)
