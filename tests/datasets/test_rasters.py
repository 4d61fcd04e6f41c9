"""Chips with label rasters become datasets: pixels, places, labels, splits, and a dataset config that trains."""

from __future__ import annotations

import itertools
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
import yaml

from rslp.errors import DataError, UserError
from tests.datasets.files import BANDS, corner, features, made, pixels, windows_of, write_chips, write_tiff


def test_chips_and_label_rasters_become_a_segmentation(tmp_path: Path) -> None:
    summary = made(write_chips(tmp_path))
    assert sum(summary.windows.values()) == summary.new == 12
    assert set(summary.windows) == {"train", "val", "test"}
    windows = windows_of(tmp_path / "dataset")
    for number, (name, window) in enumerate(sorted(windows.items())):
        left, top = corner(number)
        assert window.bounds == (left / 10, -top / 10, left / 10 + 16, -top / 10 + 16)
        assert window.time_range == (datetime(2022, 1, 1, tzinfo=UTC), datetime(2022, 6, 1, tzinfo=UTC))
        with rasterio.open(tmp_path / f"chips/{name}_image.tif") as file:
            assert np.array_equal(pixels(window, "sentinel2_l2a", BANDS)[:, 0], file.read())
        with rasterio.open(tmp_path / f"chips/{name}_label.tif") as file:
            label = file.read().astype(int)
        assert np.array_equal(pixels(window, "label", ["label"])[:, 0], np.where(label == 0, 255, label - 1))
    config = yaml.safe_load(
        (tmp_path / "dataset.yaml").read_text().replace("{PATCH", "{'PATCH").replace("SIZE}", "SIZE'}")
    )
    task = config["data"]["init_args"]["task"]["init_args"]["tasks"]["dataset"]["init_args"]
    assert task["class_names"] == ["wheat", "maize", "fallow"] and task["nodata_value"] == 255
    assert config["data"]["init_args"]["path"] == "dataset"
    for split in ("train", "val", "test"):
        assert (tmp_path / "dataset" / f"preview_{split}.png").stat().st_size > 5000
    assert json.loads((tmp_path / "dataset" / "summary.json").read_text())["counts"]["wheat"]["train"] > 0
    assert not list(tmp_path.glob(".*"))


def test_a_second_time_adds_what_is_new_and_changes_nothing(tmp_path: Path) -> None:
    write_chips(tmp_path, 16)
    later = tmp_path / "later"
    later.mkdir()
    for path in [*tmp_path.glob("chips/c12*"), *tmp_path.glob("chips/c15*")]:
        path.rename(later / path.name)
    first = made(tmp_path)
    before = {name: window.options["split"] for name, window in windows_of(tmp_path / "dataset").items()}
    assert made(tmp_path).new == 0
    for path in later.iterdir():
        path.rename(tmp_path / "chips" / path.name)
    second = made(tmp_path)
    assert (first.new, second.new, sum(second.windows.values())) == (14, 2, 16)
    after = {name: window.options["split"] for name, window in windows_of(tmp_path / "dataset").items()}
    assert {name: after[name] for name in before} == before


def test_changed_content_is_refused_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    write_chips(tmp_path)
    made(tmp_path)
    left, top = corner(3)
    write_tiff(tmp_path / "chips/c03_image.tif", np.full((6, 16, 16), 77, np.uint16), left=left, top=top, bands=BANDS)
    with pytest.raises(DataError, match=r"c03_label.tif: window c03 was written before, with other content"):
        made(tmp_path)
    assert pixels(windows_of(tmp_path / "dataset")["c03"], "sentinel2_l2a", BANDS).max() > 77
    assert made(tmp_path, overwrite=True).new == 12
    assert pixels(windows_of(tmp_path / "dataset")["c03"], "sentinel2_l2a", BANDS).max() == 77


def test_a_changed_dataset_config_is_left_as_it_is(tmp_path: Path) -> None:
    write_chips(tmp_path)
    made(tmp_path)
    config = tmp_path / "dataset.yaml"
    config.write_text(config.read_text() + "# mine\n")
    assert any("dataset.yaml exists and is left as it is" in note for note in made(tmp_path).notes)
    assert config.read_text().endswith("# mine\n")


def test_another_folder_is_never_replaced(tmp_path: Path) -> None:
    write_chips(tmp_path)
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "thesis.txt").write_text("all of it")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="was not made by make_dataset"):
            made(tmp_path, overwrite=overwrite)
    assert (tmp_path / "dataset" / "thesis.txt").read_text() == "all of it"


def test_large_inputs_are_cut_and_no_labelled_pixel_is_lost(tmp_path: Path) -> None:
    write_chips(tmp_path, 12, size=40)
    summary = made(tmp_path, window={"size": 16})
    windows = windows_of(tmp_path / "dataset")
    assert len(windows) == sum(summary.windows.values()) == 12 * 9
    sizes = {(w.bounds[2] - w.bounds[0], w.bounds[3] - w.bounds[1]) for w in windows.values()}
    assert sizes == {(16, 16)}
    covered = np.zeros((40, 40), bool)
    left, top = corner(5)
    for name, window in windows.items():
        if name.startswith("c05"):
            column, row = window.bounds[0] - int(left / 10), window.bounds[1] + int(top / 10)
            covered[row : row + 16, column : column + 16] = True
    assert covered.all()
    # Tiles that overlap are in one split.
    outlines = [(shapely.box(*window.bounds), window.options["split"]) for window in windows.values()]
    pairs = [(a, b) for (x, a), (y, b) in itertools.combinations(outlines, 2) if x.intersection(y).area > 0]
    assert len(pairs) == 12 * 8 and all(a == b for a, b in pairs)


def test_label_rasters_are_matched_by_place(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(1, 4000, (6, 400, 2000)).astype(np.uint16)
    write_tiff(tmp_path / "scene_20220304.tif", image, bands=BANDS)
    write_tiff(tmp_path / "scene_20220504.tif", image // 2 + 1, bands=BANDS)
    for number in range(12):
        label = rng.integers(1, 4, (1, 16, 16)).astype(np.uint8)
        write_tiff(tmp_path / f"labels/{number}.tif", label, left=500_000 + 160 * 10 * number, top=4_200_000 - 200)
    images = {"sentinel2_l2a": {"files": "scene_{date:%Y%m%d}.tif"}}
    made(tmp_path, images=images, labels={"files": "labels/{number}.tif"})
    window = windows_of(tmp_path / "dataset")["7"]
    values = pixels(window, "sentinel2_l2a", BANDS)
    assert values.shape == (6, 2, 16, 16)
    assert np.array_equal(values[:, 0], image[:, 20:36, 160 * 7 : 160 * 7 + 16])


def test_every_sensor_keeps_its_own_grid_and_dates(tmp_path: Path) -> None:
    write_chips(tmp_path)
    for number in range(12):
        left, top = corner(number)
        for month in (3, 4, 5):
            radar = np.full((2, 8, 8), -15.0 + month, np.float32)
            path = tmp_path / f"radar/c{number:02d}_2022{month:02d}10.tif"
            write_tiff(path, radar, left=left, top=top, size=20, bands=("vv", "vh"))
    images = {
        "sentinel2_l2a": {"files": "chips/{chip}_image.tif", "date": "2022-04-01"},
        "sentinel1": {"files": "radar/{chip}_{date:%Y%m%d}.tif"},
    }
    summary = made(tmp_path, images=images)
    assert any("sentinel1: the values look like db" in note for note in summary.notes)
    window = windows_of(tmp_path / "dataset")["c04"]
    files = list((Path(str(window.window_root)) / "layers" / "sentinel1").rglob("geotiff.tif"))
    with rasterio.open(files[0]) as file:
        assert (file.width, file.height, file.count, file.transform.a) == (8, 8, 6, 20)
    assert pixels(window, "sentinel1", ["vv", "vh"])[0, :, 3, 3].tolist() == [-12, -11, -10]
    assert window.time_range == (datetime(2022, 3, 10, tzinfo=UTC), datetime(2022, 5, 11, tzinfo=UTC))
    assert "sentinel1_units: db" in (tmp_path / "dataset.yaml").read_text()


def test_per_pixel_regression_keeps_values_and_marks_gaps(tmp_path: Path) -> None:
    write_chips(tmp_path)
    for number in range(12):
        left, top = corner(number)
        height = np.linspace(0, 30, 256, dtype=np.float32).reshape(1, 16, 16)
        height[0, 0, :3] = -1
        write_tiff(tmp_path / f"height/c{number:02d}.tif", height, left=left, top=top, nodata=-1)
    made(tmp_path, task="per_pixel_regression", labels={"files": "height/{chip}.tif"})
    label = pixels(windows_of(tmp_path / "dataset")["c02"], "label", ["label"])[0, 0]
    assert label[0, :3].tolist() == [-9999.0] * 3 and label[15, 15] == 30
    text = (tmp_path / "dataset.yaml").read_text()
    assert "nodata_value: -9999.0" in text and "scale_factor: 0.1" in text


def test_objects_of_rasters_become_windows_and_stay_in_one_split(tmp_path: Path) -> None:
    write_chips(tmp_path)
    # One field in two chips.
    for number in (0, 9):
        left, top = corner(number)
        path = tmp_path / f"chips/c{number:02d}_field.tif"
        with rasterio.open(path) as file:
            field = file.read()
        field[:, :4, :4] = 999
        write_tiff(path, field, left=left, top=top)
        with rasterio.open(tmp_path / f"chips/c{number:02d}_label.tif", "r+") as file:
            label = file.read()
            label[:, :4, :4] = 2
            file.write(label)
    labels = {
        "files": "chips/{chip}_label.tif", "objects": "chips/{chip}_field.tif",
        "classes": {1: "wheat", 2: "maize", 3: "fallow"}, "ignore": [0],
    }  # fmt: skip
    summary = made(tmp_path, task="classification", labels=labels, window={"size": 8}, split={"size_m": 1000})
    windows = windows_of(tmp_path / "dataset")
    assert sum(summary.windows.values()) == len(windows)
    assert windows["c00_999"].options["split"] == windows["c09_999"].options["split"]
    [facts] = features(windows["c00_999"])
    assert facts == {"label": "maize", "id": "999"}
    assert all(w.bounds[2] - w.bounds[0] == 8 for w in windows.values())


def test_only_what_was_asked_for_is_said_of_the_grid(tmp_path: Path) -> None:
    write_chips(tmp_path)
    left, top = corner(0)
    for name, bands in (("image", 6), ("label", 1), ("field", 1)):
        with rasterio.open(tmp_path / f"chips/c00_{name}.tif", "r+") as file:
            assert file.count == bands
            file.transform = rasterio.Affine(10, 0, left + 3, 0, -10, top - 4)
    summary = made(tmp_path)
    assert summary.shift == pytest.approx(5)
    assert summary.notes[0] == "rslearn's grid: pixels lie up to 5.00 m beside the place that their files name"


def test_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_chips(tmp_path)
    shutil.rmtree(tmp_path / "nowhere", ignore_errors=True)
    monkeypatch.setattr("rslp.datasets.make.write_window", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chips", "mine.yaml"]
