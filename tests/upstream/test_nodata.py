"""Pixels without a value are not trained on: a table over dtypes, nodata values and who declares them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from rasterio.crs import CRS
from rslearn.dataset import Dataset, Window
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.dataset import DataInput, SplitConfig
from rslearn.train.tasks.multi_task import MultiTask
from rslearn.train.tasks.per_pixel_regression import PerPixelRegressionTask
from rslearn.train.tasks.segmentation import SegmentationTask
from rslearn.train.tasks.task import Task
from rslearn.utils.geometry import Projection
from rslearn.utils.raster_array import RasterArray, RasterMetadata
from rslearn.utils.raster_format import NumpyRasterFormat, SingleImageRasterFormat
from upath import UPath

from rslp.data.cache.cache import SampleCacheSettings, open_sample_cache
from rslp.data.samples import SampleSource
from rslp.errors import DataError
from rslp.train import baselines

SIZE = 8
DTYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "float32", "float64"]
NODATA = [-1.0, -9999.0, 255.0, 65535.0, 4294967295.0, math.nan, math.inf, float(np.finfo(np.float32).min)]
_PROJECTION = Projection(CRS.from_epsg(32631), 10, -10)


def fits(value: float, dtype: str) -> bool:
    if dtype.startswith("float"):
        return True
    return math.isfinite(value) and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max


def write(
    path: Path,
    array: np.ndarray[Any, Any],
    *,
    declared: float | None = None,
    shift: tuple[float, float] = (0, 0),
    layer: dict[str, Any] | None = None,
    windows: int = 1,
    names: str = "w",
) -> Path:
    """A dataset whose label raster is ``array``, moved by so many pixels; the image is all ones."""
    band = {"dtype": array.dtype.name if array.dtype != np.float64 else "float32", "bands": ["class"], **(layer or {})}
    image = {"type": "raster", "band_sets": [{"dtype": "float32", "bands": ["a"]}]}
    path.mkdir()
    layers = {"label": {"type": "raster", "band_sets": [band]}, "image": image}
    (path / "config.json").write_text(json.dumps({"layers": layers}))
    dataset = Dataset(UPath(path))
    for number in range(windows):
        bounds = (number * 1000, 0, number * 1000 + SIZE, SIZE)
        window = Window(
            storage=dataset.storage, group="g", name=f"{names[number % len(names)]}{number // len(names)}",
            projection=_PROJECTION, bounds=bounds,
            time_range=None, options={"split": "train"}, data_factory=dataset.window_data_storage_factory,
        )  # fmt: skip
        window.save()
        raster(window, "image", "a", np.ones((SIZE, SIZE), np.float32))
        raster(window, "label", "class", array, declared=declared, shift=shift)
    return path


def raster(
    window: Window,
    layer: str,
    band: str,
    array: np.ndarray[Any, Any],
    *,
    declared: float | None = None,
    shift: tuple[float, float] = (0, 0),
) -> None:
    folder = Path(str(window.window_root)) / "layers" / layer / band
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "completed").touch()
    place = Affine(10, 0, (window.bounds[0] + shift[0]) * 10, 0, -10, (window.bounds[1] + shift[1]) * -10)
    kind: dict[str, Any] = {"driver": "GTiff", "height": array.shape[0], "width": array.shape[1], "count": 1}
    if declared is not None:
        kind["nodata"] = declared
    with rasterio.open(
        folder / "geotiff.tif", "w", dtype=array.dtype.name, crs="EPSG:32631", transform=place, **kind
    ) as file:
        file.write(array, 1)


def source(path: Path, task: Task, *, cached: bool, dtype: str = "INT32", **settings: Any) -> SampleSource:
    inputs = {
        "image": DataInput("raster", ["image"], bands=["a"], passthrough=True),
        "labels": DataInput("raster", ["label"], bands=["class"], is_target=True, dtype=_dtype(dtype)),
    }
    module = RslearnDataModule(
        path=str(path),
        inputs=inputs,
        task=MultiTask({"t": task}, {"t": {"labels": "targets"}}),
        train_config=SplitConfig(tags={"split": "train"}, **settings),
    )
    store = None
    if cached:
        cache = SampleCacheSettings(store=str(path.parent / f"{path.name}-cache"), workers=1)
        store = open_sample_cache("d", dataset=Dataset(UPath(path)), inputs=module.inputs, settings=cache)
        assert store is not None
    return SampleSource("d", data_module=module, split="train", seed=0, sample_cache=store)


def _dtype(name: str) -> Any:
    from rslearn.config import DType

    return DType[name]


def valid_of(sample: Any) -> np.ndarray[Any, Any]:
    return sample[1]["t"]["valid"].get_hw_tensor().numpy() > 0  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Table:
    """A dataset of one dtype: for each nodata value a window whose file declares it, ``w0`` …, and one without."""

    path: Path
    dtype: str
    values: list[float]
    array: np.ndarray[Any, Any]


@pytest.fixture(scope="module", params=DTYPES)
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Table:
    dtype = request.param
    values = [value for value in NODATA if fits(value, dtype)]
    array = (np.arange(SIZE * SIZE).reshape(SIZE, SIZE) % 3).astype(dtype)
    path = write(tmp_path_factory.mktemp(dtype) / "d", array, windows=2 * len(values), names="wx")
    for window in Dataset(UPath(path)).load_windows():
        value = values[int(window.name[1:])]
        own = array.copy()
        own[:3, :5] = value
        raster(window, "label", "class", own, declared=value if window.name[0] == "w" else None)
    return Table(path, dtype, values, array)


HIDDEN = np.zeros((SIZE, SIZE), bool)
HIDDEN[:3, :5] = True


@pytest.mark.parametrize("cached", [False, True])
def test_nodata_of_each_type_is_no_class(table: Table, cached: bool) -> None:
    def right(found: SampleSource) -> None:
        for number in range(len(found)):
            sample = found.sample(number)
            assert (valid_of(sample) == ~HIDDEN).all(), found.identity(number)
            classes = sample[1]["t"]["classes"].get_hw_tensor().numpy()
            assert (classes == np.where(HIDDEN, 0, table.array)).all()

    declared = [f"w{i}" for i in range(len(table.values))]
    right(source(table.path, SegmentationTask(num_classes=3), cached=cached, names=declared))
    for i, value in enumerate(table.values):
        # A segmentation's nodata_value is a whole number.
        if math.isfinite(value) and abs(value) < 2**63:
            task = SegmentationTask(num_classes=3, nodata_value=int(value))
            right(source(table.path, task, cached=cached, names=[f"w{i}", f"x{i}"]))


@pytest.mark.parametrize("cached", [False, True])
def test_nodata_of_each_type_is_no_measurement(table: Table, cached: bool) -> None:
    def right(found: SampleSource) -> None:
        for number in range(len(found)):
            sample = found.sample(number)
            assert (valid_of(sample) == ~HIDDEN).all(), found.identity(number)
            values = sample[1]["t"]["values"].get_hw_tensor().numpy()
            assert (values == np.where(HIDDEN, 0, table.array * 0.5)).all()
        # The baseline learns from the valid pixels alone.
        mean = float(table.array[~HIDDEN].mean()) * 0.5
        assert baselines.fit_baselines({"d": found})["d"]["t"] == pytest.approx(mean)

    declared = [f"w{i}" for i in range(len(table.values))]
    task = PerPixelRegressionTask(scale_factor=0.5)
    right(source(table.path, task, cached=cached, dtype="FLOAT32", names=declared))
    for i, value in enumerate(table.values):
        task = PerPixelRegressionTask(scale_factor=0.5, nodata_value=value)
        right(source(table.path, task, cached=cached, dtype="FLOAT32", names=[f"w{i}", f"x{i}"]))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("shift", "shape", "covered"),
    [
        ((0, 0), (SIZE, 4), np.s_[:, :4]),
        ((2, 3), (SIZE, SIZE), np.s_[3:, 2:]),
        ((-2, -3), (SIZE, SIZE), np.s_[:5, :6]),
        ((0.5, 0.5), (SIZE, SIZE), np.s_[:, :]),
        ((5000, 0), (SIZE, SIZE), np.s_[:0, :0]),
    ],
)
def test_what_the_file_does_not_cover_is_invalid(
    shift: tuple[float, float], shape: tuple[int, int], covered: Any, cached: bool, tmp_path: Path
) -> None:
    path = write(tmp_path / "d", np.ones(shape, np.uint8), shift=shift)
    expected = np.zeros((SIZE, SIZE), bool)
    expected[covered] = True
    for kind, dtype in ((SegmentationTask(num_classes=2), "INT32"), (PerPixelRegressionTask(), "FLOAT32")):
        found = source(path, kind, cached=cached, dtype=dtype)
        assert (valid_of(found.sample(0)) == expected).all()
        learnt = baselines.fit_baselines({"d": found})["d"]
        assert learnt == ({"t": 1.0} if expected.any() else {})


@pytest.mark.parametrize("cached", [False, True])
def test_a_crop_has_the_mask_of_its_place(cached: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "d", np.ones((SIZE, 3), np.uint8))
    found = source(path, SegmentationTask(num_classes=2), cached=cached, crop_size=4, load_all_crops=True)
    shares = [float(valid_of(found.sample(i)).mean()) for i in range(len(found))]
    assert shares == [0.75, 0, 0.75, 0] or shares == [0.75, 0.75, 0, 0]


def test_a_label_without_a_crs_is_of_the_window_s(tmp_path: Path) -> None:
    path = write(tmp_path / "d", np.ones((SIZE, 4), np.uint8))
    file = path / "windows/g/w0/layers/label/class/geotiff.tif"
    kind: dict[str, Any] = {"driver": "GTiff", "height": SIZE, "width": 4, "count": 1, "dtype": "uint8"}
    with rasterio.open(file, "w", transform=Affine(10, 0, 0, 0, -10, 0), **kind) as out:
        out.write(np.ones((SIZE, 4), np.uint8), 1)
    sample = source(path, SegmentationTask(num_classes=2), cached=False).sample(0)
    assert valid_of(sample)[:, :4].all()
    assert not valid_of(sample)[:, 4:].any()
    assert (sample[1]["t"]["classes"].get_hw_tensor()[:, :4] == 1).all()


def test_a_label_of_another_projection_is_masked_where_it_does_not_reach(tmp_path: Path) -> None:
    from rasterio import warp

    path = write(tmp_path / "d", np.ones((SIZE, SIZE), np.uint8))
    file = path / "windows/g/w0/layers/label/class/geotiff.tif"
    left, bottom, right, top = warp.transform_bounds("EPSG:32631", "EPSG:4326", 0, -80, 40, 0)
    place = Affine((right - left) / 20, 0, left, 0, -(top - bottom) / 40, top)
    kind: dict[str, Any] = {"driver": "GTiff", "height": 40, "width": 20, "count": 1, "dtype": "uint8"}
    with rasterio.open(file, "w", crs="EPSG:4326", transform=place, **kind) as out:
        out.write(np.ones((40, 20), np.uint8), 1)
    sample = source(path, SegmentationTask(num_classes=2), cached=False).sample(0)
    valid, classes = valid_of(sample), sample[1]["t"]["classes"].get_hw_tensor().numpy()
    assert valid[:, :4].all()
    assert not valid[:, 5:].any()
    assert (classes[valid] == 1).all()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("form", ["numpy", "single_image"])
def test_other_formats_have_edges_and_nodata_too(form: str, cached: bool, tmp_path: Path) -> None:
    layer = {"format": {"name": form}} if form == "numpy" else {"format": {"name": form, "format": "png"}}
    name = {"numpy": "NumpyRasterFormat", "single_image": "SingleImageRasterFormat"}[form]
    layer = {"format": {"class_path": f"rslearn.utils.raster_format.{name}"}}
    path = write(tmp_path / "d", np.ones((SIZE, SIZE), np.uint8), layer=layer)
    writer = NumpyRasterFormat() if form == "numpy" else SingleImageRasterFormat()
    array = np.ones((1, SIZE, 4), np.uint8)
    array[:, :2] = 7
    folder = UPath(path / "windows/g/w0/layers/label/class")
    made = RasterArray(chw_array=array, metadata=RasterMetadata(nodata_value=7))
    writer.encode_raster(folder, _PROJECTION, (0, 0, 4, SIZE), made)
    expected = np.zeros((SIZE, SIZE), bool)
    expected[2:, :4] = True
    found = source(path, SegmentationTask(num_classes=2), cached=cached)
    assert (valid_of(found.sample(0)) == expected).all()


@pytest.mark.parametrize("cached", [False, True])
def test_a_class_that_the_file_calls_nodata_is_asked_about(cached: bool, tmp_path: Path) -> None:
    array = np.ones((SIZE, SIZE), np.uint8)
    array[:4] = 0
    path = write(tmp_path / "d", array, declared=0)
    with pytest.raises(DataError, match="the files declare nodata 0, which is a class of the task; nodata_value: 0"):
        source(path, SegmentationTask(num_classes=2), cached=cached).sample(0)
    for nodata, share in ((0, 0.5), (255, 1.0)):
        task = SegmentationTask(num_classes=2, nodata_value=nodata)
        assert valid_of(source(path, task, cached=cached).sample(0)).mean() == share
    task = SegmentationTask(num_classes=2, zero_is_invalid=True)
    assert valid_of(source(path, task, cached=cached).sample(0)).mean() == 0.5


@pytest.mark.parametrize("cached", [False, True])
def test_renamed_classes_keep_their_meaning(cached: bool, tmp_path: Path) -> None:
    array = np.full((SIZE, SIZE), 10, np.uint8)
    array[0], array[1], array[2] = 20, 30, 99
    path = write(tmp_path / "d", array, declared=99)
    task = SegmentationTask(num_classes=2, class_id_mapping={10: 0, 20: 1, 30: 255}, nodata_value=255)
    sample = source(path, task, cached=cached).sample(0)
    expected = np.ones((SIZE, SIZE), bool)
    expected[1:3] = False
    assert (valid_of(sample) == expected).all()
    assert sample[1]["t"]["classes"].get_hw_tensor()[0].tolist() == [1] * SIZE


def test_a_task_that_renames_its_nodata_value_has_said_which_it_is(tmp_path: Path) -> None:
    array = np.zeros((SIZE, SIZE), np.uint8)
    array[0], array[1] = 1, 255
    path = write(tmp_path / "d", array, declared=0)
    task = SegmentationTask(num_classes=2, class_id_mapping={255: 255}, nodata_value=255)
    sample = source(path, task, cached=False).sample(0)
    expected = np.ones((SIZE, SIZE), bool)
    expected[1] = False
    assert (valid_of(sample) == expected).all()


@pytest.mark.parametrize("value", [4294967295.0, -7.0])
def test_what_is_neither_class_nor_nodata_is_still_refused(value: float, tmp_path: Path) -> None:
    array = np.ones((SIZE, SIZE), np.int64 if value < 0 else np.uint32)
    array[0, 0] = int(value)
    path = write(tmp_path / "d", array.astype(np.int32) if value < 0 else array)
    with pytest.raises(DataError, match="labels are no class of the task"):
        source(path, SegmentationTask(num_classes=2, nodata_value=255), cached=False).sample(0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_measurement_that_is_no_number_is_refused_unless_it_is_declared(value: float, tmp_path: Path) -> None:
    array = np.ones((SIZE, SIZE), np.float32)
    array[0, 0] = value
    path = write(tmp_path / "d", array)
    with pytest.raises(DataError, match="1 of 64 labels are NaN or infinite"):
        source(path, PerPixelRegressionTask(), cached=False, dtype="FLOAT32").sample(0)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("value", [65535.0, -99.0, -9999.0])
def test_what_an_image_file_declares_nodata_is_no_measurement(value: float, cached: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "d", np.ones((SIZE, SIZE), np.uint8))
    image = np.full((SIZE, SIZE), 300, np.float32)
    image[:, :4] = value
    dataset = Dataset(UPath(path))
    raster(dataset.load_windows()[0], "image", "a", image, declared=value)
    with pytest.raises(DataError, match=r"layer image: 50.00% of the values are NaN, infinite or declared nodata"):
        source(path, SegmentationTask(num_classes=2), cached=cached).sample(0)
    raster(dataset.load_windows()[0], "image", "a", np.where(image < 0, 0, image), declared=0)
    sample = source(path, SegmentationTask(num_classes=2), cached=cached).sample(0)
    assert torch.isfinite(sample[0]["image"].image).all()
