"""Kinds of change to a dataset or to what is asked of it, and how many windows each may cause to be packed anew."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rslearn.config import DType
from rslearn.dataset import Dataset
from rslearn.train.dataset import DataInput
from rslearn.utils.geometry import ResolutionFactor
from upath import UPath

from tests.data.cache.places import SIZE, add_window, write_features, write_raster

Settings = dict[str, Any]
Change = Callable[[Path, Settings], None]
ALL = 99
CHANGES: dict[str, tuple[Change, int]] = {}


def change(name: str, packed: int) -> Callable[[Change], Change]:
    """Enter a change in the table, with the number of windows that may be packed anew."""

    def enter(made: Change) -> Change:
        CHANGES[name] = (made, packed)
        return made

    return enter


def window(path: Path) -> Path:
    return path / "windows" / "even" / "w000"


def tif(path: Path, layer: str = "series") -> Path:
    return next((window(path) / "layers" / layer).rglob("*.tif"))


def edit(file: Path, made: Callable[[Any], Any]) -> None:
    document = json.loads(file.read_text())
    file.write_text(json.dumps(made(document) or document))


def set_in(file: Path, *keys: Any, to: Any) -> None:
    document = json.loads(file.read_text())
    at = document
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = to
    file.write_text(json.dumps(document))


@change("a pixel edited in place", 1)
def _(path: Path, settings: Settings) -> None:
    with rasterio.open(tif(path), "r+") as source:
        source.write(source.read() + 1)


@change("a raster replaced by another", 1)
def _(path: Path, settings: Settings) -> None:
    dataset = Dataset(UPath(path))
    (made,) = dataset.load_windows(groups=["even"], names=["w000"])
    write_raster(made, "mask", ["m"], [np.full((1, 1, SIZE, SIZE), 7, np.uint8)])


@change("other bytes of the same size, in place", 1)
def _(path: Path, settings: Settings) -> None:
    file = window(path) / "layers" / "label" / "data.geojson"
    file.write_text(file.read_text().replace('"high"', '"low" ').replace('"low"', '"lox"'))


@change("another file of the same size and time", 1)
def _(path: Path, settings: Settings) -> None:
    file = window(path) / "layers" / "label" / "data.geojson"
    state = file.stat()
    other = file.with_suffix(".other")
    other.write_text(file.read_text().replace('"low"', '"lox"'))
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
    other.replace(file)


@change("other bytes in place, size and time put back", 1)
def _(path: Path, settings: Settings) -> None:
    file = window(path) / "layers" / "label" / "data.geojson"
    state = file.stat()
    with file.open("r+") as handle:
        text = handle.read().replace('"low"', '"lox"')
        handle.seek(0)
        handle.write(text)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


# Of what changes the time of change, content can't be told from the rest.
@change("permissions changed", 1)
def _(path: Path, settings: Settings) -> None:
    tif(path).chmod(0o600)


@change("a second name for a raster", 1)
def _(path: Path, settings: Settings) -> None:
    os.link(tif(path), path / "backup.tif")


@change("a raster touched", 1)
def _(path: Path, settings: Settings) -> None:
    tif(path).touch()


@change("timestamps edited", 1)
def _(path: Path, settings: Settings) -> None:
    file = tif(path).parent / "metadata.json"
    file.write_text(file.read_text().replace("2024-03", "2021-03"))


@change("timestamps removed", 1)
def _(path: Path, settings: Settings) -> None:
    (tif(path).parent / "metadata.json").unlink()


@change("a label edited", 1)
def _(path: Path, settings: Settings) -> None:
    set_in(window(path) / "layers" / "label" / "data.geojson", "features", 0, "properties", "n", to=[0.1, {"x": "é"}])


@change("a label moved", 1)
def _(path: Path, settings: Settings) -> None:
    set_in(
        window(path) / "layers" / "label" / "data.geojson",
        "features", 0, "geometry", "coordinates", to=[42.123456789, -3.3],
    )  # fmt: skip


@change("a label added", 1)
def _(path: Path, settings: Settings) -> None:
    edit(window(path) / "layers" / "label" / "data.geojson", lambda d: d["features"].append(d["features"][0]))


@change("a label removed", 1)
def _(path: Path, settings: Settings) -> None:
    edit(window(path) / "layers" / "label" / "data.geojson", lambda d: d["features"].pop())


@change("a layer no longer complete", 0)
def _(path: Path, settings: Settings) -> None:
    (window(path) / "layers" / "coarse" / "completed").unlink()


@change("an optional layer no longer complete", 0)
def _(path: Path, settings: Settings) -> None:
    (window(path) / "layers" / "mask" / "completed").unlink()


@change("an item group removed", 0)
def _(path: Path, settings: Settings) -> None:
    shutil.rmtree(window(path) / "layers" / "series.2")


@change("an item group no longer complete", 1)
def _(path: Path, settings: Settings) -> None:
    (window(path) / "layers" / "series.1" / "completed").unlink()


@change("an item group added", 1)
def _(path: Path, settings: Settings) -> None:
    layers = window(path) / "layers"
    shutil.copytree(layers / "series", layers / "series.3")


@change("two item groups exchanged", 1)
def _(path: Path, settings: Settings) -> None:
    layers = window(path) / "layers"
    (layers / "series").rename(layers / "series.9")
    (layers / "series.1").rename(layers / "series")
    (layers / "series.9").rename(layers / "series.1")


@change("a layer removed", 0)
def _(path: Path, settings: Settings) -> None:
    shutil.rmtree(window(path) / "layers" / "odd")


@change("a window added", 1)
def _(path: Path, settings: Settings) -> None:
    add_window(Dataset(UPath(path)), 8)


@change("a window removed", 0)
def _(path: Path, settings: Settings) -> None:
    shutil.rmtree(window(path))


@change("a window renamed", 1)
def _(path: Path, settings: Settings) -> None:
    window(path).rename(window(path).with_name("renamed"))


@change("a window moved to another group", 1)
def _(path: Path, settings: Settings) -> None:
    window(path).rename(path / "windows" / "odd" / "w000")


@change("two windows exchanged", 2)
def _(path: Path, settings: Settings) -> None:
    other = path / "windows" / "odd" / "w001"
    window(path).rename(path / "windows" / "aside")
    other.rename(window(path))
    (path / "windows" / "aside").rename(other)


@change("a group renamed", ALL)
def _(path: Path, settings: Settings) -> None:
    (path / "windows" / "even").rename(path / "windows" / "evening")


@change("a group hidden", 0)
def _(path: Path, settings: Settings) -> None:
    (path / "windows" / "even").rename(path / "windows" / ".even")


@change("bounds changed", 1)
def _(path: Path, settings: Settings) -> None:
    set_in(window(path) / "metadata.json", "bounds", to=[42, -14, 42 + SIZE, 2])


@change("projection changed", 1)
def _(path: Path, settings: Settings) -> None:
    set_in(window(path) / "metadata.json", "projection", "x_resolution", to=5)
    set_in(window(path) / "metadata.json", "bounds", to=[80, -SIZE, 80 + 2 * SIZE, 0])


@change("time range changed", 0)
def _(path: Path, settings: Settings) -> None:
    set_in(window(path) / "metadata.json", "time_range", to=["2020-01-01T00:00:00+00:00", "2020-02-01T00:00:00+00:00"])


@change("time range removed", 0)
def _(path: Path, settings: Settings) -> None:
    set_in(window(path) / "metadata.json", "time_range", to=None)


@change("a tag changed", 0)
def _(path: Path, settings: Settings) -> None:
    settings["tags"] = {"split": "train"}
    set_in(window(path) / "metadata.json", "options", "split", to="test")


@change("items written", 1)
def _(path: Path, settings: Settings) -> None:
    (window(path) / "items.json").write_text("[]")


@change("the whole dataset copied", ALL)
def _(path: Path, settings: Settings) -> None:
    shutil.copytree(path / "windows", path / "copy")
    shutil.rmtree(path / "windows")
    (path / "copy").rename(path / "windows")


@change("a raster on a finer grid", 1)
def _(path: Path, settings: Settings) -> None:
    with rasterio.open(tif(path, "coarse")) as source:
        profile, values = source.profile, source.read()
    profile.update(width=48, height=48, transform=profile["transform"] @ profile["transform"].scale(1 / 6))
    with rasterio.open(tif(path, "coarse"), "w", **profile) as target:
        target.write(np.repeat(np.repeat(values, 6, 1), 6, 2) + np.arange(48, dtype=np.float32))


@change("a layer of predictions written", 0)
def _(path: Path, settings: Settings) -> None:
    (made,) = Dataset(UPath(path)).load_windows(groups=["even"], names=["w000"])
    write_features(made, [("low", 1)], layer="output")


@change("a dtype in the dataset's config", ALL)
def _(path: Path, settings: Settings) -> None:
    set_in(path / "config.json", "layers", "series", "band_sets", 0, "dtype", to="float32")


@change("a raster format in the dataset's config", ALL)
def _(path: Path, settings: Settings) -> None:
    geotiff = {"class_path": "rslearn.utils.raster_format.GeotiffRasterFormat", "init_args": {"block_size": 256}}
    set_in(path / "config.json", "layers", "mask", "band_sets", 0, "format", to=geotiff)


@change("a layer added to the dataset's config", 0)
def _(path: Path, settings: Settings) -> None:
    set_in(path / "config.json", "layers", "new", to={"type": "vector"})


@change("other bands", ALL)
def _(path: Path, settings: Settings) -> None:
    settings["wanted"]["all_steps"].bands = ["b", "c"]


@change("the order of bands", ALL)
def _(path: Path, settings: Settings) -> None:
    settings["wanted"]["all_steps"].bands = ["a", "c"]


@change("bands by the number of a band set", ALL)
def _(path: Path, settings: Settings) -> None:
    settings["wanted"]["odd"] = DataInput("raster", ["odd"], use_all_bands_in_order_of_band_set_idx=0)


@change("another item group", ALL)
def _(path: Path, settings: Settings) -> None:
    settings["wanted"]["two_steps"].layers = ["series.1", "series"]


@change("another layer", ALL)
def _(path: Path, settings: Settings) -> None:
    settings["wanted"]["mask"] = DataInput("raster", ["series"], bands=["c"])


@change("another dtype", ALL)
def _(path: Path, settings: Settings) -> None:
    settings["wanted"]["all_steps"].dtype = DType.INT32


@change("one item group instead of all", 0)
def _(path: Path, settings: Settings) -> None:
    settings["wanted"]["all_steps"].load_all_layers = False


@change("named item groups instead of all", ALL)
def _(path: Path, settings: Settings) -> None:
    settings["wanted"]["all_steps"].load_all_item_groups = False


@change("two inputs exchange their names", 0)
def _(path: Path, settings: Settings) -> None:
    wanted = settings["wanted"]
    wanted["odd"], wanted["mask"] = wanted["mask"], wanted["odd"]


@change("another resolution", ALL)
def _(path: Path, settings: Settings) -> None:
    settings["wanted"]["odd"].resolution_factor = ResolutionFactor(2)


@change("an input that is not needed", 0)
def _(path: Path, settings: Settings) -> None:
    del settings["wanted"]["coarse"]


@change("crops", 0)
def _(path: Path, settings: Settings) -> None:
    settings["crop_size"] = 7


@change("all crops", 0)
def _(path: Path, settings: Settings) -> None:
    settings |= {"crop_size": 9, "load_all_crops": True}


@change("other groups", 0)
def _(path: Path, settings: Settings) -> None:
    settings["groups"] = ["odd"]


@change("other names", 0)
def _(path: Path, settings: Settings) -> None:
    settings["names"] = ["w002", "w001", "w002"]


@change("fewer samples", 0)
def _(path: Path, settings: Settings) -> None:
    settings["num_samples"] = 2
