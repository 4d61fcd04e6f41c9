"""Evaluation on crops that overlap counts each pixel and each object once, as a prediction of the window does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.crs import CRS
from rslearn.config import BandSetConfig, DType, LayerConfig, LayerType
from rslearn.dataset import Window
from rslearn.dataset.storage.file import FileWindowStorage
from rslearn.train.all_crops_dataset import get_window_crop_options
from rslearn.train.model_context import SampleMetadata
from rslearn.train.prediction_writer import PendingCropOutput, RasterMerger
from rslearn.train.tasks.detection import DetectionTask
from rslearn.utils.feature import Feature
from rslearn.utils.geometry import Projection, STGeometry
from shapely import box
from upath import UPath

from rslp.data.crops import counted_target, crop_place, own_area, unclipped
from rslp.evaluate.evaluation import evaluate
from rslp.evaluate.prediction import predict
from rslp.rundir import RunDir
from rslp.train.build import build
from rslp.train.fit import fit
from rslp.train.metrics import TaskMetrics
from tests.evaluate.test_prediction import change, label, rewrite_image
from tests.tiny import run_config, write_dataset, write_run

sizes = st.integers(3, 9)


@settings(deadline=None)
@given(st.tuples(st.integers(1, 30), st.integers(1, 30)), st.tuples(sizes, sizes), st.integers(0, 6), st.data())
def test_each_pixel_belongs_to_the_crop_that_rslearns_merger_takes_it_from(
    window: tuple[int, int], size: tuple[int, int], overlap: int, data: st.DataObject
) -> None:
    overlap = min(overlap, min(size) - 1)
    x0, y0 = data.draw(st.sampled_from([(0, 0), (-7, 100)]))
    bounds = (x0, y0, x0 + window[0], y0 + window[1])
    crops = get_window_crop_options(size, (overlap, overlap), bounds)
    owner = np.full((window[1], window[0]), -1)
    for number, crop in enumerate(crops):
        left, top, right, bottom = own_area(crop, bounds, overlap=overlap)
        part = owner[top - y0 : bottom - y0, left - x0 : right - x0]
        assert (part == -1).all()
        part[:] = number
    assert (owner >= 0).all()
    band = BandSetConfig(dtype=DType.INT32, num_bands=1)
    merged = RasterMerger(overlap_pixels=overlap).merge(
        Window(FileWindowStorage(UPath("/")), "g", "w", Projection(CRS.from_epsg(32631), 10, -10), bounds, None),
        [PendingCropOutput(crop, np.full((1, size[1], size[0]), i)) for i, crop in enumerate(crops)],
        LayerConfig(type=LayerType.RASTER, band_sets=[band]),
    )
    np.testing.assert_array_equal(owner, merged[0])


def tiled(folder: Path, kind: str, *, overlap: int, size: int, **more: Any) -> RunDir:
    """A run of one dataset whose validation and prediction are of all crops of 8 px."""
    path = write_dataset(folder / "data" / kind, kind, size=size)
    config = run_config({kind: (str(path), kind)}, epochs=1)
    module = config["data"]["init_args"]["data_modules"][kind]["init_args"]
    settings = {"crop_size": 8, "overlap_pixels": overlap, "load_all_crops": True, "tags": {"split": "val"}}
    module |= {"val_config": settings, "predict_config": settings, "train_config": {"crop_size": 8}, **more}
    return write_run(folder / "run", config)


@pytest.mark.parametrize(("overlap", "size"), [(4, 20), (0, 13), (0, 5)])
def test_a_segmentation_is_judged_as_the_rasters_that_a_prediction_writes(
    tmp_path: Path, overlap: int, size: int
) -> None:
    run = tiled(tmp_path, "segment", overlap=overlap, size=size)
    assert fit(run) == 0
    (evaluation,) = evaluate(run, splits=["val"])
    assert predict(run)
    pairs = np.zeros((2, 2))
    for window in ("w006", "w007", "w008"):
        with rasterio.open(label(tmp_path, "segment", window)) as truth:
            classes = truth.read(1)
        with rasterio.open(run.predictions / "segment" / "default" / window / "segment.tif") as predicted:
            np.add.at(pairs, (classes, predicted.read(1)), 1)
    union = pairs.sum(axis=0) + pairs.sum(axis=1) - np.diag(pairs)
    expected = (np.diag(pairs)[union > 0] / union[union > 0]).mean()
    (row,) = [row for row in evaluation.rows if row.primary]
    assert row.value == pytest.approx(expected, abs=1e-12)
    assert (row.n, row.n_windows, row.valid_share) == (3, 3, 1.0)
    accuracy = [row.value for row in evaluation.rows if row.metric == "accuracy"]
    recalls = [pairs[i, i] / pairs[i].sum() for i in (0, 1) if pairs[i].sum()]
    assert accuracy == [pytest.approx(np.mean(recalls), abs=1e-6)]


@pytest.mark.parametrize(("overlap", "size"), [(0, 16), (4, 16), (2, 21), (6, 13), (0, 5)])
def test_each_object_is_counted_and_each_detection_found_in_one_crop(tmp_path: Path, overlap: int, size: int) -> None:
    run = tiled(tmp_path, "detect", overlap=overlap, size=size, batch_size=3)
    config = json.loads(json.dumps(yaml_of(run)))
    decoders = config["model"]["init_args"]["model"]["init_args"]["decoders"]
    decoders["detect"] = [{"class_path": "tests.evaluate.test_prediction.BrightSpots"}]
    run.config.write_text(json.dumps(config))
    change(run, "detect", task=with_distance(config))
    rng, planted = np.random.default_rng(size), 0
    for number, window in enumerate(("w006", "w007", "w008"), start=6):
        spots = rng.random((size, size)) < 0.2
        rewrite_image(label(tmp_path, "detect", window, layer="image"), spots)
        plant(label(tmp_path, "detect", window), [(number * 2 * size + x, y) for y, x in np.argwhere(spots)])
        planted += int(spots.sum())
    assert fit(run) == 0
    (evaluation,) = evaluate(run, splits=["val"])
    rows = {row.metric: row for row in evaluation.rows}
    assert rows["average_precision"].value == rows["f1_tuned"].value == rows["f1_score"].value == 1.0
    assert (rows["average_precision"].n, rows["average_precision"].n_windows) == (3, 3)
    source = build(run, training=False).datamodule.sources("val")["detect"]
    counted = [source.targets(i)["detect"] for i in range(len(source))]
    assert sum(int(t.get("counted", torch.ones(len(t["boxes"]))).sum()) for t in counted) == planted


def yaml_of(run: RunDir) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(run.config.read_text())
    return content


def with_distance(config: dict[str, Any]) -> dict[str, Any]:
    task = config["data"]["init_args"]["data_modules"]["detect"]["init_args"]["task"]
    options = task["init_args"]["tasks"]["detect"]["init_args"]
    options |= {"f1_metric_kwargs": {"cmp_mode": "distance", "cmp_threshold": 1.5}, "enable_f1_metric": True}
    return dict(task)


def plant(geojson: Path, points: list[tuple[int, int]]) -> None:
    """Points of a thing at pixels of the window's projection, in the middle of them."""
    content = json.loads(geojson.read_text())
    content["features"] = [
        {
            "type": "Feature",
            "properties": {"value": "thing"},
            "geometry": {"type": "Point", "coordinates": [x + 0.5, y + 0.5]},
        }
        for x, y in points
    ]
    geojson.write_text(json.dumps(content))


PROJECTION = Projection(CRS.from_epsg(32631), 10, -10)
TASK = DetectionTask(property_name="p", classes=["bg", "thing"], enable_map_metric=False, enable_f1_metric=True)


@st.composite
def windows(draw: st.DrawFn) -> tuple[list[tuple[int, int, int, int]], list[Any], list[Any], list[Any]]:
    """Boxes that meet a window, and for each crop that reads one: what a model that knows says, target and place."""
    side, size = draw(st.integers(3, 25)), draw(st.integers(3, 9))
    overlap = draw(st.integers(0, size - 1))
    boxes = []
    for _ in range(draw(st.integers(1, 3))):
        x, y = draw(st.integers(-8, side - 1)), draw(st.integers(-8, side - 1))
        w, h = draw(st.integers(max(1, 1 - x), 20)), draw(st.integers(max(1, 1 - y), 20))
        boxes.append((x, y, x + w, y + h))
    bounds = (0, 0, side, side)
    crops = get_window_crop_options((size, size), (overlap, overlap), bounds)
    plain = unclipped(TASK)
    assert plain is not None
    samples = []
    for number, crop in enumerate(crops):
        metadata = SampleMetadata("g", "w", bounds, crop, number, len(crops), None, PROJECTION, None)
        seen = [b for b in boxes if box(*b).intersects(box(*crop))]
        raw: Any = {"targets": [Feature(STGeometry(PROJECTION, box(*b), None), {"p": "thing"}) for b in seen]}
        target = TASK.process_inputs(raw, metadata=metadata)[1]
        whole = plain.process_inputs(raw, metadata=metadata)[1]
        place = crop_place(metadata, overlap=overlap)
        target = counted_target(TASK, target, metadata=metadata, place=place, unclipped_target=whole)
        low, high = torch.tensor([-crop[0], -crop[1]] * 2), torch.tensor([side - crop[0], side - crop[1]] * 2)
        known = {**whole, "boxes": whole["boxes"].clamp(low, high), "scores": torch.ones(len(whole["boxes"]))}
        samples.append((known, target, place))
    outputs, targets, places = (list(column) for column in zip(*samples, strict=True))
    return boxes, outputs, targets, places


@settings(deadline=None, max_examples=12)
@given(windows(), st.data())
def test_a_box_across_crops_and_the_windows_edge_is_counted_once(
    window: tuple[list[Any], list[Any], list[Any], list[Any]], data: st.DataObject
) -> None:
    """Whatever boxes meet the window, one of the crops that read it counts each, on whichever process it is."""
    boxes, outputs, targets, places = window
    counted = [int(t["counted"].sum()) if "counted" in t else len(t["boxes"]) for t in targets]
    assert sum(counted) == len(boxes)
    rank_of = [data.draw(st.integers(0, 2)) for _ in places]
    ranks = [TaskMetrics(TASK) for _ in range(3)]
    for number, metrics in enumerate(ranks):
        own = [i for i, rank in enumerate(rank_of) if rank == number]
        if own:
            outputs_, targets_, places_ = ([part[i] for i in own] for part in (outputs, targets, places))
            metrics.update(outputs_, targets=targets_, constants=None, places=places_)
    states = [metrics.state() for metrics in ranks]
    for metrics in ranks:
        metrics.merge(states)
        result = metrics.result()
        assert (result.n, result.n_windows, result.valid_share) == (1, 1, 1.0)
        assert result.values["average_precision"] == result.values["f1_tuned"] == 1.0
        assert result.values["F1"] == pytest.approx(0.5)  # rslearn's mean over classes, one of which is the background
