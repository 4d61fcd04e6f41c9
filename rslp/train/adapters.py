"""Every touch of a private or awkward part of rslearn, Lightning and the encoders' package, held by contract tests.

rslearn 0.1.19 lists windows with progress bars of its own and a temporary file per dataset, and draws crops and item
groups from the operating system's entropy; Lightning has no hook between an epoch's scheduler step and the next epoch.
What we need of both is here, so that an upgrade has one file to look at.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import yaml
from jsonargparse import _common, _typehints, _util
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from rasterio.io import DatasetReader, DatasetWriter, MemoryFile
from rslearn.config import LayerType
from rslearn.dataset import Dataset, Window
from rslearn.dataset.storage.file import FileWindowStorage, load_window
from rslearn.dataset.window import get_layer_and_group_from_dir_name
from rslearn.train.all_crops_dataset import get_window_crop_options
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.dataset import DataInput, SplitConfig, check_window, is_data_input_available, read_data_input
from rslearn.train.metrics import NonScalarMetricOutput
from rslearn.train.model_context import RasterImage, SampleMetadata
from rslearn.train.prediction_writer import RslearnWriter
from rslearn.train.tasks.detection import DetectionMetric
from rslearn.train.tasks.multi_task import MultiTask
from rslearn.train.tasks.regression import RegressionAccuracy
from rslearn.train.tasks.segmentation import MeanIoUMetric
from rslearn.train.tasks.task import Task
from rslearn.utils import raster_format, vector_format
from rslearn.utils.feature import Feature
from rslearn.utils.fsspec import iter_nonhidden, iter_nonhidden_subdirs
from rslearn.utils.geometry import PixelBounds
from rslearn.utils.jsonargparse import init_jsonargparse
from rslearn.utils.raster_format import RasterFormat
from rslearn.utils.vector_format import VectorFormat
from torch.optim.swa_utils import get_swa_avg_fn
from torchmetrics import MeanAbsoluteError, MeanAbsolutePercentageError, MeanSquaredError, Metric, MetricCollection
from torchmetrics import R2Score as StockR2
from upath import UPath

from rslp import class_paths
from rslp.errors import CheckpointError, DataError, chain
from rslp.files import write_atomic
from rslp.train.metric_types import WithinFactor
from rslp.train.nodata import NodataFormat
from rslp.train.slow_reads import refuse_pipes
from rslp.train.vectors import plain_geojson

RawInput = RasterImage | list[Feature]
RawInputs = dict[str, RawInput]
_MODALITIES = "get_modalities_to_process"
_SUMS = (MeanSquaredError, MeanAbsoluteError, MeanAbsolutePercentageError, StockR2, MeanIoUMetric)


_hints: Any = _typehints
_adapt_any = _hints.adapt_classes_any


def prepare_parser() -> None:
    """Teach the parser rslearn's types, and have it ask ``class_paths`` before it imports what a value names.

    Datasets' own configs are parsed by it, too. Where an argument takes any value, or says nothing of its type, a class
    that stands there has to be a torch module: otherwise it would be made whatever it is.
    """
    init_jsonargparse()
    parts: tuple[Any, ...] = (_common, _util, _typehints)
    for part in parts:
        part.check_import_path = _refuse_untrusted
    _hints.adapt_classes_any = _module_alone


def _refuse_untrusted(path: str) -> None:
    if reason := class_paths.refusal(path):
        raise class_paths.Refused(reason)


def _module_alone(val: Any, typehint: Any, serialize: bool, make: bool, options: Any, logger: Any = None) -> Any:
    if not _hints.is_subclass_spec(val):
        return _adapt_any(val, typehint, serialize, make, options, logger)
    how = {"serialize": serialize, "instantiate_classes": make, "sub_add_kwargs": options, "logger": logger}
    return _hints.adapt_typehints(val, torch.nn.Module, **how)


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


def honouring_nodata(dataset: Dataset, data_input: DataInput) -> Dataset:
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
def watching_rasters(look: Callable[[DatasetReader], None]) -> Iterator[None]:
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


def fix_token_order(encoder: torch.nn.Module) -> None:
    """Have Helios models lay out their tokens in one order, whoever wraps them; from then on in the whole process.

    Their package (olmoearth-pretrain-minimal 0.1.5, olmoearth-pretrain) goes through an intersection of sets of
    modality names, whose order is another one in each process. Attention sums over the tokens in that order, so the
    last bits of features and gradients would differ between two starts.

    Args:
        encoder: what may hold such a model; others are left alone.
    """
    for name in dict.fromkeys(type(part).__module__ for part in encoder.modules()):
        module: Any = sys.modules.get(name)
        if hasattr(module, _MODALITIES):
            setattr(module, _MODALITIES, _in_order_of_the_model)


def _in_order_of_the_model(available_modalities: Sequence[str], supported_modality_names: Sequence[str]) -> list[str]:
    """The modalities that are there and that the model supports, in the order of the model's configuration."""
    return [name for name in supported_modality_names if name in available_modalities]


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
            raw[name] = read_data_input(honouring_nodata(dataset, data_input), window, bounds, data_input, rng)
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


# Transforms without randomness; their subclasses may have some.
_FIXED = frozenset(
    {
        "rslearn.train.transforms.concatenate.Concatenate",
        "rslearn.train.transforms.mask.Mask",
        "rslearn.train.transforms.normalize.Normalize",
        "rslearn.train.transforms.resize.Resize",
        "rslearn.train.transforms.select_bands.SelectBands",
        "rslearn.train.transforms.sentinel1.Sentinel1ToDecibels",
        "rslearn.models.olmoearth_pretrain.norm.OlmoEarthNormalize",
        "rslp.helios.norm.HeliosNormalize",
    }
)

_PADS = frozenset({"rslearn.train.transforms.pad.Pad", "rslp.helios.pad.Pad"})


def are_fixed(transforms: Iterable[torch.nn.Module]) -> bool:
    """Whether transforms have no randomness, as far as is known."""
    return all(_is_fixed(transform) for transform in transforms)


def _is_fixed(transform: torch.nn.Module) -> bool:
    name = f"{type(transform).__module__}.{type(transform).__qualname__}"
    if name not in _PADS:
        return name in _FIXED
    low, high = cast(tuple[int, int], transform.size)
    return high - low == 1  # of a wider range it draws one


# What reads of the inputs no more than their sizes.
_READ_SIZES = frozenset(
    {
        "rslearn.models.faster_rcnn.FasterRCNN",
        "rslearn.models.detr.detr.Detr",
        "rslearn.models.pooling_decoder.SegmentationPoolingDecoder",
    }
)
_READ_CONTENT = frozenset({"rslearn.models.concatenate_features.ConcatenateFeatures"})


def reads_inputs(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether what follows the encoder may read the content of inputs, not only features and sizes.

    Args:
        modules: decoders and what else follows; of classes that are not rslearn's or ours, it has to be assumed.
    """
    for module in modules:
        for part in module.modules():
            name = f"{type(part).__module__}.{type(part).__qualname__}"
            known = name.partition(".")[0] in ("rslearn", "rslp", "torch", "torchvision", "torchmetrics")
            if name in _READ_CONTENT or not known:
                return True
    return False


def backward(trainer: Trainer, loss: torch.Tensor) -> None:
    """Differentiate one of a step's losses as Lightning does with the loss that ``training_step`` returns.

    Gradients are scaled for mixed precision, and callbacks see each backward pass, as under Lightning's accumulation.
    """
    trainer.strategy.backward(loss, None)


def keep_signal_handlers(trainer: Trainer) -> None:
    """Leave a process's signal handlers as they are while it trains.

    Lightning's handler of SIGTERM broadcasts from rank 0 inside the handler: a signal to any process hangs all of them.
    """
    trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]


def hand_checkpoint(trainer: Trainer, checkpoint: dict[str, Any], *, path: Path) -> None:
    """Let a training go on from a checkpoint that was read already: Lightning would read its file again.

    Args:
        trainer: the trainer, before the training.
        checkpoint: the content of the file that ``fit`` is given as ``ckpt_path``; it is empty once it was taken over,
            so that nobody keeps it in memory.
        path: the file, for messages.
    """
    restore = trainer.strategy.load_optimizer_state_dict

    def taken(checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:  # noqa: ARG001
        content = dict(checkpoint)
        checkpoint.clear()
        return content

    def restored(checkpoint: Mapping[str, Any]) -> None:
        try:
            restore(checkpoint)
        except (ValueError, LookupError) as error:
            # torch compares the groups of parameters.
            what = f"{path} does not fit the optimiser of the config ({error}): with other groups of parameters, as "
            what += "after a change of optimizer or of what is frozen, a run can't go on; start another experiment"
            raise CheckpointError(what) from error

    trainer.strategy.load_checkpoint = taken  # type: ignore[method-assign]
    trainer.strategy.load_optimizer_state_dict = restored  # type: ignore[method-assign]


def dataset_of(writer: RslearnWriter) -> str | None:
    """The path of the dataset that a writer of predictions is for; None where its config names none."""
    path: str | None = writer._path
    return path


def open_writer(writer: RslearnWriter, path: UPath) -> None:
    """Let a writer of predictions read its layer's description; it would take the dataset's path from a trainer."""
    writer._initialize(path)


def _nothing() -> None:
    pass


def keep_to_itself(metrics: torch.nn.Module) -> None:
    """Stop the metrics inside a module from asking other processes when they compute.

    torchmetrics gathers state by state, in an order that depends on what a process has seen: processes that have seen
    no sample wait for ever, or fail.
    """
    for metric in metrics.modules():
        if isinstance(metric, MetricCollection):
            metric._enable_compute_groups = False
        elif isinstance(metric, Metric):
            metric.distributed_available_fn = _alone


def _alone() -> bool:
    return False


def precise_metrics(metrics: MetricCollection) -> MetricCollection:
    """A task's metrics, with sums and counts in double precision, and as states that add up over processes."""
    for metric in metrics.modules():
        inner = getattr(metric, "metric", None)
        if isinstance(inner, RegressionAccuracy):
            metric.metric = WithinFactor(inner.factor)
        elif isinstance(inner, _SUMS):
            inner.set_dtype(torch.float64)
    return metrics


def scalars(metrics: MetricCollection) -> dict[str, float | None]:
    """The scalar values of all metrics by name; None of one that can't be computed from what it has seen.

    One by one: torchmetrics' own collection gives nothing at all if one of them fails, as R2 does of a single sample.
    """
    values: dict[str, float | None] = {}
    for name, metric in metrics.items(keep_base=True):
        try:
            computed = metric.compute()
        except (ValueError, RuntimeError):
            values[name] = None
            continue
        for key, value in computed.items() if isinstance(computed, dict) else [(name, computed)]:
            if _is_scalar(value):
                # torchmetrics' mean average precision is -1 where there is no object.
                nothing = isinstance(metric, DetectionMetric) and float(value) < 0
                values[key] = None if nothing else float(value)
    return values


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, NonScalarMetricOutput) and (not isinstance(value, torch.Tensor) or value.numel() == 1)


def metric_states(metrics: torch.nn.Module) -> list[dict[str, Any]]:
    """The state of each metric inside a module, on the CPU, in an order that all processes share."""
    states = []
    for metric in _metrics_in(metrics):
        values = {name: _on_cpu(getattr(metric, name)) for name in metric._defaults}
        states.append({"updates": metric._update_count, "values": values})
    return states


def merge_metric_states(metrics: torch.nn.Module, parts: list[list[dict[str, Any]]]) -> None:
    """Give the metrics inside a module the state of all processes together.

    Args:
        metrics: the module.
        parts: what ``metric_states`` gave in each process, by rank.
    """
    for metric, states in zip(_metrics_in(metrics), zip(*parts, strict=True), strict=True):
        for name, reduction in metric._reductions.items():
            values = [state["values"][name] for state in states]
            setattr(metric, name, _merged(values, reduction, metric.device))
        metric._update_count = sum(state["updates"] for state in states)
        metric._computed = None


def _metrics_in(metrics: torch.nn.Module) -> list[Metric]:
    return [metric for metric in metrics.modules() if isinstance(metric, Metric)]


def _merged(values: list[Any], reduction: Any, device: torch.device) -> Any:
    if isinstance(values[0], list):
        return [entry.to(device) for value in values for entry in value]
    stacked = torch.stack(values).to(device)
    return reduction(stacked) if reduction else stacked


def _on_cpu(value: Any) -> Any:
    return [entry.cpu() for entry in value] if isinstance(value, list) else value.cpu()


def worker_death(error: Exception) -> str | None:
    """How a worker of torch's loader died, if that is what the error says; torch has no type for it.

    The kernel's notice of the death may come first, or the failure to fetch a tensor that the dead worker shared.
    """
    said = " ".join(map(str, chain(error)))
    # The first is the cause of the second where it interrupts the wait for a batch, and alone names the signal.
    for end in (r"is killed by signal: \w+", "exited unexpectedly"):
        if found := re.search(rf"DataLoader worker \(pid.*?\) ({end})", said):
            return found[1]
    frames = (Path(frame.filename).parts[-3:] for frame in traceback.extract_tb(error.__traceback__))
    fetching = ("torch", "multiprocessing", "reductions.py") in frames
    return "its samples can't be fetched any more" if fetching else None


def training_position(trainer: Trainer) -> tuple[int, int]:
    """The epoch and the number of its steps already trained on, as the next training iterator must begin."""
    loop = trainer.fit_loop
    epoch = completed_epochs(trainer)
    inside = loop.restarting or loop.epoch_progress.current.ready > epoch
    batches: Any = loop.epoch_loop.batch_progress.current
    return epoch, batches.processed if inside else 0


def completed_epochs(trainer: Trainer) -> int:
    """Training epochs that are through."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return int(progress.processed)


def has_trained(trainer: Trainer) -> bool:
    """Whether a training epoch has begun: a validation is then part of the training."""
    progress: Any = trainer.fit_loop.epoch_progress.total
    return bool(progress.started)


def is_fitting(trainer: Trainer) -> bool:
    """Whether a training is at work, of which a validation may be a part."""
    return trainer.state.fn == TrainerFn.FITTING


def model_of(trainer: Trainer) -> torch.nn.Module | None:
    """The model inside the module that a trainer is at work on."""
    module = trainer.lightning_module
    model = getattr(module, "model", None)
    return model if isinstance(model, torch.nn.Module) else None


def scales_gradients(trainer: Trainer) -> bool:
    """Whether half precision scales the loss: its scaler leaves out steps whose gradients overflow by itself."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def dump_checkpoint(trainer: Trainer, *, weights_only: bool = False) -> dict[str, Any]:
    """Lightning's checkpoint as a mapping, before it is written."""
    checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only)
    return checkpoint


def dump_validated(trainer: Trainer) -> dict[str, Any]:
    """The weights that were just validated, as a checkpoint: an average is swapped in for a validation alone."""
    checkpoint = dump_checkpoint(trainer, weights_only=True)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, WeightAveraging):
            callback.on_save_checkpoint(trainer, trainer.lightning_module, checkpoint)
            for key in ("current_model_state", "averaging_state"):
                checkpoint.pop(key, None)
    return checkpoint


def average_numbers_alone(callbacks: Iterable[Callback]) -> None:
    """Let averages of weights copy buffers of whole numbers: 0.9 x 3 + 0.1 x 3 may become 2 in an index."""
    for callback in callbacks:
        if isinstance(callback, WeightAveraging) and "multi_avg_fn" not in callback._kwargs:
            callback._kwargs["avg_fn"] = partial(_averaged, callback._kwargs.get("avg_fn") or get_swa_avg_fn())  # type: ignore[no-untyped-call]


def _averaged(average: Callable[..., torch.Tensor], *values: Any) -> torch.Tensor:
    return average(*values) if values[0].is_floating_point() else values[1]


def as_epoch_start(checkpoint: dict[str, Any], epoch: int) -> dict[str, Any]:
    """Rewrite a checkpoint's loop counters to "``epoch`` epochs are complete, the next has not begun".

    Lightning's own states at an epoch's edge are ambiguous: a restart from them skips or repeats the epoch, and misses
    the scheduler's step. With all four epoch counters equal and no batch open, a restart is an ordinary next epoch.
    """
    fit_loop = checkpoint["loops"]["fit_loop"]
    for span in ("total", "current"):
        counters = fit_loop["epoch_progress"][span]
        fit_loop["epoch_progress"][span] = dict.fromkeys(counters, epoch)
    batches = fit_loop["epoch_loop.batch_progress"]
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
    return {**checkpoint, "epoch": epoch}


def stopped_inside(trainer: Trainer) -> bool:
    """Whether a training has ended before its last epoch's last batch."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(batches.processed < trainer.num_training_batches)


def as_inside_epoch(checkpoint: dict[str, Any], epoch: int) -> dict[str, Any]:
    """Rewrite a checkpoint's loop counters to "``epoch`` epochs are complete, and the next is at this batch".

    Lightning counts an epoch that ends before its last batch as complete: the rest of it would never be trained on.
    """
    fit_loop = checkpoint["loops"]["fit_loop"]
    for span in ("total", "current"):
        begun = {name: epoch + (name in ("ready", "started")) for name in fit_loop["epoch_progress"][span]}
        fit_loop["epoch_progress"][span] = begun
        batches = fit_loop["epoch_loop.batch_progress"][span]
        # As it is while a batch ends, which is where a run saves inside an epoch.
        batches["completed"] = batches["processed"] - 1
    fit_loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    return {**checkpoint, "epoch": epoch}
