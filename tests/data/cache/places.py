"""A small dataset with one of everything that a store has to give back: series, coarse bands, masks, features."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import shapely
import torch
from rasterio.crs import CRS
from rslearn.config import DType
from rslearn.dataset import Dataset, Window
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.dataset import DataInput, SplitConfig
from rslearn.train.tasks.classification import ClassificationTask
from rslearn.train.tasks.multi_task import MultiTask
from rslearn.train.transforms.transform import Transform
from rslearn.utils.feature import Feature
from rslearn.utils.geometry import Projection, STGeometry
from rslearn.utils.raster_array import RasterArray, RasterMetadata
from rslearn.utils.raster_format import GeotiffRasterFormat
from rslearn.utils.vector_format import GeojsonVectorFormat
from upath import UPath

from rslp.data.cache.cache import SampleCache, SampleCacheSettings, open_sample_cache
from rslp.data.samples import SampleSource, open_dataset

SIZE = 16
PROJECTION = Projection(CRS.from_epsg(32631), 10, -10)
START = datetime(2024, 3, 1, tzinfo=UTC)
PER_LAYER = "rslearn.dataset.window_data_storage.per_layer.PerLayerStorageFactory"


def band_set(bands: list[str], dtype: str, **more: Any) -> dict[str, Any]:
    return {"type": "raster", "band_sets": [{"bands": bands, "dtype": dtype, **more}]}


def write_places(path: Path, *, windows: int = 4, storage: str | None = None) -> Path:
    """Write a dataset; every value differs from every other."""
    path.mkdir(parents=True)
    config: dict[str, Any] = {
        "layers": {
            "series": band_set(["a", "b", "c"], "uint16"),
            "coarse": band_set(["d"], "float32", zoom_offset=-1),
            "odd": band_set(["e"], "int16"),
            "mask": band_set(["m"], "uint8"),
            "label": {"type": "vector"},
            "output": {"type": "vector"},
        }
    }
    if storage:
        config["window_data_storage"] = {"class_path": storage}
    (path / "config.json").write_text(json.dumps(config))
    dataset = Dataset(UPath(path))
    for number in range(windows):
        add_window(dataset, number)
    return path


def add_window(dataset: Dataset, number: int) -> Window:
    """Write one window with all its layers."""
    x = 40 + number * 3 * SIZE
    window = Window(
        storage=dataset.storage,
        group="even" if number % 2 == 0 else "odd",
        name=f"w{number:03d}",
        projection=PROJECTION,
        bounds=(x, -SIZE, x + SIZE, 0),
        time_range=(START, START + timedelta(days=30)),
        options={"split": "val" if number % 4 == 3 else "train", "number": number},
        data_factory=dataset.window_data_storage_factory,
    )
    window.save()
    rng = np.random.default_rng(number)
    steps = [rng.integers(0, 9000, (3, 1, SIZE, SIZE)).astype(np.uint16) for _ in range(3)]
    write_raster(window, "series", ["a", "b", "c"], steps, days=10)
    half = Projection(PROJECTION.crs, 20, -20)
    coarse = rng.normal(size=(1, 1, SIZE // 2, SIZE // 2)).astype(np.float32)
    coarse[0, 0, 0, :4] = [np.nan, np.inf, -0.0, 1e-42]
    write_raster(window, "coarse", ["d"], [coarse], projection=half, bounds=(x // 2, -SIZE // 2, (x + SIZE) // 2, 0))
    odd = rng.integers(-9, 9, (1, 2, SIZE, SIZE)).astype(np.int16)
    write_raster(window, "odd", ["e"], [odd], days=3, nodata=-9)
    write_raster(window, "mask", ["m"], [rng.integers(0, 4, (1, 1, SIZE, SIZE)).astype(np.uint8)])
    write_features(window, [("low" if number % 2 else "high", 3.0 + number), ("low", 1e-9 * number)])
    return window


def write_raster(
    window: Window,
    layer: str,
    bands: list[str],
    groups: list[np.ndarray[Any, Any]],
    *,
    days: int | None = None,
    nodata: float | None = None,
    projection: Projection = PROJECTION,
    bounds: tuple[int, int, int, int] | None = None,
) -> None:
    """Write a layer's item groups (``C T H W`` each) and mark them complete."""
    with window.data.open_layer_writer(layer) as writer:
        for index, array in enumerate(groups):
            times = None
            if days is not None:
                at = [START + timedelta(days=days * (index + step)) for step in range(array.shape[1])]
                times = [(one, one + timedelta(days=1)) for one in at]
            raster = RasterArray(array=array, timestamps=times, metadata=RasterMetadata(nodata_value=nodata))
            box = bounds or window.bounds
            writer.write_raster(bands, GeotiffRasterFormat(), projection, box, raster, group_idx=index)
    for index in range(len(groups)):
        window.mark_layer_completed(layer, index)


def write_features(window: Window, features: list[tuple[str, float]], layer: str = "label") -> None:
    """Write a point for each class and offset."""
    x, y = window.bounds[:2]
    made = [
        Feature(STGeometry(PROJECTION, shapely.Point(x + offset, y + 2.5), None), {"value": name, "n": [offset, None]})
        for name, offset in features
    ]
    with window.data.open_layer_writer(layer) as writer:
        writer.write_vector(GeojsonVectorFormat(), made)
    window.mark_layer_completed(layer)


def inputs() -> dict[str, DataInput]:
    """One input of every kind."""
    return {
        "all_steps": DataInput("raster", ["series"], bands=["c", "a"], load_all_item_groups=True, load_all_layers=True),
        "some_step": DataInput("raster", ["series"], bands=["a", "b", "c"], load_all_item_groups=True),
        "two_steps": DataInput("raster", ["series", "series.2"], bands=["b"], load_all_layers=True),
        "coarse": DataInput("raster", ["coarse"], bands=["d"]),
        "odd": DataInput("raster", ["odd"], bands=["e"]),
        "mask": DataInput("raster", ["mask"], bands=["m"], dtype=DType.INT32, required=False),
        "targets": DataInput("vector", ["label"], is_target=True),
    }


class Finite(Transform):
    """A number for each value that is none: a sample with any is refused, and the store has to keep them apart."""

    def forward(self, input_dict: dict[str, Any], target_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Replace them in the coarse images, and in those whose files declare a nodata value."""
        for name in {"coarse", "odd"} & set(input_dict):
            image = input_dict[name].image
            input_dict[name].image = torch.nan_to_num(image, nan=-7e9, posinf=-8e9, neginf=-9e9)
        return input_dict, target_dict


def module(path: Path, *, wanted: Mapping[str, DataInput] | None = None, **settings: Any) -> RslearnDataModule:
    """The dataset as a run config describes it; every input is passed through."""
    chosen = dict(inputs() if wanted is None else wanted)
    for one in chosen.values():
        one.passthrough = True
    return RslearnDataModule(
        inputs=chosen,
        task=ClassificationTask(property_name="value", classes=["low", "high"]),
        path=str(path),
        default_config=SplitConfig(**{"transforms": [Finite()], **settings}),
    )


def united(path: Path, *, task: type[ClassificationTask] = ClassificationTask, **settings: Any) -> RslearnDataModule:
    """The dataset with its task united with no other, as run configs have it."""
    made = module(path, **{name: value for name, value in settings.items() if name != "classes"})
    one = task(property_name="value", classes=settings.get("classes", ["low", "high"]))
    made.task = MultiTask({"places": one}, {"places": {"targets": "targets"}})
    return made


def stored(
    path: Path, *, data_module: RslearnDataModule | None = None, split: str = "train", **settings: Any
) -> SampleSource:
    """The samples of a split, through the store."""
    made = data_module or module(path)
    return SampleSource("places", data_module=made, split=split, seed=0, sample_cache=opened(path, made, **settings))


def direct(path: Path, *, data_module: RslearnDataModule | None = None, split: str = "train") -> SampleSource:
    """The samples of a split, without the store."""
    return SampleSource("places", data_module=data_module or module(path), split=split, seed=0)


def opened(path: Path, data_module: RslearnDataModule | None = None, **settings: Any) -> SampleCache:
    """The dataset's store."""
    made = data_module or module(path)
    chosen = SampleCacheSettings(**{"workers": 0, **settings})
    store = open_sample_cache("places", dataset=open_dataset("places", made), inputs=made.inputs, settings=chosen)
    assert store is not None
    return store


def assert_same(one: Any, other: Any) -> None:
    """Two samples are the same: types, dtypes, memory layout, bits, dates, geometries, properties."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert one.numpy().tobytes() == other.numpy().tobytes()
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, shapely.Geometry):
        assert shapely.to_wkb(one) == shapely.to_wkb(other)
    elif type(one).__module__.startswith("rslearn"):
        assert_same(vars(one), vars(other))
    else:
        assert one == other


def assert_equal_sources(one: SampleSource, other: SampleSource, *, draws: int = 2) -> None:
    """Two sources give the same samples in the same order, draw by draw."""
    assert [one.identity(i) for i in range(len(one))] == [other.identity(i) for i in range(len(other))]
    for index in range(len(one)):
        for draw in range(draws):
            assert_same(one.sample(index, draw=draw), other.sample(index, draw=draw))
        assert_same(one.targets(index), other.targets(index))
